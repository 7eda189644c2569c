"""A training run, from its first file to its finish: power losses and kills, and on it goes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from residual_saes.train.arm import Arm
from residual_saes.train.loop import train_together
from tests.faults import kills, tree
from tests.faults.child import ask
from tests.faults.power import EVERY, images
from tests.faults.report import Outcome, Tally, judged
from tests.faults.trace import Trace, traced
from tests.faults.tree import Tree
from tests.train import killing
from tests.train.planted import planted_stream

Work = Callable[[Path], object]


def two_arms(folder: Path) -> None:
    """Two runs on one read of the rows."""
    stream = planted_stream(killing.planted())
    arms = [Arm(killing.config(seed=seed), stream, folder / str(seed)) for seed in (0, 1)]
    train_together(arms, killing.CPU)


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    killing.run(tmp_path_factory.mktemp("imports"))  # not 3 s of imports in every child


def bits(folder: Path) -> Tree:
    """All files but the speeds, which differ from run to run, and the records that name them."""
    left_out = re.compile(r".*(timings\.jsonl|digests\.json|step_\d+\.json)")
    found = tree.files(folder)
    return {name: found[name] for name in found if not left_out.fullmatch(name)}


def again(folder: Path, work: Work) -> Tree:
    """What is there after the same command."""
    work(folder)
    return bits(folder)


def tried(tally: Tally, kind: str, told: str, folder: Path, work: Work, expected: Tree) -> None:
    answer = ask(partial(again, folder, work))
    other = tree.differences(expected, answer.value or {})
    told = f"{told}: {answer.refusal or answer.broken or other}"
    tally.add(kind, judged(answer, expected), told)


def after_power_losses(tally: Tally, kind: str, trace: Trace, work: Work, part: int = 1) -> None:
    """Go on from every `part`-th image; none may be refused."""
    assert trace.code == 0
    expected = bits(trace.root)
    for number, image in enumerate(images(trace)):
        if number % (part * EVERY) == 0:
            image.put()
            tried(tally, f"power loss: {kind}", str(image), trace.root, work, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() > 0


@pytest.mark.parametrize(
    "part", [pytest.param(1, marks=pytest.mark.long), pytest.param(23)], ids=["all", "some"]
)
def test_a_run_goes_on_after_a_power_loss(tmp_path: Path, tally: Tally, part: int) -> None:
    trace = traced(tmp_path / "run", lambda: killing.run(tmp_path / "run"))
    after_power_losses(tally, "run", trace, killing.run, part)


@pytest.mark.long
def test_a_run_that_went_on_goes_on_again(tmp_path: Path, tally: Tally) -> None:
    """The second power loss meets what the first one left, at five moments of the run."""
    folder = tmp_path / "run"
    first = list(images(traced(folder, lambda: killing.run(folder))))
    for image in first[:: len(first) // 5]:
        image.put()
        trace = traced(folder, lambda: killing.run(folder))
        after_power_losses(tally, "run that went on", trace, killing.run, part=2)


@pytest.mark.long
def test_two_arms_go_on_after_a_power_loss(tmp_path: Path, tally: Tally) -> None:
    trace = traced(tmp_path / "runs", lambda: two_arms(tmp_path / "runs"))
    after_power_losses(tally, "two arms", trace, two_arms)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "work"), [("run", killing.run), ("two arms", two_arms)])
def test_it_goes_on_after_a_kill(tmp_path: Path, tally: Tally, kind: str, work: Work) -> None:
    folder = tmp_path / "run"
    work(folder)
    expected = bits(folder)
    for moment in kills.killed(partial(tree.put, folder, {}), partial(work, folder), 2 * EVERY - 1):
        tried(tally, f"kill: {kind}", f"moment {moment}", folder, work, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() > 60 // (2 * EVERY - 1)
