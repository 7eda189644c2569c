"""Where a process stands, as every engine says it; and the GPU that it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from residual_saes.data import rank
from residual_saes.data.device import own_device, torch_device
from residual_saes.data.errors import SettingError
from residual_saes.data.rank import here, processes
from residual_saes.data.rows.copy import Side
from residual_saes.harvest.config import Faults
from residual_saes.harvest.writer import Writer

STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0"}
# As Slurm 22.05 sets it where no srun has started the process.
BATCH = {"SLURM_JOB_ID": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
RANK = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
NODE = {**RANK, "GROUP_WORLD_SIZE": "1"}  # torchrun without --nnodes
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_SIZE": "7"}
SKYPILOT = {"SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_NODES": "4"}


def array(*ids: int, step: int = 1) -> list[dict[str, str]]:
    """The variables of each task of an array, as Slurm sets them."""
    facts = {"COUNT": len(ids), "MIN": min(ids), "MAX": max(ids), "STEP": step}
    common = {f"SLURM_ARRAY_TASK_{name}": str(fact) for name, fact in facts.items()}
    return [{**common, "SLURM_ARRAY_TASK_ID": str(number)} for number in ids]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, "")),
        (RANK, (5, 8, "RANK=5 of 8")),
        (STEP, (1, 2, "SLURM_PROCID=1 of 2")),
        ({**STEP, "SLURM_JOB_ID": "3", "SLURM_STEP_ID": "0"}, (1, 2, "SLURM_PROCID=1 of 2")),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "3"}, (1, 3, "SLURM_PROCID=1 of 3")),
        ({"SLURM_PROCID": "3"}, (3, 4, "SLURM_PROCID=3")),
        (ARRAY, (1, 8, "SLURM_ARRAY_TASK_ID=1 of 8")),
        ({**ARRAY, **STEP}, (3, 16, "SLURM_ARRAY_TASK_ID=1 of 8 and SLURM_PROCID=1 of 2")),
        (OPEN_MPI, (6, 7, "OMPI_COMM_WORLD_RANK=6 of 7")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, "PMI_RANK=1 of 2")),
        (SKYPILOT, (2, 4, "SKYPILOT_NODE_RANK=2 of 4")),
        ({"JOB_COMPLETION_INDEX": "3"}, (3, 4, "JOB_COMPLETION_INDEX=3")),
        ({"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "9"}, (3, 9, "JOB_COMPLETION_INDEX=3 of 9")),
        # One node's torchrun in a job of many; a torchrun over nodes says all itself.
        ({**NODE, **SKYPILOT}, (21, 32, "SKYPILOT_NODE_RANK=2 of 4 and RANK=5 of 8")),
        ({**RANK, **SKYPILOT, "GROUP_WORLD_SIZE": "4"}, (5, 8, "RANK=5 of 8")),
        ({**RANK, **ARRAY, **STEP}, (5, 8, "RANK=5 of 8")),
        ({**NODE, "JOB_COMPLETION_INDEX": "2"}, (21, 24, "JOB_COMPLETION_INDEX=2 and RANK=5 of 8")),
        # The shell of a batch script is one process, whatever it says. mpirun may be given there.
        (BATCH, (0, 1, "")),
        ({**BATCH, **ARRAY}, (1, 8, "SLURM_ARRAY_TASK_ID=1 of 8")),
        ({**BATCH, **NODE}, (5, 8, "RANK=5 of 8")),
        ({**BATCH, **OPEN_MPI}, (6, 7, "OMPI_COMM_WORLD_RANK=6 of 7")),
        # A stale variable of somebody else, and empty ones.
        ({"WORLD_SIZE": "4"}, (0, 1, "")),
        ({"WORLD_SIZE": "4", **ARRAY}, (1, 8, "SLURM_ARRAY_TASK_ID=1 of 8")),
        ({"RANK": "", "WORLD_SIZE": "", "SLURM_PROCID": " ", **SKYPILOT}, (2, 4, None)),
        ({"RANK": "4", "WORLD_SIZE": "2"}, (4, 5, None)),
        ({"RANK": "0", "WORLD_SIZE": "0"}, (0, 1, None)),
    ],
    ids=str,
)
def test_engines(environment: dict[str, str], expected: tuple[int, int, str | None]) -> None:
    found = here(environment=environment)
    assert (found.rank, found.world) == expected[:2]
    if expected[2] is not None:
        assert found.source == expected[2]


def test_arrays_give_each_task_a_rank_below_their_count() -> None:
    for ids, step in (((0, 1, 2, 3), 1), ((1, 2, 3), 1), ((4, 8, 12), 4), ((7,), 1)):
        found = [here(environment=task) for task in array(*ids, step=step)]
        assert [one.rank for one in found] == [*range(len(ids))]
        assert {one.world for one in found} == {len(ids)}
    for task in array(1, 5, 7):
        assert here(environment=task).rank < here(environment=task).world == 3


def test_what_is_set_by_hand_wins() -> None:
    for environment in ({}, RANK, {**ARRAY, **STEP}, {"RANK": "x", "SLURM_PROCID": "x"}):
        found = here(3, 4, environment)
        assert (found.rank, found.world, found.source) == (3, 4, "")
    assert (here(3, None, ARRAY).rank, here(3, None, ARRAY).world) == (3, 8)
    assert here(3, None, {"WORLD_SIZE": "5"}).world == 5
    assert here(9, None, RANK).world == 10
    kubernetes = {"JOB_COMPLETION_INDEX": "3"}
    assert (here(None, 8, kubernetes).rank, here(None, 8, kubernetes).world) == (3, 8)
    assert here(None, 2, kubernetes).world == 4


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "0x1", "٣"])
@pytest.mark.parametrize(
    "name", ["RANK", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "PMI_RANK"]
)
def test_what_is_no_number_is_one_line(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"{name}={value} .*rank="):
        here(environment={name: value})


def test_only_processes_of_one_job_train_together() -> None:
    """Arms of a sweep may be the jobs of an array, and each of them a step of Slurm's."""
    for environment in ({**ARRAY, **STEP}, SKYPILOT, OPEN_MPI, {"WORLD_SIZE": "4"}, {}):
        assert processes(environment).world == 1
    assert (processes(RANK).rank, processes(RANK).world) == (5, 8)


# -- GPUs ------------------------------------------------------------------------------------------


class Stream:
    """Records the devices of what is done on it."""

    def __init__(self, device: Any = None) -> None:
        self.device = torch.device(device) if device is not None else FakeGPUs.current
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or Stream()


class FakeGPUs:
    """Stands for torch.cuda of a node; `current` is what a fresh thread has."""

    current = torch.device("cuda:0")

    def __init__(self, patch: pytest.MonkeyPatch, count: int) -> None:
        self.set: list[torch.device] = []
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "set_device", self.set.append)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: stream)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing says where this process stands."""
    for level in (rank._PROCESSES, *rank._TASKS):
        monkeypatch.delenv(level.local or "NONE", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "value", "gpus", "device"),
    [
        ("LOCAL_RANK", "2", 4, "cuda:2"),
        ("LOCAL_RANK", "5", 4, "cuda:1"),  # more ranks than GPUs share them
        ("LOCAL_RANK", "5", 1, "cuda:0"),  # each rank sees its own GPU alone
        ("SLURM_LOCALID", "3", 4, "cuda:3"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1", 2, "cuda:1"),
        ("LOCAL_RANK", "", 4, "cuda"),
        ("LOCAL_RANK", "1", 0, "cpu"),
    ],
)
def test_each_rank_takes_its_gpu(
    variable: str, value: str, gpus: int, device: str, bare: pytest.MonkeyPatch
) -> None:
    bare.setenv(variable, value)
    cuda = FakeGPUs(bare, gpus)
    assert own_device(None) == torch.device(device)
    assert cuda.set == ([torch.device(device)] if ":" in device else [])


def test_a_gpu_that_is_named_becomes_the_current_one(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("LOCAL_RANK", "1")
    cuda = FakeGPUs(bare, 4)
    assert own_device("cuda:3") == torch_device("cuda:3") == torch.device("cuda:3")
    assert torch_device("cpu") == torch.device("cpu")
    assert cuda.set == [torch.device("cuda:3")] * 2
    with pytest.raises(SettingError, match="device=cuda:4"):
        own_device("cuda:4")
    bare.setenv("LOCAL_RANK", "x")
    with pytest.raises(SettingError, match="LOCAL_RANK=x"):
        own_device(None)


def test_streams_and_events_are_on_the_gpu_of_their_rows(bare: pytest.MonkeyPatch) -> None:
    """Whatever the current device of their thread."""
    FakeGPUs(bare, 8)
    seen: list[tuple[Any, Any]] = []

    def commit(self: Writer, unit: int, residuals: Any, batch: Any, made: Any) -> int:
        with self._side_stream(made) as stream:
            seen.append((stream.device, made.stream.device))
        return 0

    bare.setattr(Writer, "_commit", commit)
    with Writer(None, None, Faults(), "cuda:5") as writer:  # type: ignore[arg-type]
        writer.submit(0, {}, None)
    assert seen == [(torch.device("cuda:5"), torch.device("cuda:5"))]
    copy = Side(torch.device("cuda:5"))
    assert copy._stream.device == torch.device("cuda:5")
