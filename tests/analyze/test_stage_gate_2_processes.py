"""Several processes train the arms of stage gate 2 as one would."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.results import FOLDER
from residual_saes.analyze.studies.stage_gate_2.study import DEFINITION
from residual_saes.analyze.study import Study
from residual_saes.data.errors import SettingError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the extra `grpo` is not installed"
)
SMALL = {
    "rewards": ["R0", "R1"],
    "levels": ["token"],
    "lr": [1e-4],
    "seeds": 2,
    "steps": 1,
    "batch": 2,
    "canaries": 4,
    "text": 200,
}


@pytest.mark.long
def test_two_processes_find_what_one_finds(
    tiny_study: Callable[..., Study], tiny_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "features.json"
    helpful = [{"feature": number} for number in range(20)]
    path.write_text(json.dumps({"helpful": helpful, "harmful": []}))
    answers = {"temperature": 1, "samples": 4, "new_tokens": 32}
    found = []
    for processes in (1, 2):
        study = tiny_study(
            "stage_gate_2", answers=answers, features=str(path), processes=processes, **SMALL
        )
        shutil.rmtree(tiny_run / FOLDER / "kept", ignore_errors=True)
        figures = json.loads(dumped(study.perform(DEFINITION).figures))
        assert figures["options"].pop("processes") == processes
        found.append(figures)
    assert found[0] == found[1]


def test_no_process_is_refused(tiny_study: Callable[..., Study], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"study\.processes=0"):
        tiny_study("stage_gate_2", processes=0).perform(DEFINITION)
