"""What fails in one arm of a sweep ends that arm alone, at its last checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.data.errors import Interrupted, NonFiniteError, PipelineError, TemporaryError
from residual_saes.data.rows.follower import Follower, FollowsNobody
from residual_saes.train.arm import Arm, Outcome
from residual_saes.train.loop import train_together
from residual_saes.train.optim import OptimConfig
from residual_saes.train.stream import Stream
from tests.conftest import Call
from tests.train.killing import BATCH, CPU, bits, config, planted
from tests.train.planted import planted_stream
from tests.train.test_command import SMALL, make_store

NAMES = ("sound", "other")  # another seed
TOKENS = 12 * BATCH  # three checkpoints, one evaluation, and the end


def pair(folder: Path, stream: Stream | None = None) -> list[Arm]:
    stream = stream or planted_stream(planted())
    return [
        Arm(config(seed=seed, tokens=TOKENS), stream, folder / name)
        for seed, name in enumerate(NAMES)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("alone")
    for arm in pair(folder):
        train_together([arm], CPU)
    return {name: bits(folder / name) for name in NAMES}


class Refused:
    """Calls of a name that fail on paths which end in `suffix`, from the n-th on."""

    def __init__(self, name: str, error: str, suffix: str, first: int) -> None:
        self.name = name
        self.call: Callable[..., Any] = getattr(os, name)
        self._error = getattr(errno, error)
        self._suffix = suffix
        self._left = first - 1

    def __call__(self, *args: Any) -> Any:
        *_, path = (str(arg) for arg in args if isinstance(arg, str | Path) or arg is args[0])
        if isinstance(args[0], int):
            path = os.readlink(f"/proc/self/fd/{args[0]}")
        if f"/{NAMES[1]}/" in f"{path}/" and path.rstrip("/").endswith(self._suffix):
            if not self._left:
                raise OSError(self._error, os.strerror(self._error), path)
            self._left -= 1
        return self.call(*args)


def went_on(folder: Path, alone: dict[str, dict[str, bytes]]) -> None:
    """The same command goes on, to the same bits."""
    outcomes = train_together(pair(folder), CPU)
    assert not any(isinstance(outcome, PipelineError) for outcome in outcomes)
    assert {name: bits(folder / name) for name in NAMES} == alone


@pytest.mark.parametrize(
    ("call", "error", "suffix", "first", "code"),
    [
        ("fsync", "EIO", "metrics.jsonl", 2, 75),
        ("replace", "ENOSPC", "08.json", 1, 75),
        ("replace", "EROFS", ".safetensors", 2, 2),
        ("replace", "EDQUOT", "sae_final.pt", 1, 75),
        ("replace", "EIO", "digests.json", 2, 75),
        ("mkdir", "EACCES", "other", 1, 2),
        ("unlink", "EPERM", ".json", 1, 2),
    ],
)
def test_an_arm_whose_disk_fails_ends_alone(
    call: str,
    error: str,
    suffix: str,
    first: int,
    code: int,
    alone: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, call, Refused(call, error, suffix, first))
    outcomes = train_together(pair(tmp_path), CPU)
    monkeypatch.undo()
    assert bits(tmp_path / "sound") == alone["sound"]
    assert isinstance(outcomes[1], PipelineError) and outcomes[1].exit_code == code
    reason = os.strerror(getattr(errno, error))
    lines = [line for line in capsys.readouterr().err.splitlines() if reason in line]
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'other'}: ")
    went_on(tmp_path, alone)


def disk_of(folder: Path, size: str) -> None:
    """Mount a small disk, or skip."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a checkpoint or two of the command's small run."""
    disk_of(tmp_path / "full", "32k")
    yield tmp_path / "full"
    subprocess.run(["umount", str(tmp_path / "full")], check=False)


def test_a_full_disk_under_one_arm_of_a_command(full: Path, tmp_path: Path, call: Call) -> None:
    make_store(tmp_path / "s.zarr", units=3, layers=(3,))
    settings = ("store=s.zarr", *SMALL, "tokens=256", "checkpoint_every=1", "eval_rows=64")
    line = ("train", "residual_saes.train.command", "-m", *settings, "run=room,full/arm")
    code, err = call(*line)
    assert code == 75
    assert err.count("full/arm: cannot write full/arm/") == 1 and "No space left" in err
    assert (tmp_path / "room" / "sae_final.pt").exists()
    subprocess.run(["mount", "-o", "remount,size=9m", str(full)], check=True)
    assert call(*line)[0] == 0
    assert bits(full / "arm") == bits(tmp_path / "room")


def test_a_folder_that_is_removed_meanwhile(
    alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    def remove(number: int, _: torch.Tensor) -> None:
        if number == 6:
            shutil.rmtree(tmp_path / "other")

    outcomes = train_together(pair(tmp_path, planted_stream(planted(spoil=remove))), CPU)
    assert isinstance(outcomes[1], TemporaryError) and "other" in str(outcomes[1])
    went_on(tmp_path, alone)


def test_rows_that_cannot_be_read_end_the_arms_that_read_them(
    alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Held-out rows, and those of a batch; the arms of another stream go on."""

    def fail(number: int, _: torch.Tensor) -> None:
        if number == 5:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "s.zarr")

    def failing() -> Iterator[torch.Tensor]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "s.zarr")

    sound = planted_stream(planted())
    for stream in (planted_stream(planted(spoil=fail)), replace(sound, held_out=failing)):
        arms = [replace(arm, folder=arm.folder.with_name("other")) for arm in pair(tmp_path)]
        outcomes = train_together([pair(tmp_path)[0], replace(arms[1], stream=stream)], CPU)
        assert isinstance(outcomes[1], TemporaryError) and "s.zarr" in str(outcomes[1])
        assert bits(tmp_path / "sound") == alone["sound"]
        shutil.rmtree(tmp_path / "sound")
    went_on(tmp_path, alone)


def test_a_stop_while_an_arm_fails_saves_the_other(
    alone: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(number: int, _: torch.Tensor) -> None:
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "replace", Refused("replace", "ENOSPC", "06.json", 1))
    with pytest.raises(Interrupted):
        train_together(pair(tmp_path, planted_stream(planted(spoil=stop))), CPU)
    monkeypatch.undo()
    saved = [max((tmp_path / name / "checkpoint").glob("*.json")).stem for name in NAMES]
    assert saved == ["step_0000000006", "step_0000000004"]
    went_on(tmp_path, alone)


class InRing(FollowsNobody):
    """A follower that notes whether its run has left the ring, and is held up by whom it is told
    to.
    """

    def __init__(self, by: Follower | None = None) -> None:
        self.has_left = False
        self._by = by

    def finish(self) -> None:
        self.has_left = True

    def held_up_by(self, other: Follower, batch: int) -> str | None:
        return "delete its registration" if other is self._by and batch == 10 else None


def test_an_arm_that_fails_keeps_its_rows_and_the_others_stop_where_they_want_room(
    alone: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, other = pair(tmp_path)
    failed = InRing()
    arms = [replace(sound, follower=InRing(failed)), replace(other, follower=failed)]
    monkeypatch.setattr(os, "replace", Refused("replace", "ENOSPC", "08.json", 1))
    outcomes = train_together(arms, CPU)
    monkeypatch.undo()
    assert all(isinstance(outcome, TemporaryError) for outcome in outcomes)
    assert "other" in str(outcomes[0]) and "delete its registration" in str(outcomes[0])
    assert (tmp_path / "sound" / "checkpoint" / "step_0000000010.json").exists()
    assert not failed.has_left
    went_on(tmp_path, alone)


def test_an_arm_that_diverged_leaves_the_ring(tmp_path: Path) -> None:
    rates = OptimConfig(lr=1e30, lr_floor=0.0)
    arm = replace(pair(tmp_path)[0], config=config(optim=rates), follower=InRing())
    assert isinstance(train_together([arm], CPU)[0], NonFiniteError)
    assert isinstance(arm.follower, InRing) and arm.follower.has_left


def test_a_defect_of_ours_is_no_arms_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object) -> None:
        raise KeyError("defect")

    monkeypatch.setattr(os, "replace", defect)
    with pytest.raises(KeyError):
        train_together(pair(tmp_path), CPU)


def test_memory_that_is_short_is_told_with_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What plainly cannot fit is refused before it begins; an estimate is only told."""

    def outcome_with(free: int) -> Outcome:
        monkeypatch.setattr("residual_saes.data.device.free_bytes", lambda _: free)
        return train_together(pair(tmp_path)[:1], CPU)[0]

    refused = outcome_with(9)
    assert isinstance(refused, PipelineError) and not (tmp_path / "sound").exists()
    assert f"batch={BATCH}" in str(refused) and "sae.d_sae=48" in str(refused)

    def missing(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")

    with monkeypatch.context() as patch:
        patch.setattr("residual_saes.train.trainer.learning_rate", missing)
        refused = outcome_with(2**40)
    assert isinstance(refused, PipelineError) and refused.exit_code == 2
    assert "sae.d_sae=48" in str(refused)
    capsys.readouterr()
    assert not isinstance(outcome_with(20_000), PipelineError)
    assert "it may run out of memory" in capsys.readouterr().err
