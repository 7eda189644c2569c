"""The ranks of a harvest as tasks of a Ray cluster, a GPU each. On a machine of the cluster:

python -m conf.ray_ranks 16 layer=21 tokens=1e9 store=/shared/activations/e4b.zarr
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import ray

from conf.names import absolute

# What ranks get from the environment of this command.
PASSED_ON = ("AWS_", "AZURE_", "GOOGLE_", "HF_", "OMP_", "PYTHONPATH")
PAUSE_S = 10  # before a rank that goes on is started again


def rank(number: int, world: int, settings: list[str]) -> int:
    """Run one rank to its end; its exit code."""
    command = [sys.executable, "-m", "harvest", f"rank={number}", f"world={world}", *settings]
    prctl = ctypes.CDLL(None).prctl
    while True:
        # 1 is PR_SET_PDEATHSIG: a rank ends with its worker, for Ray starts both anew.
        ended = subprocess.run(command, preexec_fn=lambda: prctl(1, signal.SIGTERM), check=False)
        code = ended.returncode if ended.returncode >= 0 else 128 - ended.returncode
        if code != 75 and code < 128:  # neither "again" nor a signal
            return code
        time.sleep(PAUSE_S)


def main(world: int, settings: list[str]) -> int:
    """Run all ranks; 0, or the highest of their exit codes."""
    if not any(setting.startswith("store=") for setting in settings):
        sys.exit("error: store= is missing; give a folder that all machines share, or a bucket")
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    ray.init(address="auto", runtime_env={"env_vars": passed_on})
    # Each worker has a folder of its own.
    named = [setting.partition("=") for setting in settings]
    settings = [name + sign + absolute(name, value, os.getcwd()) for name, sign, value in named]
    # If a node is lost, Ray starts its ranks on another one.
    task = ray.remote(num_gpus=1, num_cpus=1, max_retries=-1)(rank)
    codes: list[int] = ray.get([task.remote(number, world, settings) for number in range(world)])
    for number, code in enumerate(codes):
        if code:
            print(f"error: rank {number} ended with {code}", file=sys.stderr)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
