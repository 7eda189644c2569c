"""conf/ray_ranks.py on a real Ray with two nodes: what its ranks make is what one process makes.

Ray binds the machine's own address. So it runs in a network of its own, with loopback alone, and
its processes are numbered there: all end with the first of them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from residual_saes.conf.ray_ranks import main
from residual_saes.data.errors import SettingError
from tests.engines.conftest import Slow, wait_for_text
from tests.engines.slurm import having, kill, until
from tests.harvest.test_launchers import contents, environment

PRIVATE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-ec")
CLUSTER = """
ip link set lo up
node() {
    mkdir $1
    (cd $1; python -m ray.scripts.scripts start --num-cpus=2 --num-gpus=2 "${@:2}")
}
node head --head --port=6379 --node-ip-address=127.0.0.1 --temp-dir=$0 --include-dashboard=false
node other --address=127.0.0.1:6379 --node-ip-address=127.0.0.2
refused=0
python -m residual_saes.conf.ray_ranks 2 layer=999 model=tiny text=tiny store=s.zarr || refused=$?
[ $refused = 2 ] && [ ! -e s.zarr ]
echo begins
python -m residual_saes.conf.ray_ranks 4 "$@"
"""
lacking = next(
    filter(
        None,
        [
            None if importlib.util.find_spec("ray") else "no Ray: pip install ray",
            None if os.geteuid() == 0 else "a network of its own needs root",
            None if shutil.which("unshare") and shutil.which("ip") else "no unshare or no ip",
        ],
    ),
    None,
)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "ranks"),
        (("layer=5", "store=s.zarr"), "'layer=5'"),
        (("0", "store=s.zarr"), "'0'"),
        (("4", "layer=5"), "store="),
    ],
)
def test_what_is_missing_is_named(words: tuple[str, ...], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        main(*words)


@pytest.mark.long
@pytest.mark.skipif(lacking is not None, reason=str(lacking))
def test_ranks_as_tasks(tmp_path: Path, slow: Slow) -> None:
    """The nodes have different folders. A worker is killed, then one of the two nodes: Ray starts
    their ranks again. A refused setting is refused once by each rank.
    """
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:  # a socket's path is short
        marked = {"RAY_TEST": temporary, "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with (tmp_path / "log").open("wb") as log:
            ranks = subprocess.Popen(
                [*PRIVATE, CLUSTER, temporary, *slow.settings, "store=s.zarr"],
                cwd=tmp_path,
                env={**environment(), **marked, "PATH": path},
                stdout=log,
                stderr=log,
            )
        try:
            wait_for_text(tmp_path)
            worker = next(pid for pid in having(RAY_TEST=temporary) if is_rank(pid))
            kill(worker)
            stopped = "stopped by SIGTERM"  # which the rank says when its worker has gone
            until(lambda: stopped in (tmp_path / "log").read_text(), 60, stopped)
            (node,) = (pid for pid in having(RAY_TEST=temporary) if is_other_node(pid))
            kill(node)
            assert ranks.wait(300) == 0
        finally:
            ranks.kill()
            ranks.wait()
    assert contents(tmp_path / "s.zarr") == slow.whole
    told = (tmp_path / "log").read_text()
    workers = re.findall(r"rank pid=(\d+).* plan: ", told.partition("begins\n")[2])
    assert len({*workers}) >= 5  # a worker that is done may take another rank
    assert "has been marked dead" in told


def is_rank(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::rank")


def is_other_node(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"/raylet\0" in command and b"=127.0.0.2\0" in command
