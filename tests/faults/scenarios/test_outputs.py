"""Exports, a release, a sweep's pages and the run made of another library's SAE: power losses and
kills while they are written, then the same command again. The sweep's files are damaged, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from residual_saes.analyze.studies.sweep import page
from residual_saes.data.errors import StoreError
from tests.faults import flips, kills, tree, used
from tests.faults.child import ask
from tests.faults.power import EVERY, images
from tests.faults.report import Outcome, Tally, judged
from tests.faults.trace import traced
from tests.faults.tree import Tree

FLIPPED = ("sweep*", ".sweep/*")
COMMANDS = {
    "export": used.EXPORTS[0],
    "release": used.EXPORTS[1],
    "sweep": used.STUDIES[-1],
    "imported": used.EXPORTS[2],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which one has its quality, a catalogue and its exports."""
    folder = tmp_path_factory.mktemp("outputs")
    used.do(folder, *used.TRAINING, used.STUDIES[2], used.EXPORTS[0])
    for command in COMMANDS.values():  # what they import is there then
        before = tree.read(folder / "runs")
        used.do(folder, command)
        tree.put(folder / "runs", before)
    return folder


@pytest.fixture
def root(made: Path) -> Iterator[Path]:
    """The runs as they were before the test, and after it."""
    before = tree.read(made / "runs")
    yield made
    tree.put(made / "runs", before)


def again(root: Path, command: tuple[str, ...]) -> Tree:
    """Do the command once more; all that lies in the folder of runs then."""
    done = used.done(root, *command)
    if done.code in (2, 75) and "Traceback" not in done.said:
        raise StoreError(done.said)
    assert done.code == 0, done.said
    return whole(root / "runs")


def whole(runs: Path) -> Tree:
    """The files, without temporaries and parts of killed processes, which are in nobody's way."""
    left_out = re.compile(r".*\.tmp|.*/studies/kept/.*")
    return {name: data for name, data in tree.files(runs).items() if not left_out.fullmatch(name)}


def tried(tally: Tally, kind: str, told: str, root: Path, expected: Tree) -> None:
    answer = ask(partial(again, root, COMMANDS[kind.split()[-1]]))
    other = tree.differences(expected, answer.value or {})
    told = f"{told}: {answer.refusal or answer.broken or other}"
    tally.add(kind, judged(answer, expected), told)


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_goes_on_after_a_power_loss(name: str, root: Path, tally: Tally) -> None:
    runs = root / "runs"
    _begin(runs, name)
    trace = traced(runs, partial(used.do, root, COMMANDS[name]))
    assert trace.code == 0
    expected = whole(runs)
    for number, image in enumerate(images(trace)):
        if number % EVERY == 0:
            image.put()
            tried(tally, f"power loss: {name}", str(image), root, expected)
    assert tally.cases() > 0


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_goes_on_after_a_kill(name: str, root: Path, tally: Tally) -> None:
    runs = root / "runs"
    begin = partial(tree.put, runs, _begin(runs, name))
    expected = again(root, COMMANDS[name])
    for moment in kills.killed(begin, partial(_here, root, name), 2 * EVERY - 1):
        tried(tally, f"kill: {name}", f"moment {moment}", root, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() > 0


@pytest.mark.long
def test_damage_to_a_sweep(root: Path, tally: Tally) -> None:
    """The report shows the comparison that was written, or none."""
    runs = root / "runs"
    used.do(root, COMMANDS["sweep"])
    names = [name for name in tree.files(runs) if name.startswith(("sweep", ".sweep"))]
    flips.tried(tally, runs, names, partial(_shown, runs), count=80)
    assert tally.cases(Outcome.REFUSED) == tally.cases() > 80 * len(names)


def _here(root: Path, name: str) -> None:
    """Do the command in this process, which is the one to be killed."""
    assert used.run_here(*COMMANDS[name], cwd=root) == 0


def _shown(runs: Path) -> page.Shown:
    shown = page.read(runs, 5)
    if shown is None:
        raise StoreError("left out")
    return shown


def _begin(runs: Path, name: str) -> Tree:
    """Make the folder of runs what it was before a command was done for the first time."""
    left = {
        "export": ("a/export",),
        "release": ("a/publish",),
        "sweep": ("sweep", ".sweep"),
        "imported": ("imported",),
    }
    before = {
        path: node for path, node in tree.read(runs).items() if not path.startswith(left[name])
    }
    tree.put(runs, before)
    return before
