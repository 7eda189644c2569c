"""A run that is started again: power losses while it goes on, then the same command once more."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from residual_saes.data.errors import Interrupted
from residual_saes.train import checkpoint, sae_file
from residual_saes.train.run import CHECKPOINTS
from tests.faults import tree
from tests.faults.child import ask, in_child, outcome
from tests.faults.power import Image, images
from tests.faults.report import Outcome, Tally, judged
from tests.faults.trace import Trace, traced
from tests.train import killing


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def newest(folder: Path) -> Path:
    return max((folder / CHECKPOINTS).glob("*.safetensors"))


def stop(folder: Path) -> None:
    """Step 10 of 20, with checkpoints of steps 8 and 10."""

    def signalled(at: int, _: object) -> None:
        if at == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(Interrupted):
        killing.run(folder, killing.planted(spoil=signalled))


def third(folder: Path) -> None:
    """Stopped, and the checkpoint of step 4 came back."""
    gone: dict[Path, bytes] = {}
    keep = checkpoint.keep

    def noted(checkpoints: Path, steps: list[int]) -> None:
        gone.update((path, path.read_bytes()) for path in checkpoints.glob("step_0000000004.*"))
        keep(checkpoints, steps)

    checkpoint.keep = noted  # type: ignore[assignment]  # in a child
    stop(folder)
    for path, content in gone.items():
        path.write_bytes(content)


def damaged(folder: Path) -> None:
    """Stopped, and the newest checkpoint is damaged: the run goes back to step 8."""
    stop(folder)
    spoil(newest(folder))


def unfinished(folder: Path) -> None:
    """All steps done, and sae_final.pt damaged."""
    killing.run(folder)
    spoil(folder / sae_file.FILE)


def finished(folder: Path) -> None:
    killing.run(folder)


def result(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """What the run's command leaves: its bits, and the names of all files."""
    killing.run(folder)
    return killing.bits(folder), list(tree.files(folder))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> object:
    return result(tmp_path_factory.mktemp("undisturbed") / "run")


def going_on(folder: Path, before: Callable[[Path], None]) -> Trace:
    """The second start of a run."""
    assert outcome(in_child(partial(before, folder))) == 0
    done = traced(folder, lambda: killing.run(folder))
    assert done.code == 0
    return done


def tried(tally: Tally, kind: str, image: Image, expected: object) -> None:
    image.put()
    answer = ask(partial(result, image.root))
    told = answer.refusal or answer.broken or answer.said
    tally.add(f"power loss: {kind}", judged(answer, expected), f"{image}: {told}")


def every(trace: Trace, number: int) -> Iterator[Image]:
    """Every `number`-th image, from the middle of the first part on."""
    return islice(images(trace), number // 2, None, number)


def test_some_power_losses_of_a_run_that_goes_on(
    expected: object, tally: Tally, tmp_path: Path
) -> None:
    for image in every(going_on(tmp_path / "run", damaged), 60):
        tried(tally, "run that goes on", image, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() >= 2


@pytest.mark.long
@pytest.mark.parametrize("before", [stop, third, damaged, unfinished, finished])
def test_power_losses_of_a_run_that_goes_on(
    before: Callable[[Path], None], expected: object, tally: Tally, tmp_path: Path
) -> None:
    for image in every(going_on(tmp_path / "run", before), 1):
        tried(tally, f"run that goes on, {before.__name__}", image, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() >= 1  # a finished one writes nothing


@pytest.mark.long
def test_one_power_loss_after_another(expected: object, tally: Tally, tmp_path: Path) -> None:
    """Of what the first one left, another start, and a loss in that."""
    folder = tmp_path / "run"
    first = traced(folder, lambda: killing.run(folder))
    for image in list(every(first, 13)):
        again = going_on(folder, lambda _, image=image: image.put())
        for second in every(again, 13):
            tried(tally, "run that goes on, twice", second, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() > 50
