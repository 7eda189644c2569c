"""Killed anywhere and started again, a harvest ends in the very same bytes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from residual_saes.data.errors import StoreError
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import FileText
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.provenance import manifest_of
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.spine_writer import write_spine
from tests.faults import kills
from tests.faults.child import in_child, outcome
from tests.faults.tree import files as tree
from tests.forked import start_forked
from tests.harvest.models import save_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    save_model(folder / "model", "gemma4")
    (folder / "text.txt").write_text("All work and no play makes nobody happy. " * 40)
    return folder


def open_model(root: Path) -> LanguageModel:
    return load(ModelConfig(str(root / "model"), dtype="float32"))


def config(store: Path, tokens: int = 128) -> HarvestConfig:
    return HarvestConfig(str(store), (1, 4), tokens=tokens, context=16, batch=2, unit=64, chunk=16)


def two_sites(store: Path) -> HarvestConfig:
    """A small store of two sites of a layer."""
    return replace(config(store), layers=(4,), sites=("resid_post", "mlp_out"))


def make_spine(target: HarvestConfig, lm: LanguageModel, source: FileText) -> Store:
    """The first half of a harvest, in this process."""
    lm.isolation = choose_isolation(lm, target.layers, target.context)
    store = Store.open_or_create(target.store, manifest_of(target, lm, source))
    with closing(store.place.claims()):  # as in a harvest, what a killed one left half written goes
        write_spine(store, source, lm.tokenizer)
    return store


@pytest.fixture(scope="module")
def reference(root: Path) -> dict[int, dict[str, bytes]]:
    stores = {}
    for tokens in (128, 1024):
        path = root / f"{tokens}.zarr"
        make_spine(
            config(root / f"{tokens}.spine", tokens), open_model(root), FileText(root / "text.txt")
        )
        target = two_sites(path) if tokens == 128 else config(path, tokens)
        harvest(target, open_model(root), FileText(root / "text.txt"))
        stores[tokens] = tree(path)
    return stores


def test_a_kill_at_every_15th_moment_of_the_spine_changes_no_byte(
    root: Path, tmp_path: Path, reference: object
) -> None:
    assert kill_spines(root, tmp_path, stride=15) > 80  # they were really met


@pytest.mark.long
def test_a_kill_at_every_moment_of_the_spine_changes_no_byte(
    root: Path, tmp_path: Path, reference: object
) -> None:
    assert kill_spines(root, tmp_path, stride=1) > 80


def kill_spines(root: Path, folder: Path, stride: int) -> int:
    """Kill what makes a spine."""
    lm, source = open_model(root), FileText(root / "text.txt")
    return kill_by_the_step(
        lambda number: config(folder / f"{number}.zarr"),
        lambda target: make_spine(target, lm, source),
        tree(root / "128.spine"),
        stride,
    )


def test_a_kill_at_every_51st_moment_of_the_commit_changes_no_byte(
    root: Path, tmp_path: Path, reference: dict[int, dict[str, bytes]]
) -> None:
    assert kill_commits(root, tmp_path, reference[128], stride=51) > 130


@pytest.mark.long
def test_a_kill_at_every_moment_of_the_commit_changes_no_byte(
    root: Path, tmp_path: Path, reference: dict[int, dict[str, bytes]]
) -> None:
    assert kill_commits(root, tmp_path, reference[128], stride=1) > 130


def kill_commits(root: Path, folder: Path, expected: dict[str, bytes], stride: int) -> int:
    """Kill harvests that begin with their spine."""
    lm, source = open_model(root), FileText(root / "text.txt")
    return kill_by_the_step(
        lambda number: two_sites(shutil.copytree(root / "128.spine", folder / f"{number}.zarr")),
        lambda target: harvest(target, lm, source),
        expected,
        stride,
    )


def kill_by_the_step(
    begin: Callable[[int], HarvestConfig],
    act: Callable[[HarvestConfig], object],
    expected: dict[str, bytes],
    stride: int = 1,
) -> int:
    """Kill `act` at every `stride`-th moment around a durable call; the moments there are.

    A harvest of two units has 71 to 81 calls, as its threads overlap. So the loop ends at a moment
    that three runs in a row do not reach.
    """
    at = unharmed = 0
    while unharmed < (3 if stride == 1 else 1):
        target = begin(at)
        work = partial(act, target)
        code = outcome(in_child(kills.armed(at, work)))
        unharmed = 0 if code == -signal.SIGKILL else unharmed + 1
        require_no_alarm(Path(target.store))
        assert outcome(in_child(work)) == 0
        assert tree(Path(target.store)) == expected, f"killed at moment {at}"
        at += stride
    return at


def require_no_alarm(path: Path) -> None:
    """What a kill leaves is no damage, for verify."""
    if (path / "commits/manifest.json").exists():
        assert not list(damage(LocalPlace(path)))


@pytest.mark.long
def test_a_kill_at_every_step_of_another_layers_harvest_changes_no_byte(
    root: Path, tmp_path: Path, reference: dict[int, dict[str, bytes]]
) -> None:
    """Beside a layer that is whole. The bytes are those of both, harvested one after the other."""
    lm, source = open_model(root), FileText(root / "text.txt")
    harvest(replace(config(root / "first.zarr"), layers=(1,)), open_model(root), source)
    harvest(two_sites(shutil.copytree(root / "first.zarr", root / "both.zarr")), lm, source)
    steps = kill_by_the_step(
        lambda number: two_sites(shutil.copytree(root / "first.zarr", tmp_path / f"{number}.zarr")),
        lambda target: harvest(target, lm, source),
        tree(root / "both.zarr"),
    )
    assert steps > 60


def test_kills_at_random_moments_change_no_byte(
    root: Path, tmp_path: Path, reference: dict[int, dict[str, bytes]]
) -> None:
    kill_by_the_clock(root, tmp_path, reference[1024], kills=3)


@pytest.mark.long
def test_many_kills_at_random_moments_change_no_byte(
    root: Path, tmp_path: Path, reference: dict[int, dict[str, bytes]]
) -> None:
    for number in range(20):
        kill_by_the_clock(root, tmp_path / str(number), reference[1024], kills=25, seed=number)


def kill_by_the_clock(
    root: Path, folder: Path, expected: dict[str, bytes], kills: int, seed: int = 0
) -> None:
    """Kill harvests of one store after another's random delay until `kills` were killed at work."""
    lm, source = open_model(root), FileText(root / "text.txt")
    began = time.monotonic()
    timed = config(shutil.copytree(root / "1024.spine", folder / "clock.zarr"), 1024)
    assert outcome(in_child(lambda: harvest(timed, lm, source))) == 0
    whole = time.monotonic() - began
    rng, killed, number = random.Random(seed), 0, 0
    while killed < kills:
        target = config(shutil.copytree(root / "1024.spine", folder / f"{number}.zarr"), 1024)
        number += 1
        finished, attempt = False, 0
        while not finished:
            attempt += 1
            delay = (
                rng.uniform(0.02, 0.5 + 0.05 * attempt) * whole
            )  # grows, so that a slower machine comes to an end

            def dying_run(delay: float = delay, target: HarvestConfig = target) -> None:
                signal.signal(
                    signal.SIGALRM, signal.SIG_DFL
                )  # its default action ends the process there and then
                signal.setitimer(signal.ITIMER_REAL, delay)
                harvest(target, lm, source)

            finished = outcome(in_child(dying_run)) != -signal.SIGALRM
            require_no_alarm(Path(target.store))
            killed += not finished
        assert tree(Path(target.store)) == expected


def test_the_canary_refuses_to_go_on_with_other_bits(
    root: Path, tmp_path: Path, reference: dict[int, dict[str, bytes]]
) -> None:
    source, target = (
        FileText(root / "text.txt"),
        two_sites(shutil.copytree(root / "128.zarr", tmp_path / "s.zarr")),
    )
    (tmp_path / "s.zarr" / "commits" / "residuals" / "00000001.4.mlp_out_4.json").unlink()
    changed = open_model(root)
    changed.blocks[0].mlp.down_proj.weight.data.mul_(
        1.5
    )  # its files, and so its identity, stay the same
    with pytest.raises(StoreError, match="unit 0 of mlp_out of layer 4 "):
        harvest(target, changed, source)
    assert Store.open(target.store).missing(target.points) == {1: target.points}


def test_damage_is_repaired_to_the_same_bytes(
    root: Path, tmp_path: Path, reference: dict[int, dict[str, bytes]]
) -> None:
    path = shutil.copytree(root / "1024.zarr", tmp_path / "s.zarr")
    source, target = FileText(root / "text.txt"), config(path, 1024)
    for name in (
        "tokens/c.3.0",
        "layer_4/c.7.0",
        "norm_1/c.9",
        "token_index/c.11",
        "summary_1/c.0.0.0.0",
    ):
        (path / name).write_bytes((path / name).read_bytes()[:-1])
    assert len(repair(LocalPlace(path))) == 5
    (path / "commits" / "spine" / "00000005.json").unlink()  # lost, not damaged
    assert not Store.open(path).complete(1)
    harvest(target, open_model(root), source)
    assert tree(path) == reference[1024]
    (path / "commits" / "spine" / "00000015.json").unlink()  # with the text's end known
    assert not Store.open(path).complete(1)
    harvest(target, open_model(root), source)
    assert tree(path) == reference[1024]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_at_a_boundary_and_the_command_goes_on(
    root: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    command = ["-m", "harvest", f"model.path={root / 'model'}", "model.dtype=float32", "text=tiny"]
    command += [
        "layer=1",
        "tokens=40000",
        "context=16",
        "unit=64",
        "batch=1",
        f"store={tmp_path / 's.zarr'}",
    ]
    said = tmp_path / "stderr"
    process = start_forked(*command, files=[tmp_path / "stdout", said])
    deadline = time.monotonic() + 60
    while (
        not (said.exists() and re.search(r"unit +[1-9]", said.read_text()))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.kill(process, signum)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == code, said.read_text()
    assert "the same command again goes on" in said.read_text()
    done = Store.open(tmp_path / "s.zarr")
    assert 0 < len(done.missing([1])) < done.units
    assert not list((tmp_path / "s.zarr").rglob("*.tmp"))
