"""SAEs of other libraries measured as runs of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from analyze.command import command
from analyze.peers import imported
from analyze.studies.quality import quality
from analyze.subject import Subject
from data.errors import SettingError, StoreError
from tests.analyze.conftest import LAYER, Made
from train.export import format
from train.export.format import About

ABOUT = About("nobody/none", LAYER, 32, "made up")


@pytest.fixture
def exported(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names of the made run's SAE in every format."""
    monkeypatch.chdir(tmp_path)
    names = {"reference": f"reference:{made.run}"}
    for name in format.names():
        for file, content in format.find(name).write(made.sae, ABOUT).items():
            (path := tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        names[name] = f"{name}:{path.parent}"
    return names


def test_a_foreign_sae_has_the_figures_of_the_same_one_as_a_run(
    exported: dict[str, str], made: Made, subject: Subject
) -> None:
    expected = quality(subject, 10**6)
    assert set(exported) == set(imported.READERS)
    for named in exported.values():
        assert imported.is_foreign(named)
        run = imported.run_of(named, made.store.name, None)
        found = quality(Subject.open(run, None, torch.device("cpu")), 10**6)
        assert found["variance_explained"]["as trained"]["centred"] == pytest.approx(
            expected["variance_explained"]["as trained"]["centred"], abs=1e-6
        )
        assert found["l0"] == pytest.approx(expected["l0"])
        before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
        assert imported.run_of(named, made.store.name, LAYER) == run
        assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def analyze(*overrides: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        command(OmegaConf.to_container(compose("analyze", list(overrides)), resolve=True))


def test_the_command_and_its_refusals(
    exported: dict[str, str], made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = exported["saelens"]
    analyze("study=quality", f"run='{named}'", f"store={made.store.name}")
    assert capsys.readouterr().out.startswith("# quality")
    assert not imported.is_foreign("runs/saelens:x")
    store = f"store={made.store.name}"
    for overrides, error, name in [
        ((f"run='{named}'",), SettingError, "store="),
        ((f"run='{named}'", store, "layer=4"), SettingError, "layer=4"),
        (("run=saelens:/nowhere", store), StoreError, "/nowhere/cfg.json"),
        ((f"run={made.run}", "layer=3"), SettingError, "layer=3"),
        ((f"run='{named}'", store, "study=report"), StoreError, "study=quality"),
        (("run=saelenz:x", store), SettingError, "run=saelenz:x"),
    ]:
        with pytest.raises(error, match=re.escape(name)):
            analyze(*overrides)
