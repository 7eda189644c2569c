"""A training run, from its first file to its finish: power losses, then the same command again."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.faults.child import ask
from tests.faults.power import Image, images
from tests.faults.report import Outcome, Tally, judged
from tests.faults.trace import Trace, traced
from tests.train import killing


def result(folder: Path) -> dict[str, bytes]:
    """What the run's command leaves."""
    killing.run(folder)
    return killing.bits(folder)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A run of 20 steps, with five checkpoints."""
    killing.run(tmp_path_factory.mktemp("imports"))  # not 3 s of them in every child
    folder = tmp_path_factory.mktemp("power") / "run"
    done = traced(folder, lambda: killing.run(folder))
    assert done.code == 0
    return done


def tried(tally: Tally, kind: str, image: Image, expected: object) -> None:
    image.put()
    answer = ask(partial(result, image.root))
    found = judged(answer, expected)
    tally.add(kind, found, f"{image}: {answer.refusal or answer.broken or answer.said}")


@pytest.mark.parametrize(
    "part", [pytest.param(1, marks=pytest.mark.long), pytest.param(29)], ids=["all", "some"]
)
def test_a_run_goes_on_after_a_power_loss(trace: Trace, tally: Tally, part: int) -> None:
    expected = ask(partial(result, trace.root)).value
    for number, image in enumerate(images(trace)):
        if number % part == 0:
            tried(tally, "power loss: run", image, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() >= 10  # none is refused
