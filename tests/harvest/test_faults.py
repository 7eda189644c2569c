"""Faults around a harvest are named and lose nothing; the next start ends in the same bytes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residual_saes.data.errors import DocumentError, MismatchError, PipelineError, StoreError
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.site import HookPoint
from residual_saes.data.store import records, verified
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import damage, is_derived, repair
from residual_saes.data.store.store import Store
from residual_saes.data.text import retry
from residual_saes.data.text.sources import FileText
from residual_saes.harvest import forward, selfcheck
from residual_saes.harvest.config import Faults, HarvestConfig
from residual_saes.harvest.loop import OutOfMemory, harvest
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.provenance import manifest_of
from residual_saes.harvest.selfcheck import choose_isolation, trial_of
from residual_saes.harvest.spine_writer import work, write_spine
from tests.harvest.breaking import Breaking
from tests.harvest.models import save_model

TOKENS = 512


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a store with its spine alone, and a finished one."""
    folder = tmp_path_factory.mktemp("faults")
    save_model(folder / "model", "gemma4")
    words = ["all work and no play"] * 15 + [
        "makes QUITE sure"
    ] * 200  # what is in capitals comes late
    (folder / "text.jsonl").write_text(
        "".join(f'{{"text": "{word} {n}"}}\n' for n, word in enumerate(words))
    )
    lm, source = open_model(folder), FileText(folder / "text.jsonl")
    begun = config(folder / "spine.zarr")
    store = Store.open_or_create(begun.store, manifest_of(begun, lm, source))
    write_spine(store, source, lm.tokenizer)
    shutil.copytree(folder / "spine.zarr", folder / "done.zarr")
    harvest(config(folder / "done.zarr"), lm, source)
    return folder


def open_model(root: Path) -> LanguageModel:
    lm = load(ModelConfig(str(root / "model"), dtype="float32"))
    lm.isolation = choose_isolation(lm, [1, 4], 16)
    return lm


def config(store: Path) -> HarvestConfig:
    return HarvestConfig(str(store), (1, 4), tokens=TOKENS, context=16, batch=2, unit=64, chunk=16)


def begun(root: Path, tmp_path: Path) -> HarvestConfig:
    return config(shutil.copytree(root / "spine.zarr", tmp_path / "s.zarr"))


def tree(path: Path | str) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(Path(path).rglob("*"))
        if file.is_file()
    }


def finish(root: Path, target: HarvestConfig) -> None:
    """The next start must end in the same bytes."""
    harvest(target, open_model(root), FileText(root / "text.jsonl"))
    assert tree(target.store) == tree(root / "done.zarr")


# -- disks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_disk_that_refuses_at_any_step_loses_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    source = FileText(root / "text.jsonl")
    stride = {"fsync": 97, "replace": 59, "link": 5}[call]  # samples: kills meet every step
    original: Callable[..., Any] = getattr(os, call)
    step = 0
    refused = True
    while refused:
        step += stride
        target = config(shutil.copytree(root / "spine.zarr", tmp_path / f"{step}.zarr"))
        seen = [0]

        def refusing(*args: Any, step: int = step, seen: list[int] = seen) -> Any:
            seen[0] += 1
            if seen[0] == step:
                raise OSError(28, "No space left on device")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refusing)
            message = refusal(lambda target=target: harvest(target, open_model(root), source))
        refused = message is not None
        if message is not None:
            assert target.store in message and "No space left on device" in message
        assert not list(damage(LocalPlace(Path(target.store)))) or refused
        assert not list(Path(target.store).rglob("*.tmp"))
        finish(root, target)
    assert step > stride


def test_a_real_full_disk(root: Path, tmp_path: Path) -> None:
    """On a file system of 400 kB, where one can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid() != 0
        or os.system(f"mount -t tmpfs -o size=400k tmpfs {small} 2>/dev/null") != 0
    ):
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        target = config(shutil.copytree(root / "spine.zarr", small / "s.zarr"))
        with pytest.raises(StoreError, match="No space left on device"):
            harvest(target, open_model(root), FileText(root / "text.jsonl"))
        assert 0 < len(Store.open(target.store).missing([1, 4])) < 8
        assert not list(damage(LocalPlace(Path(target.store))))
        assert os.system(f"mount -o remount,size=4m {small}") == 0
        finish(root, target)
    finally:
        os.system(f"umount {small}")


def refusal(action: Callable[[], object]) -> str | None:
    """The message of a StoreError; None if there was none."""
    try:
        action()
    except StoreError as error:
        return str(error)
    return None


KINDS = (
    "commits/manifest.json",
    "commits/spine/00000002.json",
    "commits/spine/end.json",
    "commits/residuals/00000002.1_4.json",
    "commits/summaries/00001.json",
    "tokens/c.2.0",
    "document/c.2.0",
    "token_index/c.2",
    "layer_1/c.2.0",
    "norm_1/c.2",
    "kind_1/c.2",
    "moments_1/c.2.0.0.0",
    "summary_1/c.0.0.0.0",
    "layer_1/zarr.json",
    "zarr.json",
)


def test_every_kind_of_object_is_among_those_that_are_damaged(root: Path) -> None:
    def kind(key: str) -> str:
        return re.sub(r"\d+", "N", key)

    kinds = {kind(key) for key in tree(root / "done.zarr")} - {"commits/claims"}
    array_metadata = {key for key in kinds if key.endswith("/zarr.json")}
    assert kinds - array_metadata == {kind(key) for key in KINDS} - {"layer_N/zarr.json"}


@pytest.mark.parametrize("key", KINDS)
def test_a_flipped_byte_anywhere_is_found_by_verify_and_mended(
    root: Path, tmp_path: Path, key: str
) -> None:
    path = shutil.copytree(root / "done.zarr", tmp_path / "s.zarr")
    whole, place = (path / key).read_bytes(), LocalPlace(path)
    for at in np.linspace(0, len(whole) - 1, 12).astype(int):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        (path / key).write_bytes(flipped)
        ((record, lines),) = damage(place)
        assert record == key or any(f"/{key} " in line for line in lines), f"byte {at}"
    assert repair(place) == [record]
    if is_derived(key):
        assert not list(damage(place))
        assert (path / key).read_bytes() == whole
    if key in ("layer_1/c.2.0", "commits/manifest.json", "commits/spine/end.json", "zarr.json"):
        finish(root, config(path))


class Watched(LocalPlace):
    """Notes what is read, and is stopped before the object of number `stop_at`."""

    def __init__(self, path: Path, stop_at: int = -1) -> None:
        super().__init__(path)
        self.keys: list[str] = []
        self._stop_at = stop_at

    def digest(self, key: str) -> Any:
        if len(self.keys) == self._stop_at:
            raise KeyboardInterrupt
        self.keys.append(key)
        return super().digest(key)


def checked(place: LocalPlace) -> list[Any]:
    with verified.kept(place, save_s=0) as sound:
        return list(damage(place, sound))


def test_a_verification_that_is_stopped_goes_on(root: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(root / "done.zarr", tmp_path / "s.zarr"))
    whole, stopped, rest = Watched(path), Watched(path, 20), Watched(path)
    assert not checked(whole) and not (path / verified.KEY).exists()
    with pytest.raises(KeyboardInterrupt):
        checked(stopped)
    assert not checked(rest) and not (path / verified.KEY).exists()
    # Of the record that was in hand all is read again.
    again = set(stopped.keys) & set(rest.keys)
    assert set(stopped.keys) | set(rest.keys) == set(whole.keys) and len(again) < 10
    # A file that is damaged, or was begun too long ago, counts for nothing.
    with pytest.raises(KeyboardInterrupt):
        checked(Watched(path, 20))
    saved = (path / verified.KEY).read_bytes()
    body = records.decode(saved, verified.KEY)
    flipped = bytearray(saved)
    flipped[len(saved) // 2] ^= 1
    late = records.encode({**body, "since": body["since"] - 90_000})
    copied = records.encode({**body, "store": "another"})
    for content in (late, copied, bytes(flipped), saved[:-1], b""):
        (path / verified.KEY).write_bytes(content)
        anew = Watched(path)
        assert not checked(anew) and anew.keys == whole.keys


def test_no_flipped_bit_lets_a_damaged_record_count_as_whole(root: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(root / "done.zarr", tmp_path / "s.zarr"))
    with pytest.raises(KeyboardInterrupt):
        checked(Watched(path, 20))
    saved = (path / verified.KEY).read_bytes()
    sums = [checksum.encode() for checksum in records.decode(saved, verified.KEY)["records"]]
    for bit in range(0, 8 * len(saved), 5):
        flipped = bytearray(saved)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / verified.KEY).write_bytes(flipped)
        with verified.kept(LocalPlace(path)) as sound:
            assert not any(map(sound.was_whole, sums)), f"bit {bit}"


def test_damage_is_found_however_often_and_by_how_many_it_is_looked_for(
    root: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(root / "done.zarr", tmp_path / "s.zarr"))
    damaged = path / "norm_4/c.6"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for _ in range(40):  # each stopped behind one more record or two
        with suppress(KeyboardInterrupt):
            ((key, _),) = checked(Watched(path, 20))
    assert key == "commits/residuals/00000006.1_4.json"
    # Two at once: the first to end removes what both keep.
    with verified.kept(LocalPlace(path), save_s=0) as one:
        with verified.kept(LocalPlace(path), save_s=0) as other:
            ((key, _),) = damage(LocalPlace(path), one)
            assert (path / verified.KEY).exists()
            assert [key for key, _ in damage(LocalPlace(path), other)] == [key]
        assert not (path / verified.KEY).exists()


class ReadOnly(LocalPlace):
    """A folder that another user owns."""

    def write(self, key: str, parts: Any) -> Any:
        raise StoreError(f"cannot write {key}: Permission denied")

    def delete(self, key: str) -> None:
        raise PermissionError(13, "Permission denied", key)


def test_a_store_that_only_may_be_read_is_verified(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(root / "done.zarr", tmp_path / "s.zarr"))
    assert not checked(ReadOnly(path))
    with pytest.raises(KeyboardInterrupt):
        checked(Watched(path, 20))
    assert not checked(ReadOnly(path)) and "cannot be removed" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_what_says_nothing_of_an_object_is_no_damage(
    root: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair would drop the unit."""

    def refuse(self: LocalPlace, key: str) -> Any:
        raise OSError(code, os.strerror(code), key)

    monkeypatch.setattr(LocalPlace, "digest", refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        list(damage(LocalPlace(root / "done.zarr")))


@pytest.mark.parametrize("key", [key for key in KINDS if "/c." in key and "summary" not in key])
def test_truncated_missing_and_swapped_objects_are_never_served(
    root: Path, tmp_path: Path, key: str
) -> None:
    path = shutil.copytree(root / "done.zarr", tmp_path / "s.zarr")
    whole, other = (path / key).read_bytes(), path / key.replace("c.2", "c.3")
    for data in (b"", whole[:-1], whole[: len(whole) // 2]):
        (path / key).write_bytes(data)
        with pytest.raises(StoreError, match=re.escape(key)):
            Store.open(path)
    (path / key).unlink()
    with pytest.raises(StoreError, match=re.escape(key)):
        Store.open(path)
    (path / key).write_bytes(other.read_bytes())
    other.write_bytes(whole)
    assert len([where for where, _ in damage(LocalPlace(path))]) == 2


def test_reading_a_shard_finds_its_flipped_byte(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root / "done.zarr", tmp_path / "s.zarr")
    for key in ("layer_1/c.2.0", "kind_1/c.2"):
        data = bytearray((path / key).read_bytes())
        data[len(data) // 3] ^= 1
        (path / key).write_bytes(data)
        reader = Reader([Source.of(Store.open(path), 1)], batch=8, seed=0, policy=Policy())
        with pytest.raises(StoreError, match=re.escape(key)):
            for _ in zip(range(reader.rows // 8), reader.batches(0), strict=False):
                pass
        data[len(data) // 3] ^= 1
        (path / key).write_bytes(data)


def test_a_manifest_damaged_with_its_copy_is_refused(root: Path, tmp_path: Path) -> None:
    path = shutil.copytree(root / "done.zarr", tmp_path / "s.zarr")
    for key in ("commits/manifest.json", "zarr.json"):
        (path / key).write_bytes(b"{")
    with pytest.raises(StoreError, match="harvest it anew"):
        repair(LocalPlace(path))


# -- models ----------------------------------------------------------------------------------------


def poisoned(lm: LanguageModel, token: int, value: float) -> LanguageModel:
    """The model with `value` in the embedding of one token."""
    lm.decoder.get_input_embeddings().weight.data[token, 3] = value
    return lm


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named_and_their_unit_is_not_committed(
    root: Path, tmp_path: Path, value: float
) -> None:
    source, target = FileText(root / "text.jsonl"), begun(root, tmp_path)
    tokens = np.concatenate([Store.open(target.store).tokens(unit) for unit in range(8)])
    probed = trial_of(open_model(root), 16)  # of the self-check
    seen = {*tokens[:12].ravel(), *probed.tokens.ravel(), *probed.neighbour.ravel()}
    rare = next(int(token) for token in np.unique(tokens) if token not in seen)
    row = int(np.nonzero(tokens == rare)[0][0])
    lm = poisoned(open_model(root), rare, value)
    with pytest.raises(PipelineError) as error:
        harvest(target, lm, source)
    unit = row // 4
    message = str(error.value)
    # Attention spreads NaN over the whole packed row, masked or not: 0 * NaN is NaN.
    assert f"unit {unit} of {target.store}," in message
    assert f"token 0 (id 2) of packed row {row % 4}" in message
    assert message.startswith("layer 1 ") and "non_finite=" in message
    assert unit in Store.open(target.store).missing([1, 4])
    allowed = replace(target, faults=Faults(non_finite=64))
    harvest(allowed, poisoned(open_model(root), rare, value), source)
    store = Store.open(target.store)
    assert store.non_finite(1) > 0
    served = Reader([Source.of(store, 1)], batch=1, seed=0, policy=Policy())
    assert all(
        torch.isfinite(batch).all()
        for _, batch in zip(range(served.rows), served.batches(0), strict=False)
    )


def run_out(
    monkeypatch: pytest.MonkeyPatch, most: int, real: Callable[..., Any] = forward.batch_residuals
) -> None:
    """Memory for at most `most` packed rows in a forward pass."""

    def limited(lm: LanguageModel, passes: Any, layers: Any, out: Any = None) -> Any:
        if sum(inputs.tokens for inputs in passes) > most * 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(lm, passes, layers, out)

    monkeypatch.setattr(forward, "batch_residuals", limited)


def test_out_of_memory_stops_resumably_and_names_the_batch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = begun(root, tmp_path)
    with monkeypatch.context() as patch:
        run_out(patch, most=1)
        with pytest.raises(OutOfMemory, match=r"unit 0: .* 2 rows .*oom=halve") as error:
            harvest(target, open_model(root), FileText(root / "text.jsonl"))
        assert error.value.batch == 2
    finish(root, target)


def test_halving_goes_on_and_records_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = replace(begun(root, tmp_path), faults=Faults(oom="halve"))
    with monkeypatch.context() as patch:
        run_out(patch, most=1)
        store = harvest(target, open_model(root), FileText(root / "text.jsonl"))
    assert "batch=1" in capsys.readouterr().err
    assert store.batches(1).tolist() == [1] * 8
    for unit in range(8):  # recomputed with the batch on record, whatever memory there is now
        lm = open_model(root)
        lm.truncate_(4)
        selfcheck.require_same(store, lm, unit, [HookPoint(1), HookPoint(4)])


def test_another_model_tokenizer_or_setting_is_refused_with_both_values(
    root: Path, tmp_path: Path
) -> None:
    target, source = begun(root, tmp_path), FileText(root / "text.jsonl")
    lm = open_model(root)
    for key in ("weights", "tokenizer", "config"):
        lm.identity = {**open_model(root).identity, key: "other"}
        with pytest.raises(MismatchError, match=f"model.{key} .*'[0-9a-f]+'.*'other'"):
            harvest(target, lm, source)
    (tmp_path / "text.jsonl").write_text('{"text": "Something else."}')
    with pytest.raises(MismatchError, match=r"text.files.text.jsonl .*'[0-9a-f]+'.*'[0-9a-f]+'"):
        harvest(target, open_model(root), FileText(tmp_path / "text.jsonl"))


# -- text and time ---------------------------------------------------------------------------------


def test_a_text_that_raises_in_the_middle_goes_on_where_it_was(root: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(250)))
    plain, breaking = FileText(tmp_path / "lines.jsonl"), Breaking(tmp_path / "lines.jsonl")
    whole = harvest(config(tmp_path / "whole.zarr"), open_model(root), plain)
    with pytest.raises(StoreError, match="the line went dead"):
        harvest(config(tmp_path / "s.zarr"), open_model(root), breaking)
    assert 0 < Store.open(tmp_path / "s.zarr").ledger.spine_rows.astype(bool).sum() < 8
    harvest(config(tmp_path / "s.zarr"), open_model(root), breaking)
    assert tree(tmp_path / "s.zarr") == tree(whole.name)


def test_a_document_that_cannot_be_stored_ends_a_harvest_that_goes_on_without_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f'{{"text": "{n}"}}' for n in range(250)]
    lines[100] = r'{"text": "cut \ud83d in two"}'
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    target, source = config(tmp_path / "s.zarr"), FileText(tmp_path / "lines.jsonl")
    with pytest.raises(DocumentError, match=r"lines.jsonl line 101.*text.bad=skip"):
        harvest(target, open_model(root), source)
    capsys.readouterr()
    skipping = replace(target, faults=Faults(bad="skip"))
    store = harvest(skipping, open_model(root), source)
    assert "text.bad=skip: 1 not Unicode" in capsys.readouterr().err
    numbers = {int(number) for unit in range(store.units) for number in store.document(unit).flat}
    assert 100 not in numbers and {99, 101} <= numbers


def test_a_parent_that_left_is_told_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokenizer = FileText(root / "text.jsonl"), open_model(root).tokenizer
    monkeypatch.setattr(retry, "sleep", retry.sleep)  # the writing process sets its own
    for store in (root / "done.zarr", tmp_path / "none.zarr"):  # all is written, and: it fails
        ours, theirs = Pipe()
        ours.close()
        with theirs:
            work(theirs, str(store), source, tokenizer)


def test_clocks_that_jump_change_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = iter(range(10**9, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    monkeypatch.setattr(time, "time_ns", lambda: next(jumps) * 10**9)
    finish(root, begun(root, tmp_path))
