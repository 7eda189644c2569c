"""Every command, with a call to the system that fails: one line and a code, or nothing at all.

Then the same command again, to the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.faults import tree
from tests.faults.calls import CALLS, Fault, Result, run
from tests.faults.power import EVERY
from tests.faults.report import Outcome, Tally
from tests.harvest.models import save_model
from tests.train.test_command import SMALL, make_store

_HARVEST = (
    *("harvest", "model.path=model", "model.dtype=float32", "text.path=text.jsonl", "batch=2"),
    *("text.field=text", "layer=[1,4]", "tokens=512", "context=16", "unit=64", "chunk=16"),
    *("store=h.zarr", "device=cpu"),
)
_TRAIN = (
    *("store=s.zarr", *SMALL, "layer=3", "tokens=1024", "checkpoint_every=4", "eval_every=6"),
    *("eval_rows=100", "log_every=2"),
)
_RUN = ("train", *_TRAIN, "run=r")
_ANALYZE = ("analyze", "run=r", "device=cpu")
_QUALITY = (*_ANALYZE, "study=quality")
# What is done before each command, and the command.
COMMANDS: dict[str, tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    "harvest": ((), _HARVEST),
    "plan": ((), (*_HARVEST, "action=plan")),
    "status": ((_HARVEST,), (*_HARVEST, "action=status")),
    "verify": ((_HARVEST,), (*_HARVEST, "action=verify")),
    "repair": ((_HARVEST,), (*_HARVEST, "action=repair")),
    "train": ((), _RUN),
    "sweep": ((), ("train", "-m", *_TRAIN, "seed=0,1")),
    "quality": ((_RUN,), _QUALITY),
    "catalogue": ((_RUN,), (*_ANALYZE, "study=catalogue")),
    "report": ((_RUN, _QUALITY), (*_ANALYZE, "study=report")),
    "export": ((_RUN,), ("train.export", "run=r", "to=saelens")),
    "publish": ((_RUN, _QUALITY), ("train.publish", "run=r", "repo=me/x")),
}
SPREAD = max(5 // EVERY, 1)
# What holds times, digests of such, or what was found out on the way; parts and temporaries that a
# refused command leaves, and that nobody reads.
_VOLATILE = re.compile(
    r"timings\.jsonl|digests\.json|step_\d+\.json|multirun\.yaml|\.lock|claims|verified"
    r"|/kept/|\.tmp$"
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text and a store."""
    folder = tmp_path_factory.mktemp("calls")
    save_model(folder / "model", "gemma4")
    lines = (f'{{"text": "all work and no play {n}"}}\n' for n in range(200))
    (folder / "text.jsonl").write_text("".join(lines))
    make_store(folder / "s.zarr", units=4)
    return folder


def lasting(folder: Path) -> dict[str, bytes]:
    """What a command leaves."""
    found = tree.files(folder)
    return {name: found[name] for name in found if not _VOLATILE.search(name)}


def faults(made: dict[str, int], spread: int) -> Iterator[Fault]:
    """`spread` calls of each kind that a command made, and the last one, each with an answer."""
    for call, count in made.items():
        errors = CALLS[call][1]
        numbers = {1 + (2 * n + 1) * (count - 1) // (2 * spread) for n in range(spread)} | {count}
        for index, number in enumerate(sorted(numbers)):
            yield Fault(call, number, errors[(index * 5 + number) % len(errors)])


@cache
def before(begun: Path, name: str) -> tree.Tree:
    """The folder in which a command is given."""
    folder = begun.with_name(f"{begun.name}_{name}")
    tree.put(folder, tree.read(begun))
    for command in COMMANDS[name][0]:
        assert run(folder, command, None).code == 0, command
    return tree.read(folder)


def tried(folder: Path, name: str, start: tree.Tree, fault: Fault | None) -> Result:
    tree.put(folder, start)
    return run(folder, COMMANDS[name][1], fault)


def judged(folder: Path, name: str, done: Result, expected: dict[str, bytes]) -> Outcome:
    """What came of a fault; the same command is given again if it was refused.

    A repair drops a unit that the disk does not read, and names it; the next harvest makes it.
    """
    if (done.code and not done.is_refusal) or done.has_traceback:
        return Outcome.BROKEN
    if done.code and run(folder, COMMANDS[name][1], None).code:
        return Outcome.BROKEN
    if name == "repair" and lasting(folder) != expected:
        is_mended = run(folder, _HARVEST, None).code == 0 and lasting(folder) == expected
        return Outcome.REPAIRED if is_mended else Outcome.SILENT
    if lasting(folder) != expected:
        return Outcome.SILENT
    return Outcome.REFUSED if done.code else Outcome.SAME


@pytest.mark.parametrize(
    ("name", "spread"),
    [
        pytest.param("train", 1, id="train-some"),
        *(pytest.param(name, SPREAD, id=name, marks=pytest.mark.long) for name in COMMANDS),
    ],
)
def test_a_call_that_fails_is_one_line(
    name: str,
    spread: int,
    begun: Path,
    tmp_path: Path,
    tally: Tally,
    request: pytest.FixtureRequest,
) -> None:
    start = before(begun, name)
    folder = tmp_path / "here"
    whole = tried(folder, name, start, None)
    assert whole.code == 0, whole.err
    expected = lasting(folder)
    kinds = list(faults(whole.calls, spread))
    for fault in kinds[::14] if request.node.callspec.id == "train-some" else kinds:
        done = tried(folder, name, start, fault)
        outcome = judged(folder, name, done, expected)
        other = tree.differences(expected, lasting(folder))
        told = f"{fault.call} {fault.number} {fault.error}: {done.code} {other} {done.err[-2000:]}"
        tally.add(f"failing call: {name}", outcome, told)
    assert tally.cases(Outcome.REFUSED) > 0
