"""A real Slurm on loopback: munged, slurmctld and four slurmds, all in one folder.

Nothing outlives `Slurm.stop`, and nothing outside its folder is read or written. It needs the
packages slurm-wlm and munge, and root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = 4
# `cred_expire`: how long a job that was queued again is held, which is 120 s by default.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={work}/munge.socket,cred_expire={requeue_s}
CredType=cred/munge
ReturnToService=2
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool/%n
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
SlurmdTimeout=10
SlurmctldTimeout=20
InactiveLimit=0
MinJobAge=600
PartitionName=low Nodes=n[0-3] Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=n[0-3] PriorityTier=10 PreemptMode=OFF
"""
NODE = """
NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}\
 CPUs=16 RealMemory=1000000 Gres=gpu:2
"""


def lacking() -> str | None:
    """Why there can be no Slurm on this machine; None: there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {missing[0]}: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons start jobs as their user: needs root"


def until(reached: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for something, and fail by its name."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"after {seconds:.0f} s: not {what}"
        time.sleep(0.1)


class Slurm:
    """The cluster. `environment` is what its commands need."""

    def __init__(self, work: Path, requeue_s: int = 5) -> None:
        self.work = work
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(work / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        for folder in ("state", "spool", "log"):
            (work / folder).mkdir(parents=True)
        work.chmod(0o755)  # munged wants its socket where everybody may come
        key = work / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        control, *ports = _free_ports(1 + NODES)
        conf = CONF.format(work=work, host=host, port=control, requeue_s=requeue_s)
        for n, port in enumerate(ports):
            conf += NODE.format(n=n, host=host, port=port)
            (work / "spool" / f"n{n}").mkdir()
        (work / "slurm.conf").write_text(conf)
        for device in ("gpu0", "gpu1"):
            (work / device).touch()
        (work / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={work}/gpu[0-1]\n")

    def start(self) -> None:
        """Return once all nodes are idle."""
        socket_at = self.work / "munge.socket"
        self._daemon(
            *("munged", "munged", "--foreground", "--force", f"--socket={socket_at}"),
            *(f"--{name}={self.work}/munge.{name[:3]}" for name in ("pid-file", "seed-file")),
            *(f"--key-file={self.work}/munge.key", f"--log-file={self.work}/log/munge.log"),
        )
        until(socket_at.exists, 10, "munged")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for n in range(NODES):
            self.start_node(n)
        until(lambda: self.nodes() == ["idle"] * NODES, 60, f"all nodes idle: {self.work}/log")

    def start_node(self, n: int) -> None:
        self._daemon(f"n{n}", "slurmd", "-D", "-N", f"n{n}")

    def kill_node(self, n: int) -> None:
        """As when a machine loses its power: the daemon and all that it runs."""
        daemon = self._daemons.pop(f"n{n}")
        daemon.kill()
        daemon.wait()
        for pid in self._of_node(n):
            kill(pid)

    def stop(self) -> None:
        """End everything. Nothing of the cluster's own state is worth its waiting."""
        for pid in having(SLURM_CONF=self.environment["SLURM_CONF"]):
            kill(pid)
        for daemon in self._daemons.values():
            daemon.wait()

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            command,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def nodes(self) -> list[str]:
        """The state of each node."""
        return sorted(self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t", check=False).split())

    def submit(self, *command: str, cwd: Path, **more: str) -> int:
        """Submit a job; its number."""
        return int(self.run("sbatch", "--parsable", f"--chdir={cwd}", *command, **more))

    def fields(self, job: int) -> list[dict[str, str]]:
        """What `scontrol show job` says of a job, or of each job of an array, by field."""
        text = self.run("scontrol", "-o", "show", "job", str(job))
        words = [line.split() for line in text.splitlines()]
        return [dict(word.split("=", 1) for word in line if "=" in word) for line in words]

    def states(self, job: int) -> list[str]:
        return [fields["JobState"] for fields in self.fields(job)]

    def wait(self, job: int, seconds: float) -> list[tuple[str, str, int]]:
        """State, exit code and restarts of each job of an array, once all have ended."""
        until(lambda: {*self.states(job)} <= _ENDS, seconds, f"the end of job {job}")
        names = ("JobState", "ExitCode", "Restarts")
        ends = [[fields[name] for name in names] for fields in self.fields(job)]
        return [(state, code, int(restarts)) for state, code, restarts in ends]

    def _daemon(self, name: str, *command: str) -> None:
        with (self.work / "log" / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _of_node(self, n: int) -> set[int]:
        """The processes that a node runs: those of its jobs, and the slurmstepds above them."""
        found = set(having(SLURM_CONF=self.environment["SLURM_CONF"], SLURMD_NODENAME=f"n{n}"))
        above = {int(_stat(pid)[1]) for pid in found if _stat(pid)}
        return found | {pid for pid in above if _stat(pid)[:1] == ["(slurmstepd)"]}


_ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"}


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    """Signal a process that may have ended meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def having(**variables: str) -> Iterator[int]:
    """The processes with these variables in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended
            if wanted <= {*path.read_bytes().split(b"\0")}:
                yield int(path.parent.name)


def _stat(pid: int) -> list[str]:
    """Name and parent of a process; nothing if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().split()
    except OSError:
        return []
    return [words[1], words[3]]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
