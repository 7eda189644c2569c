"""Ranks under the engines that start them: the store of many is, byte for byte, the store of one.

Slurm itself is not here. submitit's local executor runs the same pickled jobs with the same
handlers of signals, and puts a preempted job back into the queue as its Slurm executor does.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

INSTALLED = importlib.util.find_spec("submitit") is not None
submitit = pytest.mark.skipif(
    not INSTALLED,
    reason="hydra-submitit-launcher is not installed: pip install hydra-submitit-launcher",
)
ROOT = Path(__file__).parents[2]
JOBS = Path("runs", "harvest", "jobs")


def arguments(*overrides: str, tokens: int = 3000) -> list[str]:
    return [
        "-m",
        "harvest",
        *overrides,
        "model=tiny",
        "text=tiny",
        f"tokens={tokens}",
        "context=64",
        "layer=5",
    ]


def harvest(folder: Path, *overrides: str, tokens: int = 3000) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments(*overrides, tokens=tokens)]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


def environment() -> dict[str, str]:
    """For commands that run in another folder than this checkout, and with one thread.

    The manifest of a store made on a CPU records the threads, and torchrun sets them to one.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one process makes."""
    folder = tmp_path_factory.mktemp("one")
    assert harvest(folder, "store=s.zarr").returncode == 0
    return contents(folder / "s.zarr")


def start(folder: Path, rank: int, world: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, *arguments("store=s.zarr", f"rank={rank}", f"world={world}")]
    return subprocess.Popen(command, cwd=folder, env=environment())


@pytest.mark.long
def test_by_hand(tmp_path: Path, one: dict[str, bytes]) -> None:
    """Every rank exits with 0, and only when the store is whole."""
    ranks = [start(tmp_path, rank, 3) for rank in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert contents(tmp_path / "s.zarr") == one


@pytest.mark.long
def test_the_others_make_what_a_killed_rank_leaves(tmp_path: Path, one: dict[str, bytes]) -> None:
    first, second = start(tmp_path, 0, 2), start(tmp_path, 1, 2)
    wait_until(lambda: len(list((tmp_path / "s.zarr" / "layer_5").glob("**/*"))) > 2, first)
    first.kill()
    first.wait()
    assert second.wait() == 0
    assert contents(tmp_path / "s.zarr") == one


@pytest.mark.long
def test_torchrun(tmp_path: Path, one: dict[str, bytes]) -> None:
    """Ranks come from RANK and WORLD_SIZE; `accelerate launch` sets the same two."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        *arguments("store=s.zarr"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "s.zarr") == one


@submitit
@pytest.mark.long
def test_jobs_of_submitit(tmp_path: Path, one: dict[str, bytes]) -> None:
    """Two jobs; nothing is left beside the store but their logs, in one known place."""
    done = harvest(
        tmp_path, "-m", "hydra/launcher=local", "store=s.zarr", "rank=range(0,2)", "world=2"
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "s.zarr") == one
    assert {path.name for path in tmp_path.iterdir()} == {"s.zarr", "runs"}
    assert {path.name for path in (tmp_path / JOBS).parent.iterdir()} == {"jobs", "multirun.yaml"}
    assert len(list((tmp_path / JOBS).glob("*/*_log.err"))) == 2


@submitit
@pytest.mark.long
def test_a_jobs_refusal_comes_back_as_one_line(tmp_path: Path) -> None:
    """Exit code and message are those of the command without a launcher."""
    assert harvest(tmp_path, "store=s.zarr").returncode == 0
    done = harvest(
        tmp_path, "-m", "hydra/launcher=local", "store=s.zarr", "seed=1", "rank=0", "world=1"
    )
    assert done.returncode == 2
    assert re.search("seed .* 0 .* 1 ", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


@submitit
@pytest.mark.long
def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    """As Slurm does it: SIGTERM, which submitit ignores and so must we, then its own signal."""
    many = 20_000  # enough units that the signals arrive in their midst
    assert harvest(tmp_path, "store=one.zarr", tokens=many).returncode == 0
    overrides = ("-m", "hydra/launcher=local", "store=s.zarr", "rank=0", "world=1")
    sweep = subprocess.Popen(
        [sys.executable, *arguments(*overrides, tokens=many)], cwd=tmp_path, env=environment()
    )
    wait_until(lambda: len(list((tmp_path / "s.zarr" / "layer_5").glob("**/*"))) > 2, sweep)
    task = task_of(sweep.pid)
    os.kill(task, signal.SIGTERM)
    wait_until(lambda: "Bypassing signal SIGTERM" in logged(tmp_path, "out"), sweep)
    os.kill(task, signal.SIGUSR2)
    assert sweep.wait() == 0
    assert logged(tmp_path, "out").count("Requeued job") == 1
    assert "\ngoes on " in logged(tmp_path, "err")
    assert contents(tmp_path / "s.zarr") == contents(tmp_path / "one.zarr")


@pytest.mark.skipif(INSTALLED, reason="the plugin is installed")
def test_without_the_plugin_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    for launcher in ("slurm", "local"):
        done = harvest(
            tmp_path, "-m", f"hydra/launcher={launcher}", "store=s.zarr", "rank=0,1", "world=2"
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "pip install hydra-submitit-launcher" in done.stderr


def logged(folder: Path, stream: str) -> str:
    """What the one job there wrote."""
    (log,) = (folder / JOBS).glob(f"*/*_log.{stream}")
    return log.read_text()


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not reached():
        assert process.poll() is None, "it ended too soon"
        time.sleep(0.01)


def task_of(sweep: int) -> int:
    """The process that harvests: the launcher's child controls it."""
    (controller,) = children(sweep)
    (task,) = children(controller)
    return task


def children(pid: int) -> list[int]:
    files = Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]
