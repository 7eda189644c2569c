"""The ranks of a harvest as tasks of a Ray cluster, a GPU each. On a machine of the cluster:

python -m residual_saes.conf.ray_ranks 16 layer=21 tokens=1e9 store=/shared/activations/e4b.zarr
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

from residual_saes.conf.command import run_command
from residual_saes.conf.names import absolute, require_no_secret
from residual_saes.data import child, secrets
from residual_saes.data.errors import AGAIN, SettingError

# What ranks get from the environment of this command.
PASSED_ON = ("AWS_", "AZURE_", "GOOGLE_", "HF_", "OMP_", "PYTHONPATH")
STARTS = 1000  # of a rank
PAUSE_S = 10  # between them


def rank(number: int, world: int, settings: list[str], keys: dict[str, str]) -> int:
    """Run one rank to its end; its exit code.

    Args:
        keys: variables that hold secrets. A task's arguments are in no log, and its environment is.
    """
    ranks = (f"rank={number}", f"world={world}")
    command = child.command("residual_saes.harvest", *ranks, *settings)
    prctl = ctypes.CDLL(None).prctl
    for _ in range(STARTS):
        # 1 is PR_SET_PDEATHSIG: a rank ends with its worker, for Ray starts both anew.
        ended = subprocess.run(
            command,
            env={**child.environment(), **keys},
            preexec_fn=lambda: prctl(1, signal.SIGTERM),
            check=False,
        )
        code = ended.returncode if ended.returncode >= 0 else 128 - ended.returncode
        if code != AGAIN and code < 128:  # neither "again" nor a signal
            break
        time.sleep(PAUSE_S)
    return code


def main(world: str = "", *settings: str) -> None:
    """Run all ranks, and exit with the highest of their codes.

    Raises:
        SettingError: the number of ranks or the store is missing, or Ray is.
    """
    if not world.isdecimal() or int(world) < 1:
        raise SettingError(f"'{world}' is no number of ranks; give it first, then the settings")
    require_no_secret(settings)
    if not any(setting.startswith("store=") for setting in settings):
        raise SettingError("store= is missing; give a folder that all machines share, or a bucket")
    try:
        import ray
    except ImportError as error:
        raise SettingError("Ray is missing: pip install ray") from error

    keys: dict[str, str] = {}
    passed_on: dict[str, str] = {}
    for name, value in os.environ.items():
        if name.startswith(PASSED_ON):
            is_key = secrets.is_name(name) or secrets.kind_in(value)
            (keys if is_key else passed_on)[name] = value
    ray.init(address="auto", runtime_env={"env_vars": passed_on})
    # Each worker has a folder of its own.
    named = [setting.partition("=") for setting in settings]
    there = [name + sign + absolute(name, value, os.getcwd()) for name, sign, value in named]
    # If a node is lost, Ray starts its ranks on another one.
    task = ray.remote(num_gpus=1, num_cpus=1, max_retries=-1)(rank)
    started = [task.remote(number, int(world), there, keys) for number in range(int(world))]
    codes = ray.get(started)
    for number, code in enumerate(codes):
        if code:
            print(f"error: rank {number} ended with {code}", file=sys.stderr)
    sys.exit(max(codes))


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
