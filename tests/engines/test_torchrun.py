"""torchrun, whose ranks are killed at random: it starts them again, and loses nothing."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engines.conftest import Slow
from tests.engines.slurm import having, kill, until
from tests.harvest.test_launchers import contents, environment

KILLS = 5


@pytest.mark.long
def test_torchrun_starts_its_ranks_again(tmp_path: Path, slow: Slow) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3"]
    harvest = ["-m", "harvest", *slow.settings, "store=s.zarr"]
    mark = {"TORCHRUN_TEST": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        engine = subprocess.Popen(
            [*command, f"--max-restarts={KILLS}", *harvest],
            cwd=tmp_path,
            env={**environment(), **mark},
            stdout=log,
            stderr=log,
        )
    rng = random.Random(0)
    killed: set[int] = set()
    for _ in range(KILLS):
        rank = str(rng.randrange(3))
        until(lambda r=rank, old=killed: {*having(**mark, RANK=r)} - old, 60, "started again")
        time.sleep(rng.uniform(0, 12))  # while it loads, reads or computes
        for pid in having(**mark, RANK=rank):
            kill(pid)
            killed.add(pid)
        if engine.poll() is not None:
            break
    assert engine.wait(300) == 0, (tmp_path / "log").read_text()
    assert contents(tmp_path / "s.zarr") == slow.whole
