"""A checkpoint comes back bit for bit, or not at all."""

import errno
import json
import os

import pytest
import torch

from residual_saes.data import durable
from residual_saes.data.errors import StoreError
from residual_saes.train import checkpoint
from residual_saes.train.checkpoint import Checkpoint


def moment(step):
    tensors = {
        "a": torch.full((3, 2), float(step)).T,
        "silent": torch.tensor([step, 2**40]),
        "t": torch.tensor(1.5),
    }
    return Checkpoint(step, 10 * step, "abc", tensors)


def saved(folder, *steps):
    for step in steps:
        checkpoint.save(folder, moment(step))
    return sorted(path.name for path in folder.iterdir())


def assert_latest(folder, step, passed_over):
    found, names = checkpoint.latest(folder)
    wanted = moment(step)
    assert (found.step, found.metrics_bytes, found.settings) == (
        wanted.step,
        wanted.metrics_bytes,
        wanted.settings,
    )
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    assert names == passed_over


def test_none_in_an_empty_folder(tmp_path):
    assert checkpoint.latest(tmp_path) == (None, [])


def test_comes_back_and_two_are_kept(tmp_path):
    names = saved(tmp_path, 5, 10, 15)
    stems = ("step_0000000010", "step_0000000015")
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("json", "safetensors")]
    assert_latest(tmp_path, 15, [])


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "missing"])
def test_damaged_one_is_passed_over_and_replaced(suffix, damage, tmp_path):
    saved(tmp_path, 5, 10)
    path = tmp_path / f"step_0000000010.{suffix}"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"torn": content[:-1], "empty": b"", "flipped": bytes(content)}[damage])
    unseen = (
        damage == "missing" and suffix == "json"
    )  # without a record there is no checkpoint to speak of
    assert_latest(tmp_path, 5, [] if unseen else ["step_0000000010"])
    saved(tmp_path, 10)
    assert_latest(tmp_path, 10, [])


def test_every_flipped_bit_of_the_record_is_seen(tmp_path):
    saved(tmp_path, 5, 10)
    path = tmp_path / "step_0000000010.json"
    whole = path.read_bytes()
    for at in range(len(whole) - 1):  # all but the newline
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found, _ = checkpoint.latest(tmp_path)
        assert found.step == 5, f"byte {at} of {json.loads(whole)}"


def test_all_damaged_is_none(tmp_path):
    saved(tmp_path, 5)
    (tmp_path / "step_0000000005.json").write_text("{}")
    assert checkpoint.latest(tmp_path) == (None, ["step_0000000005"])


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "notes.json").write_text("mine")
    saved(tmp_path, 1, 2, 3)
    assert (tmp_path / "notes.json").read_text() == "mine"


def pair(folder, step):
    """The files of a checkpoint, and their bytes."""
    return {path: path.read_bytes() for path in folder.glob(f"step_{step:010d}.*")}


def put_back(files):
    for path, content in files.items():
        path.write_bytes(content)


def spoil(folder, step):
    path = folder / f"step_{step:010d}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_what_came_back_counts_for_nothing(tmp_path):
    """Files whose removal a power loss undid, and what a killed process left half written."""
    saved(tmp_path, 5)
    gone = pair(tmp_path, 5)
    names = saved(tmp_path, 10, 15)
    put_back(gone)
    (tmp_path / "step_0000000012.json").write_bytes(b"{}")
    (tmp_path / "step_0000000020.safetensors").write_bytes(b"")
    assert checkpoint.oldest(tmp_path) == checkpoint.fallback(tmp_path, 15) == 10
    assert_latest(tmp_path, 15, [])
    checkpoint.keep(tmp_path, [15, 10])
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_fallback_is_the_newest_whole_one_before(tmp_path):
    saved(tmp_path, 5, 10)
    assert checkpoint.fallback(tmp_path, 10) == 5
    spoil(tmp_path, 10)
    assert checkpoint.fallback(tmp_path, 15) == 5
    spoil(tmp_path, 5)
    assert checkpoint.fallback(tmp_path, 10) == 0


def test_a_pair_under_another_name_is_damaged(tmp_path):
    saved(tmp_path, 5, 10)
    for path, content in pair(tmp_path, 5).items():
        path.with_stem("step_0000000020").write_bytes(content)
    assert_latest(tmp_path, 10, ["step_0000000020"])


def test_removals_are_durable_before_save_returns(tmp_path, monkeypatch):
    """Rows are freed next, behind what is left."""
    saved(tmp_path, 5, 10)
    there, sync = [], durable.sync_directory

    def synced(folder):
        there.append({path.name for path in folder.iterdir()})
        sync(folder)

    monkeypatch.setattr(durable, "sync_directory", synced)
    assert set(saved(tmp_path, 15)) == there[-1]
    there.clear()
    checkpoint.keep(tmp_path, [15, 10])  # a killed process may have removed without syncing
    assert there == [{path.name for path in tmp_path.iterdir()}]


def test_a_folder_that_cannot_be_changed_is_one_line(tmp_path, monkeypatch):
    """Only where something must go: a finished run can be looked at there."""
    saved(tmp_path, 5, 10)

    def refusing(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for name in ("unlink", "replace", "rename"):
        monkeypatch.setattr(os, name, refusing)
    checkpoint.keep(tmp_path, [5, 10])
    with pytest.raises(StoreError, match=r"step_0000000005\.json"):
        checkpoint.keep(tmp_path, [10])
