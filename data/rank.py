"""Where this process stands among those that an engine has started.

Engines nest: an array of jobs, of tasks, of processes. Each level numbers its own from 0, and the
rank counts through all of them:

    explicit    rank= and world=
    processes   RANK, WORLD_SIZE, LOCAL_RANK: torchrun, accelerate, Kubeflow
    tasks       Open MPI, PMI, Slurm's steps, SkyPilot's nodes
    jobs        Slurm's arrays, Kubernetes' indexed jobs

Rank and world decide no byte, and which units are whose is decided by claims. They say where a rank
begins its walk over the units, and what the plan's hours are divided by. So what engines leave out
is guessed, and nothing but a value that is no number is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from residual_saes.data.errors import SettingError


@dataclass(frozen=True)
class Rank:
    """One process of several."""

    rank: int = 0  # from 0 to world - 1
    world: int = 1  # processes
    source: str = ""  # the variables that said so, such as "SLURM_PROCID=1 of 2"

    def under(self, outer: Rank) -> Rank:
        """The rank in all, where each of the `outer` processes has a level like this one."""
        return Rank(
            outer.rank * self.world + self.rank,
            outer.world * self.world,
            " and ".join(filter(None, (outer.source, self.source))),
        )


class _Level(NamedTuple):
    """The variables of one engine."""

    rank: str
    world: tuple[str, ...]  # the first that is set counts
    local: str = ""


_PROCESSES = _Level("RANK", ("WORLD_SIZE",), "LOCAL_RANK")
_SLURM = _Level("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID")
_TASKS = (
    _Level("OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_LOCAL_RANK"),
    _Level("PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID"),
    _SLURM,
    _Level("SKYPILOT_NODE_RANK", ("SKYPILOT_NUM_NODES",)),
)
_ARRAY = _Level("SLURM_ARRAY_TASK_ID", ("SLURM_ARRAY_TASK_COUNT",))


def here(
    rank: int | None = None,
    world: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Rank:
    """Where this process stands among those that make one store.

    Args:
        rank, world: as set by hand; they win over what an engine says.

    Raises:
        SettingError: a variable that counts is no whole number from 0 on.
    """
    if rank is not None and world is not None:
        return Rank(rank, world)
    found = _read(_PROCESSES, environment)
    # One node's agent, as torchrun is without --nnodes, knows nothing of the others.
    if found is None or environment.get("GROUP_WORLD_SIZE") == "1":
        levels = [*_outer(environment)] if found is None else [*_outer(environment), found]
        found = Rank()
        for level in levels:
            found = level.under(found)
    if rank is not None:
        least = max(found.world, _number("WORLD_SIZE", environment) or 1)
        return Rank(rank, max(least, rank + 1))
    if world is not None:
        return replace(found, world=max(world, found.rank + 1))
    return found


def processes(environment: Mapping[str, str] = os.environ) -> Rank:
    """Where this process stands in a group that trains together.

    Only torchrun, accelerate and Kubeflow start such a group, by RANK and WORLD_SIZE. Slurm's
    variables are no sign of one: a sweep's arms are jobs of an array too, each for itself.
    """
    return _read(_PROCESSES, environment) or Rank()


def local_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of this process on its machine; None: nothing says so."""
    for level in (_PROCESSES, *_TASKS):
        number = _number(level.local, environment)
        if number is not None:
            return number
    return None


def _outer(environment: Mapping[str, str]) -> Iterator[Rank]:
    """The levels around this machine's processes, from the outermost on."""
    if array := _read(_ARRAY, environment):
        first = _number("SLURM_ARRAY_TASK_MIN", environment) or 0
        step = _number("SLURM_ARRAY_TASK_STEP", environment) or 1
        # An array such as 1,5,7 has numbers beyond its count.
        yield replace(array, rank=max(0, array.rank - first) // step % array.world)
    elif job := _read(_kubernetes(environment), environment):
        yield job
    for level in _TASKS:
        if level is _SLURM and _in_batch_shell(environment):
            continue
        if task := _read(level, environment):
            yield task
            return


def _kubernetes(environment: Mapping[str, str]) -> _Level:
    """An indexed job, which does not say how many there are. A WORLD_SIZE without a RANK may."""
    return _Level("JOB_COMPLETION_INDEX", () if environment.get("RANK") else ("WORLD_SIZE",))


def _in_batch_shell(environment: Mapping[str, str]) -> bool:
    """Whether this is the shell of a batch script, which has the job's number of tasks but is one
    process.
    """
    started = environment.get("SLURM_STEP_ID") or environment.get("SLURM_PROCID") != "0"
    return bool(environment.get("SLURM_JOB_ID")) and not started


def _read(level: _Level, environment: Mapping[str, str]) -> Rank | None:
    """What one engine says; None: it has not started this process."""
    rank = _number(level.rank, environment)
    if rank is None:
        return None
    worlds = (_number(name, environment) for name in level.world)
    world = next(filter(None, worlds), None)
    source = f"{level.rank}={rank}" + (f" of {world}" if world else "")
    # An array's numbers may begin anywhere.
    return Rank(rank, world if world and level is _ARRAY else max(world or 1, rank + 1), source)


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    """A variable's number; None: it is not set, or empty."""
    value = environment.get(name, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit()):
        raise SettingError(
            f"{name}={value} is no whole number from 0 on; unset it, or give rank=, world= and "
            "device="
        )
    return int(value)
