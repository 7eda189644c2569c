"""study=verify names every damaged file of a run on which everything was done, and no sound one."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from residual_saes.analyze.studies.verify import verify
from residual_saes.data import digests
from residual_saes.train.run import CHECKPOINTS
from tests.faults import tree, used
from tests.faults.child import Answer, ask
from tests.faults.flips import Damage, damages
from tests.faults.report import Outcome, Tally, judged

FLIPPED = ("a/*", "imported/*")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which everything was done."""
    folder = tmp_path_factory.mktemp("used")
    used.do(folder, *used.TRAINING, *used.STUDIES, *used.EXPORTS)
    return folder


def kind(name: str) -> str:
    """What a file is, whatever its step, unit or digest."""
    name = re.sub(r"[-.][0-9a-f]{12}(?=/)|-[0-9a-f]{8}(?=/)", "", name)
    return re.sub(r"\d{2,}", "N", name)


def checked(run: Path) -> None:
    settings = {"run": str(run), "runs": None, "store": None}
    verify({**settings, "study": {"name": "verify", "store": False}})


@pytest.mark.long
def test_verify_names_every_damaged_file(root: Path, tally: Tally) -> None:
    found = {kind(name): name for name in tree.files(root / "runs") if name.startswith(("a/", "i"))}
    assert len(found) > 100
    for of_kind, name in found.items():
        path = root / "runs" / name
        run = root / "runs" / "a"
        if not name.startswith("a/"):
            run = next((root / "runs" / "imported").iterdir())
        sound = ask(partial(checked, run))
        assert sound.broken is None and not sound.refused, sound
        data = path.read_bytes()
        for damage in damages(data, count=1):
            path.unlink()
            if damage.data is not None:
                path.write_bytes(damage.data)
            answer = ask(partial(checked, run))
            path.write_bytes(data)
            told = f"{damage.told}: {answer.broken or answer.said}"
            tally.add(f"verify, {damage.kind}: {of_kind}", said(answer, path, damage), told)


def said(answer: Answer, path: Path, damage: Damage) -> Outcome:
    """What came of damage to a file: it must be named, or what lacks its record where that is gone.

    A kept folder without its record is made again, or holds files that vouch for themselves.
    """
    outcome = judged(answer, None)
    if outcome is Outcome.REFUSED:  # of a checkpoint's two files the step is named
        return outcome if path.stem in answer.said else Outcome.BROKEN
    if damage.kind == "gone" and path.name == digests.FILE:
        told = "nothing vouches for" in answer.said or "kept" in path.parts
        return Outcome.SAME if told else Outcome.SILENT
    if damage.kind == "gone" and path.parent.name == CHECKPOINTS:
        return outcome  # one checkpoint less, of two
    return Outcome.SILENT if outcome is Outcome.SAME else outcome
