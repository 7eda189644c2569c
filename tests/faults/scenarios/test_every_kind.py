"""Every kind of file that a run, its studies, exports and releases leave is damaged somewhere."""

from __future__ import annotations

import importlib
import pkgutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.faults import scenarios, tree, used


def damaged() -> list[str]:
    """What the scenarios' modules name in FLIPPED: patterns of paths in a folder of runs."""
    patterns: list[str] = []
    for module in pkgutil.iter_modules(scenarios.__path__):
        loaded = importlib.import_module(f"{scenarios.__name__}.{module.name}")
        patterns += getattr(loaded, "FLIPPED", ())
    return patterns


@pytest.mark.long
def test_every_kind_of_file_is_damaged_by_a_scenario(tmp_path: Path) -> None:
    used.do(tmp_path, *used.TRAINING, *used.STUDIES, *used.EXPORTS)
    patterns = damaged()
    files = tree.files(tmp_path / "runs")
    assert len(files) > 150
    assert not [name for name in files if not any(fnmatchcase(name, p) for p in patterns)]
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in files), f"no file is a {pattern}"
