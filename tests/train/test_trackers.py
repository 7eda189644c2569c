"""log=: other programs end with the records of metrics.jsonl, each once, whatever happened."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from residual_saes.data.errors import SettingError
from residual_saes.data.journal import read_metrics
from residual_saes.train import trackers
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train
from tests.train.killing import CPU, config, planted
from tests.train.killing import run as run_alone
from tests.train.planted import Planted, planted_stream

NAME = "held_out/variance_explained"
Points = list[tuple[int, float]]


def run(folder: Path, reader: Planted | None = None, log: tuple[str, ...] = ()) -> None:
    train(Arm(config(), planted_stream(reader or planted()), folder, log=log), CPU)


def killed_at(batch: int) -> Planted:
    def kill(at: int, _: object) -> None:
        if at == batch:
            raise KeyboardInterrupt

    return planted(spoil=kill)


def recorded(folder: Path, split: str, name: str) -> Points:
    records = [record for record in read_metrics(folder / "metrics.jsonl")]
    return [(record["step"], record[name]) for record in records if record["split"] == split]


def tensorboard(folder: Path, name: str) -> Points:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def wandb_offline(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all starts of a run that was tracked offline."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a log of LevelDB's format behind W&B's seven bytes: blocks of 32,768 bytes."""
    start, record = 7, b""
    while start + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, start)
        if 32_768 - start % 32_768 < 7 or not kind:  # the rest of a block is empty
            start += 32_768 - start % 32_768
            continue
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_tensorboard_has_each_record_once_after_kills(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_alone(tmp_path / "alone")
    folder = tmp_path / "run"
    for batch in (10, 15, 19):  # behind records that the last checkpoint has not seen
        with pytest.raises(KeyboardInterrupt):
            run(folder, killed_at(batch), ("tensorboard",))
    run(folder, log=("tensorboard",))
    assert (folder / "metrics.jsonl").read_bytes() == (
        tmp_path / "alone" / "metrics.jsonl"
    ).read_bytes()
    for split, name in (("train", "loss"), ("held_out", "variance_explained")):
        steps, values = zip(*tensorboard(folder, f"{split}/{name}"), strict=True)
        known_steps, known = zip(*recorded(folder, split, name), strict=True)
        assert steps == known_steps and values == pytest.approx(known)


def test_a_tracker_that_fails_costs_a_line_and_is_caught_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk, or without a network; the run's bytes are those of one without."""
    pytest.importorskip("tensorboard")
    failing = trackers._TensorBoard.send

    def fails(self: Any, number: int, record: Any) -> None:
        if number >= 4:
            raise OSError(28, "No space left on device")
        failing(self, number, record)

    with monkeypatch.context() as patch:
        patch.setattr(trackers._TensorBoard, "send", fails)
        run(tmp_path, log=("tensorboard",))
    assert capsys.readouterr().err.count("warning: log=tensorboard ") == 1
    assert len(tensorboard(tmp_path, "train/loss")) < len(recorded(tmp_path, "train", "loss"))
    run(tmp_path, log=("tensorboard",))  # finished: nothing but what is missing is left to do
    steps = [step for step, _ in tensorboard(tmp_path, "train/loss")]
    assert steps == [step for step, _ in recorded(tmp_path, "train", "loss")]


def test_another_log_goes_on_with_the_run(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed_at(10))
    pytest.importorskip("tensorboard")
    run(tmp_path, log=("tensorboard",))
    assert len(tensorboard(tmp_path, NAME)) == len(
        recorded(tmp_path, "held_out", "variance_explained")
    )


@pytest.mark.long
def test_wandb_has_each_record_once_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for batch in (10, 19):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, killed_at(batch), ("wandb",))
    run(tmp_path, log=("wandb",))
    logged = list(wandb_offline(tmp_path))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["_step"] for row in logged] == list(range(len(records)))
    assert [row["step"] for row in logged] == [record["step"] for record in records]


@pytest.mark.parametrize("value", ["tensorbord", ["wandb", "x"], 3])
def test_an_unknown_tracker_is_refused(value: Any) -> None:
    with pytest.raises(SettingError, match="log="):
        trackers.asked(value)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"log=wandb.*pip install wandb"):
        trackers.asked("wandb")
    assert trackers.asked(None) == ()


@pytest.mark.long
def test_trackio_has_each_record_once_after_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that a killed process had not written: trackio writes half a second later."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which trackio reads when loaded
    pytest.importorskip("trackio")
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, killed_at(10), ("trackio",))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        assert opened.execute("delete from metrics where step >= 2").rowcount > 0
    run(folder, log=("trackio",))
    with sqlite3.connect(database) as opened:
        steps = sorted(step for (step,) in opened.execute("select step from metrics"))
    assert steps == list(range(len(read_metrics(folder / "metrics.jsonl"))))
