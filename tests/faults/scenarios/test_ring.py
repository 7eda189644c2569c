"""A harvest into a small ring and the training that follows it, side by side: power losses and
kills of both, then both commands again.

The harvest is the product's own but for its model: its rows are those that the model gave once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.windows import Tuning
from residual_saes.data.store import ring_state
from residual_saes.data.store.claims import FileClaims
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import repair
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import FileText
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import ModelConfig, load
from residual_saes.harvest.provenance import manifest_of
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.spine_writer import write_spine
from residual_saes.train.command import command as train
from residual_saes.train.run import CHECKPOINTS
from tests.faults import flips, kills, tree
from tests.faults.child import ask, in_child, outcome
from tests.faults.disk import Disk
from tests.faults.power import Image, images
from tests.faults.report import Outcome, Tally, judged
from tests.faults.trace import Trace, traced
from tests.harvest.models import save_model
from tests.train.killing import bits

LAYER, UNITS, UNIT, D = 1, 10, 64, 32
EACH = ring_state.unit_bytes(UNIT, 16, D, 1)
RING = (1 + ring_state.GROUPS) * EACH  # the least: groups of one unit, and one held-out unit

EVERY = int(os.environ.get("FAULTS_EVERY", "4"))  # of the images and of the durable steps
FLIPS = 80  # of each file


class World:
    """A folder with a store, s.zarr, and a run of it, in a ring."""

    def __init__(self, inputs: Path, patch: pytest.MonkeyPatch) -> None:
        save_model(inputs / "model", "gemma4")
        (inputs / "text.txt").write_text("All work and no play makes nobody happy. " * 20)
        self._source = FileText(inputs / "text.txt")
        self._lm = load(ModelConfig(str(inputs / "model"), dtype="float32"))
        self.spine = inputs / "spine"
        self._write_spine(self.spine / "s.zarr")

        # The rows, computed once.
        whole = inputs / "whole"
        shutil.copytree(self.spine, whole)
        harvest(self._config(whole, max_bytes=None), self._lm, self._source)
        self.whole = Store.open(whole / "s.zarr")
        self.records = self._records(whole)
        rows = {unit: self._rows(unit) for unit in range(UNITS)}

        def compute(store: Store, lm: object, unit: int, layers: list[int], batch: int, *_: Any):
            return {layer: rows[unit].clone() for layer in layers}, batch

        patch.setattr("residual_saes.harvest.loop.compute", compute)
        patch.setattr("residual_saes.harvest.loop.choose_isolation", lambda *_: self._lm.isolation)
        patch.setattr("residual_saes.harvest.loop.check", lambda *_: None)
        patch.setattr(FileClaims, "poll_s", 0.005)
        patch.setattr(
            "residual_saes.train.stream.Reader", partial(Reader, tuning=Tuning(poll_s=0.005))
        )

    def _config(self, folder: Path, max_bytes: int | None = RING) -> HarvestConfig:
        sizes = {"tokens": UNITS * UNIT, "context": 16, "batch": 4, "unit": UNIT, "chunk": 16}
        return HarvestConfig(str(folder / "s.zarr"), (LAYER,), max_bytes=max_bytes, **sizes)

    def _write_spine(self, path: Path) -> None:
        lm = self._lm
        lm.truncate_(LAYER)
        lm.isolation = choose_isolation(lm, [LAYER], 16)
        manifest = manifest_of(self._config(path.parent), lm, self._source)
        write_spine(Store.open_or_create(path, manifest), self._source, lm.tokenizer)

    def _rows(self, unit: int) -> torch.Tensor:
        stored = torch.from_numpy(self.whole.residuals(LAYER, unit)).view(torch.bfloat16)
        rows = torch.empty_like(stored)
        rows[torch.from_numpy(self.whole.permutation(unit))] = stored
        return rows

    @staticmethod
    def _records(folder: Path) -> dict[str, bytes]:
        return tree.files(folder / "s.zarr/commits/residuals")

    def harvest(self, folder: Path) -> None:
        harvest(self._config(folder), self._lm, self._source)

    def train(self, folder: Path) -> None:
        sae = {"activation": "topk", "d_sae": 16, "k": 2, "k_aux": 4, "dead_after": 100}
        counts = {"batch": 16, "seed": 0, "data_seed": 0, "log_every": 3, "eval_every": 11}
        rules = {"drop_bos": True, "drop_outliers": True, "drop_tokens": []}
        asked = {"store": str(folder / "s.zarr"), "run": str(folder / "run"), "layer": LAYER}
        asked |= {"site": None, "start": None}
        more = {
            "tokens": None,
            "device": "cpu",
            "log": None,
            "train": {"matmul": None, "ways": None},
            "optim": {"lr": 0.01},
        }
        train(
            {**asked, **counts, **rules, **more, "eval_rows": 32, "checkpoint_every": 5, "sae": sae}
        )

    def both(self, folder: Path) -> None:
        """The two commands side by side, to their ends."""
        harvesting = in_child(partial(_dying_with_parent, partial(self.harvest, folder)))
        try:
            self.train(folder)
        except BaseException:
            os.kill(harvesting, signal.SIGKILL)
            outcome(harvesting)
            raise
        assert outcome(harvesting) == 0

    def result(self, folder: Path) -> dict[str, bytes]:
        """The run's bits, after a check that the store holds nothing wrong."""
        store = Store.open(folder / "s.zarr")
        assert self._records(folder) == self.records
        for path in (folder / "s.zarr" / f"layer_{LAYER}").glob("c.*"):
            unit = int(path.name.split(".")[1])
            right = self.whole.residuals(LAYER, unit)
            assert (store.residuals(LAYER, unit) == right).all(), unit
        assert len(list((folder / "run" / CHECKPOINTS).iterdir())) == 4
        return bits(folder / "run")

    def again(self, folder: Path) -> dict[str, bytes]:
        self.both(folder)
        return self.result(folder)


def _dying_with_parent(body: Callable[[], object]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    body()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path_factory.mktemp("inputs"), patch)


@pytest.fixture(scope="module")
def trace(world: World, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Both commands, from a store that has its tokens alone."""
    folder = tmp_path_factory.mktemp("ring") / "both"
    shutil.copytree(world.spine, folder)
    done = traced(folder, lambda: world.both(folder))
    assert done.code == 0
    return done


@pytest.fixture(scope="module")
def expected(world: World, trace: Trace) -> dict[str, bytes]:
    """The bits of an undisturbed run."""
    return world.result(trace.root)


def tried(tally: Tally, kind: str, image: Image, world: World, expected: object) -> None:
    image.put()
    answer = ask(partial(world.again, image.root))
    told = answer.refusal or answer.broken or answer.said
    tally.add(kind, judged(answer, expected), f"{image}: {told}")


def test_a_ring_goes_on_after_a_power_loss(
    world: World, trace: Trace, expected: dict[str, bytes], tally: Tally
) -> None:
    """Of both folders at once: what one has on the disk says nothing of the other."""
    for image in every(images(trace), 900):
        tried(tally, "power loss: ring and its run", image, world, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() >= 1  # none is refused


@pytest.mark.long
def test_a_ring_goes_on_after_each_power_loss(
    world: World, trace: Trace, expected: dict[str, bytes], tally: Tally
) -> None:
    for image in every(images(trace), EVERY):
        tried(tally, "power loss: ring and its run", image, world, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() >= 3


@pytest.mark.long
def test_one_power_loss_after_another(
    world: World, trace: Trace, expected: dict[str, bytes], tally: Tally
) -> None:
    """Of what the first one left, both commands again, and a loss in that."""
    for image in list(every(images(trace), 75 * EVERY)):
        image.put()
        again = traced(trace.root, partial(world.both, trace.root))
        assert again.code == 0
        for second in every(images(again), 40 * EVERY):
            tried(tally, "power loss: ring and its run, twice", second, world, expected)
    assert tally.cases(Outcome.SAME) == tally.cases() > 0


def every(found: Iterable[Image], number: int) -> Iterator[Image]:
    """Every `number`-th image, from the middle of the first part on."""
    return islice(found, number // 2, None, number)


@pytest.mark.long
@pytest.mark.parametrize("victim", ["harvest", "train"])
def test_either_is_killed_beside_the_other(
    victim: str, world: World, trace: Trace, expected: dict[str, bytes], tally: Tally
) -> None:
    """Around every durable step of one; the other goes on meanwhile."""
    folder = trace.root
    bodies = {"harvest": partial(world.harvest, folder), "train": partial(world.train, folder)}
    work = bodies.pop(victim)
    other = bodies.popitem()[1]
    beside: list[int] = []

    def begin() -> None:
        while beside:
            assert outcome(beside.pop()) == 0
        tree.put(folder, trace.before)
        beside.append(in_child(partial(_dying_with_parent, other)))

    def after() -> dict[str, bytes]:
        work()
        return {}

    for at in kills.killed(begin, work, 2 * EVERY + 1, threads=True):
        answer = ask(after)
        found = judged(answer, {})
        if found is Outcome.SAME:
            assert outcome(beside.pop()) == 0
            answer = ask(partial(world.result, folder))
            found = judged(answer, expected)
        told = answer.refusal or answer.broken or answer.said
        tally.add(f"kill: {victim} of a ring", found, f"at {at}: {told}")
        if beside:  # it waits for what does not come
            os.kill(beside[0], signal.SIGKILL)
            outcome(beside.pop())
    begin()
    os.kill(beside[0], signal.SIGKILL)
    outcome(beside[0])
    assert tally.cases(Outcome.SAME) == tally.cases() > 0


def halfway(trace: Trace) -> tree.Tree:
    """Both folders when a third of the ring is freed, and the run is at work."""
    disk = Disk(trace.before)
    for event in trace.events:
        disk.do(event)
        live = disk.live()
        state = live.get(f"s.zarr/{ring_state.KEY}")
        if isinstance(state, bytes) and b'"freed":3' in state and event.call == "sync":
            return live
    raise AssertionError("the ring never frees")


@pytest.mark.long
def test_damage_to_what_a_ring_is_freed_by(
    world: World, trace: Trace, expected: dict[str, bytes], tally: Tally
) -> None:
    """The size and the watermark, and how far a run has passed: nothing that is needed is freed."""
    live = halfway(trace)
    tree.put(trace.root, live)
    files = [name for name in live if ring_state.is_ours(name.removeprefix("s.zarr/"))]
    assert len(files) == 3  # the ring's record, its copy, and one run's

    def kind(name: str) -> str:
        return "commits/readers" if "readers" in name else name.removeprefix("s.zarr/")

    def mend() -> None:
        repair(LocalPlace(trace.root / "s.zarr"))

    again = partial(world.again, trace.root)
    flips.tried(tally, trace.root, files, again, kind, FLIPS, repair=mend)
    assert not tally.bad
