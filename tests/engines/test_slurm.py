"""conf/slurm.sbatch on a real Slurm: what an array makes is, byte for byte, what one process makes.

tests/engines/slurm.py starts the cluster. Queued again, a job is held for 5 s here.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.conftest import Slow, wait_for_text
from tests.engines.slurm import Slurm, having, kill, until
from tests.harvest.test_launchers import contents, harvest
from tests.test_house import ROOT

BATCH = str(ROOT / "conf" / "slurm.sbatch")
SHORT = ("model=tiny", "text=tiny", "tokens=3000", "context=64", "layer=5")  # 24 units
DONE = ("COMPLETED", "0:0", 0)
AGAIN = ("COMPLETED", "0:0", 1)  # after it was queued again


def logs(folder: Path) -> str:
    """What all ranks wrote."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("harvest-*.log")))


def submit(slurm: Slurm, folder: Path, ranks: int, *words: str) -> int:
    """Submit an array that makes s.zarr there; options of sbatch begin with --."""
    options = [word for word in words if word.startswith("--")]
    settings = [word for word in words if not word.startswith("--")]
    array = f"--array=0-{ranks - 1}"
    return slurm.submit(array, *options, BATCH, *settings, "store=s.zarr", cwd=folder)


def require(folder: Path, whole: dict[str, bytes]) -> None:
    """Require that the store there is the whole one, and that no rank told of a failure."""
    assert contents(folder / "s.zarr") == whole
    told = logs(folder)
    assert "Traceback" not in told and "\nerror: " not in told, told


def test_which_exit_codes_queue_a_job_again(slurm: Slurm, tmp_path: Path) -> None:
    """75 and signals do, once each here; 0, 1 and 2 do not. The ranks are a stand-in."""
    command = tmp_path / "bin" / "python"
    command.parent.mkdir()
    command.write_text(
        '#!/bin/bash\necho "ran: $*"\ncodes=(0 1 2 75 137 143)\n'
        '[ -n "$SLURM_RESTART_COUNT" ] || exit ${codes[$SLURM_ARRAY_TASK_ID]}\n'
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    slurm.environment["PATH"] = f"{command.parent}{os.pathsep}{slurm.environment['PATH']}"
    ends = slurm.wait(submit(slurm, tmp_path, 6, "text.path=a b"), 120)
    assert sorted(ends) == [DONE, AGAIN, AGAIN, AGAIN, ("FAILED", "1:0", 0), ("FAILED", "2:0", 0)]
    assert logs(tmp_path).count("ran: -m residual_saes.harvest text.path=a b store=s.zarr\n") == 9


# -- loops of minutes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one process makes of SHORT."""
    folder = tmp_path_factory.mktemp("one")
    assert harvest(folder, "store=s.zarr").returncode == 0
    return contents(folder / "s.zarr")


@pytest.mark.long
def test_arrays_that_begin_a_store(slurm: Slurm, tmp_path: Path, short: dict[str, bytes]) -> None:
    """Four ranks, 20 times: each ends with 0."""
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert slurm.wait(submit(slurm, folder, 4, *SHORT), 300) == [DONE] * 4, logs(folder)
        require(folder, short)


@pytest.mark.long
def test_several_ranks_a_job(slurm: Slurm, tmp_path: Path, short: dict[str, bytes]) -> None:
    """Each knows its number among all."""
    assert slurm.wait(submit(slurm, tmp_path, 2, "--ntasks-per-node=2", *SHORT), 300) == [DONE] * 2
    require(tmp_path, short)
    assert sorted(re.findall(r"^rank (\d) of 4 by ", logs(tmp_path), re.MULTILINE)) == [*"0123"]


@pytest.mark.long
def test_preempted_while_text_is_read(slurm: Slurm, tmp_path: Path, slow: Slow) -> None:
    """All four are queued again, and none tells of a failure."""
    job = submit(slurm, tmp_path, 4, *slow.settings)
    wait_for_text(tmp_path)
    other = slurm.submit("-p", "high", "-N4", "--exclusive", "--wrap", "sleep 1", cwd=slurm.work)
    assert slurm.wait(other, 60) == [DONE]
    assert slurm.wait(job, 300) == [AGAIN] * 4
    assert logs(tmp_path).count("stopped by SIGTERM") == 4
    require(tmp_path, slow.whole)


@pytest.mark.long
def test_a_node_is_lost(slurm: Slurm, tmp_path: Path, slow: Slow) -> None:
    """Its two jobs are queued again; the others do not stop."""
    job = submit(slurm, tmp_path, 4, *slow.settings)
    wait_for_text(tmp_path)
    assert sorted(fields["NodeList"] for fields in slurm.fields(job)) == ["n0", "n0", "n1", "n1"]
    slurm.kill_node(0)
    assert sorted(slurm.wait(job, 300)) == [DONE, DONE, AGAIN, AGAIN]
    require(tmp_path, slow.whole)


@pytest.mark.long
def test_the_time_is_over(slurm: Slurm, tmp_path: Path, slow: Slow) -> None:
    """Slurm announces it, and the script queues its job again.

    A job's time is a minute at least, and Slurm looks every 30 s. The ranks stand still until then.
    """
    job = submit(slurm, tmp_path, 2, "--signal=USR1@60", *slow.settings)
    wait_for_text(tmp_path)
    step = [*having(SLURM_CONF=slurm.environment["SLURM_CONF"], SLURM_STEP_ID="0")]
    for pid in step:
        kill(pid, signal.SIGSTOP)
    ranks = [pid for pid in step if b"-m\0harvest\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    assert len(ranks) == 2 < len(step)  # the text's reader is another process
    until(lambda: all(map(is_signalled, ranks)), 60, "the signal")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    for pid in step:
        kill(pid, signal.SIGCONT)
    assert slurm.wait(job, 300) == [AGAIN] * 2
    assert logs(tmp_path).count("stopped by SIGUSR1") == 2
    require(tmp_path, slow.whole)


def is_signalled(pid: int) -> bool:
    """Whether a signal awaits a process that stands still. Slurm may let it go on by itself."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    return int(re.findall(r"ShdPnd:\s*(\w+)", status)[0], 16) != 0


@pytest.mark.long
def test_cancelled(slurm: Slurm, tmp_path: Path, slow: Slow) -> None:
    """Each rank ends with 143, and the same command again goes on."""
    job = submit(slurm, tmp_path, 4, *slow.settings)
    wait_for_text(tmp_path)
    slurm.run("scancel", str(job))
    assert slurm.wait(job, 60) == [("CANCELLED", "143:0", 0)] * 4
    assert slurm.wait(submit(slurm, tmp_path, 4, *slow.settings), 300) == [DONE] * 4
    require(tmp_path, slow.whole)


@pytest.mark.long
def test_a_rank_is_killed(slurm: Slurm, tmp_path: Path, slow: Slow) -> None:
    """The script queues its job again; the others go on meanwhile."""
    job = submit(slurm, tmp_path, 2, *slow.settings)
    wait_for_text(tmp_path)
    conf = slurm.environment["SLURM_CONF"]
    for pid in having(SLURM_CONF=conf, SLURM_STEP_ID="0", SLURM_ARRAY_TASK_ID="1"):
        kill(pid)
    assert sorted(slurm.wait(job, 300)) == [DONE, AGAIN]
    require(tmp_path, slow.whole)


@pytest.mark.long
def test_jobs_of_submitit(slurm: Slurm, tmp_path: Path, short: dict[str, bytes]) -> None:
    """Hydra's launcher for Slurm: the command waits for its array of two jobs."""
    pytest.importorskip("submitit", reason="no submitit: pip install hydra-submitit-launcher")
    launcher = ("-m", "hydra/launcher=slurm", "hydra.launcher.partition=low")
    ranks = ("rank=range(0,2)", "world=2", *SHORT, "store=s.zarr")
    done = subprocess.run(
        [sys.executable, "-m", "harvest", *launcher, *ranks],
        cwd=tmp_path,
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "runs/harvest/jobs").glob("*/*_log.err")]) == 2
    require(tmp_path, short)


@pytest.mark.long
def test_a_refused_setting(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, 2, *SHORT, "layer=999")
    assert slurm.wait(job, 120) == [("FAILED", "2:0", 0)] * 2
    assert not (tmp_path / "s.zarr").exists()
