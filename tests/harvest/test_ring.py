"""Harvest and training round a small ring, as processes killed at any moment: the same bits."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from residual_saes.data.errors import Interrupted, SettingError, StoreError
from residual_saes.data.rows import split, summary
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.windows import Tuning
from residual_saes.data.store import ring_state
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.ring_state import Registration, RingState
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import FileText
from residual_saes.harvest import plan
from residual_saes.harvest.command import command
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.cost import Cost
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.provenance import manifest_of
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.spine_writer import write_spine
from residual_saes.harvest.status import status
from residual_saes.harvest.verify import verify
from residual_saes.train import checkpoint
from residual_saes.train.command import command as train
from residual_saes.train.run import CHECKPOINTS, METRICS
from tests.harvest.models import save_model

LAYERS, UNITS, UNIT, D = (1, 4), 40, 64, 32
READS: dict[int, int | list[int]] = {1: [1, 4], 4: 4}  # by the run: one is a crosscoder of both
HELD_OUT = 2
EACH = ring_state.unit_bytes(UNIT, 16, D, len(LAYERS))
SPAN = 2
RING = (
    HELD_OUT + ring_state.GROUPS * SPAN
) * EACH  # the least that holds this span: a fifth of the store
KILLS = 4
WEIGHTS, HUGE = "sae_final.pt", 10**12
CHILDREN: set[int] = set()  # that are running


class Bench:
    """A model, and a store that has its spine alone, of which each test takes a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spine = folder, folder / "spine.zarr"
        save_model(folder / "model", "gemma4")
        (folder / "text.txt").write_text("All work and no play makes nobody happy. " * 80)
        lm, store = self.model(), Store.open_or_create(str(self.spine), self.manifest())
        write_spine(store, self.source(), lm.tokenizer)

    def model(self) -> LanguageModel:
        lm = load(ModelConfig(str(self.folder / "model"), dtype="float32"))
        lm.isolation = choose_isolation(lm, [1], 16)
        return lm

    def source(self) -> FileText:
        return FileText(self.folder / "text.txt")

    def manifest(self) -> dict[str, Any]:
        return manifest_of(config(self.spine), self.model(), self.source())

    def harvest(self, store: Path, **changes: Any) -> None:
        harvest(config(store, **changes), self.model(), self.source())


def config(store: Path, **changes: Any) -> HarvestConfig:
    fixed: dict[str, Any] = {
        "tokens": UNITS * UNIT,
        "context": 16,
        "batch": 4,
        "unit": UNIT,
        "chunk": 16,
    }
    return HarvestConfig(str(store), **{"layers": LAYERS, **fixed, "max_bytes": RING, **changes})


def settings(store: Path, run: Path, layer: int = 4, **changes: Any) -> dict[str, Any]:
    """A small run whose logs, evaluations and checkpoints are out of step with one another and with
    the ring.
    """
    kind = "crosscoder" if isinstance(READS[layer], list) else "sae"
    sizes = {"d_sae": 48, "k": 4, "k_aux": 8, "dead_after": 300}
    sae = {"kind": kind, "activation": "topk", **sizes}
    optim = {"lr": 0.01, "project_every": 3}
    counts = {
        "batch": 16,
        "seed": 0,
        "data_seed": 0,
        "log_every": 5,
        "eval_every": 37,
        "eval_rows": 60,
        "checkpoint_every": 17,
    }
    asked = {
        "store": str(store),
        "run": str(run),
        "layer": READS[layer],
        "site": None,
        "start": None,
        "tokens": None,
        "device": "cpu",
        "log": None,
        "train": {"matmul": None, "ways": None},
    }
    return {
        **asked,
        **counts,
        "drop_bos": True,
        "drop_outliers": True,
        "drop_tokens": [],
        "sae": sae,
        "optim": optim,
        **changes,
    }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short waits; and processes that a failed test left running end with the test."""
    monkeypatch.setattr(
        "residual_saes.train.stream.Reader", partial(Reader, tuning=Tuning(poll_s=0.01))
    )
    yield
    for child in list(CHILDREN):
        os.kill(child, signal.SIGKILL)
        wait(child)


@pytest.fixture(scope="module")
def reference(bench: Bench) -> dict[int, dict[str, bytes]]:
    """The bits of each run, from a store that keeps all rows, in the same groups."""
    store = Path(shutil.copytree(bench.spine, bench.folder / "whole.zarr"))
    place = LocalPlace(store)
    held_out = split.parts(Store.open(place))[split.HELD_OUT]
    ring_state.write(place, RingState(HUGE, SPAN, list(LAYERS), held_out, 0))
    assert wait(start(lambda: bench.harvest(store, max_bytes=HUGE))) == 0
    for layer in LAYERS:
        folder = bench.folder / f"run{layer}"
        assert (
            wait(start(lambda layer=layer, folder=folder: train(settings(store, folder, layer))))
            == 0
        )
    assert ring_state.read(place).freed == 0
    assert len(list((store / "layer_4").glob("c.*"))) == UNITS
    return {layer: bits(bench.folder / f"run{layer}") for layer in LAYERS}


def bits(run: Path) -> dict[str, bytes]:
    """All that must be equal: the exported SAE, the last checkpoint and the metrics."""
    newest = max((run / CHECKPOINTS).glob("*.safetensors"))
    return {path.name: path.read_bytes() for path in (run / WEIGHTS, newest, run / METRICS)}


def start(body: Callable[[], object], log: Path | None = None) -> int:
    """Begin `body` in a forked process; its id."""
    child = os.fork()
    if child:
        CHILDREN.add(child)
        return child
    code = 1
    try:
        with (log or Path(os.devnull)).open("a") as sys.stderr:
            body()
        code = 0
    finally:
        os._exit(code)


def wait(child: int) -> int:
    CHILDREN.discard(child)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_disk(store: Path) -> int:
    """Bytes of all shards, of those being written too."""
    total = 0
    for layer in LAYERS:
        for entry in (
            os.scandir(store / f"layer_{layer}") if (store / f"layer_{layer}").exists() else ()
        ):
            with suppress(FileNotFoundError):  # renamed or freed meanwhile
                total += entry.stat().st_size * (entry.name != "zarr.json")
    return total


def together(
    bodies: Sequence[Callable[[], object]], store: Path, kills: int = 0, seed: int = 0
) -> tuple[int, int]:
    """Run processes side by side, each killed and started again at random moments.

    Returns:
        The peak of bytes on the disk, and the number of kills.
    """
    rng = random.Random(seed)
    peak = 0
    killed = 0
    running = {start(body): body for body in bodies}
    due, deadline = time.monotonic() + rng.uniform(0.1, 0.6), time.monotonic() + 100
    while running:
        peak = max(peak, on_disk(store))
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                CHILDREN.discard(child)
                assert os.waitstatus_to_exitcode(status) == 0
                del running[child]
        assert time.monotonic() < deadline, "they wait for each other"
        if killed < kills and running and time.monotonic() > due:
            victim = rng.choice(list(running))
            os.kill(victim, signal.SIGKILL)
            wait(victim)
            assert not list(damage(LocalPlace(store)))  # nor is what the others do meanwhile
            body = running.pop(victim)
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.1))  # the other one is alone meanwhile
            running[start(body)] = body
            killed, due = killed + 1, time.monotonic() + rng.uniform(0.1, 0.9)
        time.sleep(0.002)
    return peak, killed


def test_two_ranks_and_two_runs_round_a_small_ring(
    bench: Bench, reference: dict[int, dict[str, bytes]], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(bench.spine, tmp_path / "s.zarr"))

    def make() -> None:
        bench.harvest(store, readers=2)

    def learn(layer: int) -> None:
        train(settings(store, tmp_path / f"run{layer}", layer))

    peak, _ = together([make, make, *(lambda layer=layer: learn(layer) for layer in LAYERS)], store)
    assert RING / 2 < peak <= RING
    for layer in LAYERS:
        assert bits(tmp_path / f"run{layer}") == reference[layer]
    check_finished(bench, store)


def check_finished(bench: Bench, store: Path) -> None:
    """A finished ring is whole but for its freed shards, for status, verify and repair too."""
    done = Store.open(str(store))
    held = set(split.parts(done)[split.HELD_OUT])
    record = ring_state.read(done.place)
    there = {int(path.name.split(".")[1]) for path in (store / "layer_4").glob("c.*")}
    assert 20 < record.freed < UNITS - HELD_OUT
    assert there == held | {unit for unit in range(UNITS) if not record.is_freed(unit)}
    assert all(done.complete(layer) for layer in LAYERS) and not list(damage(done.place))
    whole = Store.open(str(bench.folder / "whole.zarr"))
    for layer in LAYERS:
        assert (
            summary.read(done, layer).moments.tobytes()
            == summary.read(whole, layer).moments.tobytes()
        )
    assert any(f" {record.freed} of 38 " in line for line in status(done.place))
    assert f" {record.freed} units " in verify(done.place, lambda _: bench.model())
    assert repair(done.place) == []


def test_killed_at_any_moment_the_bits_are_the_same(
    bench: Bench, reference: dict[int, dict[str, bytes]], tmp_path: Path
) -> None:
    killed, number = 0, 0
    while killed < KILLS:
        store, run = tmp_path / f"{number}.zarr", tmp_path / f"run{number}"
        shutil.copytree(bench.spine, store)

        def make(store: Path = store) -> None:
            bench.harvest(store)

        def learn(store: Path = store, run: Path = run) -> None:
            train(settings(store, run))

        peak, more = together([make, learn], store, KILLS - killed, seed=number)
        assert bits(run) == reference[4], number
        assert peak <= RING
        killed, number = killed + more, number + 1


def test_what_training_has_passed_is_what_its_oldest_checkpoint_has(
    bench: Bench, reference: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units that are given up always lie before the oldest whole checkpoint on the disk."""
    store, run, seen = bench.folder / "whole.zarr", tmp_path / "run", []
    copy = Path(shutil.copytree(store, tmp_path / "s.zarr"))
    advance = ring_state.advance

    def watched(place: LocalPlace, name: str, follower: Registration) -> None:
        kept = sorted(int(path.stem[5:]) for path in (run / CHECKPOINTS).glob("*.json"))
        seen.append((follower.passed, kept, (run / WEIGHTS).exists()))
        advance(place, name, follower)

    monkeypatch.setattr(ring_state, "advance", watched)
    train(settings(copy, run))
    rows = Store.open(str(copy))
    pieces = rows.ledger.pieces
    training = split.parts(rows)[split.TRAINING]
    ends = [
        sum(UNIT - int(pieces[unit]) for unit in training[:count])
        for count in range(len(training) + 1)
    ]
    assert len(seen) > 10
    *during, (everything, _, finished) = seen
    assert everything == len(training) and finished
    for passed, kept, finished in during:
        assert len(kept) == 2 and not finished
        assert (
            ends[passed] <= kept[0] * 16 < ends[passed + SPAN]
        )  # all of it, and no less than that
    assert checkpoint.oldest(run / CHECKPOINTS) == kept_last(run)


def kept_last(run: Path) -> int:
    return min(int(path.stem[5:]) for path in (run / CHECKPOINTS).glob("*.json"))


def test_with_one_checkpoint_nothing_is_given_up(tmp_path: Path) -> None:
    """If it is damaged, training begins anew."""
    assert checkpoint.oldest(tmp_path) == 0
    for step in (3, 8, 9):
        checkpoint.save(tmp_path, checkpoint.Checkpoint(step, 0, "", {}))
        assert checkpoint.oldest(tmp_path) == {3: 0, 8: 3, 9: 8}[step]


def test_a_run_that_lost_its_folder_is_refused(
    bench: Bench, reference: object, tmp_path: Path
) -> None:
    store, run = (
        Path(shutil.copytree(bench.folder / "whole.zarr", tmp_path / "s.zarr")),
        tmp_path / "run",
    )
    train(settings(store, run))
    record = ring_state.read(LocalPlace(store))
    ring_state.write(LocalPlace(store), record._replace(freed=30))
    train(settings(store, run))  # finished: it asks for nothing
    shutil.rmtree(run)
    with pytest.raises(StoreError, match=r"run .* 0 to 29 "):
        train(settings(store, run))
    with pytest.raises(SettingError, match="tokens=20000 "):
        train(settings(store, tmp_path / "other", tokens=20_000))


class Stopped:
    """A run in a ring that was stopped, whose rows are freed as far as it has passed them."""

    def __init__(self, whole: Path, folder: Path, saves: int = 12) -> None:
        self.store = Path(shutil.copytree(whole, folder / "s.zarr"))
        self.run = folder / "run"
        self.checkpoints = self.run / CHECKPOINTS
        self.ever: dict[Path, bytes] = {}  # every file of a checkpoint that there was
        save, times = checkpoint.save, iter(range(saves))

        def noted(folder: Path, moment: checkpoint.Checkpoint) -> None:
            save(folder, moment)
            self.ever.update((path, path.read_bytes()) for path in folder.iterdir())
            if next(times) == saves - 1:
                raise Interrupted(signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", noted)
            with suppress(Interrupted):
                self.go_on()
        place = LocalPlace(self.store)
        self.passed = min(run.passed for run in ring_state.registrations(place).values())
        ring_state.write(place, ring_state.read(place)._replace(freed=self.passed))
        freed = split.parts(Store.open(place))[split.TRAINING][: self.passed]
        for layer, unit in product(LAYERS, freed):
            (self.store / f"layer_{layer}/c.{unit}.0").unlink()

    def go_on(self) -> None:
        train(settings(self.store, self.run))

    def copy(self, folder: Path) -> Stopped:
        """The same, elsewhere."""
        made = Stopped.__new__(Stopped)
        made.store = Path(shutil.copytree(self.store, folder / "s.zarr"))
        made.run = Path(shutil.copytree(self.run, folder / "run"))
        made.checkpoints = made.run / CHECKPOINTS
        made.ever = {made.checkpoints / path.name: data for path, data in self.ever.items()}
        made.passed = self.passed
        return made

    def steps(self) -> list[int]:
        """Those that are kept, the newest first."""
        found = {int(path.stem[5:]) for path in self.checkpoints.glob("*.json")}
        return sorted(found, reverse=True)

    def spoil(self, step: int) -> None:
        path = self.checkpoints / f"step_{step:010d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture(scope="module")
def stopped(bench: Bench, reference: object, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    return Stopped(bench.folder / "whole.zarr", tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("wrong", ["came back", "newest", "older"])
def test_whatever_became_of_its_checkpoints_a_run_goes_on(
    wrong: str, stopped: Stopped, reference: dict[int, dict[str, bytes]], tmp_path: Path
) -> None:
    """Earlier ones that came back, whole and in halves; one of the two damaged."""
    going_on = stopped.copy(tmp_path)
    assert going_on.passed > 2 * SPAN
    newest, older = going_on.steps()
    if wrong == "came back":
        gone = sorted(path for path in going_on.ever if not path.exists())
        for path in [*gone[:4], gone[4], gone[7], *gone[-2:]]:  # two pairs, two halves, the third
            path.write_bytes(going_on.ever[path])
        (going_on.checkpoints / f"step_{newest + 1:010d}.json").write_text("{}")
    else:
        going_on.spoil(newest if wrong == "newest" else older)
    going_on.go_on()
    assert bits(going_on.run) == reference[4]
    assert len(list(going_on.checkpoints.iterdir())) == 4


def test_without_a_whole_checkpoint_what_is_freed_is_missed(
    stopped: Stopped, bench: Bench, reference: dict[int, dict[str, bytes]], tmp_path: Path
) -> None:
    """Nothing is removed then: the user may have what is damaged elsewhere."""
    (tmp_path / "late").mkdir()
    late = stopped.copy(tmp_path / "late")
    for step in late.steps():
        late.spoil(step)
    there = sorted(late.checkpoints.iterdir())
    with pytest.raises(StoreError, match=rf"run .* 0 to {late.passed - 1} .*checkpoint"):
        late.go_on()
    assert sorted(late.checkpoints.iterdir()) == there

    early = Stopped(bench.folder / "whole.zarr", tmp_path, saves=1)
    assert early.passed == 0
    early.spoil(early.steps()[0])
    early.go_on()
    assert bits(early.run) == reference[4]


def test_a_final_file_is_made_again_without_any_row(
    bench: Bench, reference: dict[int, dict[str, bytes]], tmp_path: Path
) -> None:
    finished = Stopped(bench.folder / "whole.zarr", tmp_path, saves=10**6)
    assert finished.passed == UNITS - HELD_OUT
    (finished.run / WEIGHTS).write_bytes(b"")
    finished.go_on()
    assert bits(finished.run) == reference[4]


def test_the_plan_asks_for_the_ring_alone(tmp_path: Path) -> None:
    cost = Cost(*[0] * len(fields(Cost)))
    large = {"tokens": 10**9, "unit": 65_536, "context": 1024, "chunk": 1024, "layers": (21, 27)}
    for store, limit in ((tmp_path / "a", None), (tmp_path / "b", 5 * 10**11)):
        planned = plan.plan(config(store, **large, max_bytes=limit), cost, 2560, "cpu")
        assert planned.expected_bytes > 7 * 10**12
        assert (
            planned.disk_bytes == planned.expected_bytes
            if limit is None
            else 0 <= planned.disk_bytes - limit < 4e10
        )
        assert ("500 GB" in planned.figures()["disk"]) == (limit is not None)
    with pytest.raises(SettingError, match=r"max_bytes=.* 64 .*max_bytes="):
        plan.plan(config(tmp_path, **large, max_bytes=10**10), cost, 2560, "cpu")
    with pytest.raises(SettingError, match="readers=0 "):
        config(tmp_path, readers=0)


def composed(command: str, overrides: list[str]) -> dict[str, Any]:
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        settings = OmegaConf.to_container(
            compose(config_name=command, overrides=overrides), resolve=True
        )
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def test_the_commands(tmp_path: Path) -> None:
    """As a user runs them, on the embedded model; training starts once the ring is full."""
    store, limit, log = tmp_path / "s.zarr", 480_000, tmp_path / "log"
    make = [
        "model=tiny",
        "text=tiny",
        "layer=3",
        "tokens=6e3",
        "context=64",
        "unit=512",
        "chunk=64",
        "batch=8",
    ]
    make = [*make, f"max_bytes={limit}", f"store={store}"]
    learn = [
        f"store={store}",
        f"run={tmp_path / 'run'}",
        "sae.d_sae=32",
        "sae.k=4",
        "sae.k_aux=8",
        "batch=64",
    ]
    asked = composed("harvest", make), composed("train", learn)
    harvesting, deadline = start(lambda: command(asked[0]), log), time.monotonic() + 100
    while "ring full: " not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, "it never waited"
        time.sleep(0.02)
    training = start(lambda: train(asked[1]))
    assert wait(harvesting) == wait(training) == 0
    printed = log.read_text()
    assert "480 kB" in printed and "groups of 2 units" in printed
    assert re.search("480 kB; 0 of readers=1 .*`python -m train", printed)
    assert "s.zarr is complete" in printed
    assert sum(path.stat().st_size for path in (store / "layer_3").glob("c.*")) <= limit
    assert (tmp_path / "run" / WEIGHTS).exists()
