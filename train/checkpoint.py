"""Checkpoints: with one, a killed run ends with the bits of one that was not killed.

checkpoint/step_00001000.safetensors holds the state's tensors, step_00001000.json the rest, the
tensors' digest and its own. Both are written whole and durably, tensors first; the two newest
pairs stay. A pair that is torn or flipped is passed over for the one before it.

What a run that follows a ring may rely on (data/store/ring.py): rows are released only behind the
older of two checkpoints that are whole and durable. Each was written by this process, or its digest
was checked when this process began. What is older, damaged or half written was removed for good
before. So whatever a power loss leaves, the rows behind the checkpoint that is taken up are there.

No random state is kept, because nothing is drawn after the initial weights: a batch is a pure
function of (seed, step).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from residual_saes.data import durable
from residual_saes.data.durable import Buffer, Written
from residual_saes.data.errors import StoreError
from residual_saes.data.safetensors import Entry, header
from residual_saes.data.store import records

_KEEP = 2
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # those of a state
_RECORD = re.compile(r"step_(\d{10})\.json")
_FILE = re.compile(r"step_\d{10}\.(json|safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run."""

    step: int  # optimizer steps done
    metrics_bytes: int  # length of metrics.jsonl
    settings: str  # digest of the run's settings, store included
    tensors: dict[str, Tensor]  # the state's tensors by name
    metrics_digest: str = ""  # xxh3_128 of those bytes; "": of an earlier version, not recorded
    timings: Written | None = None  # timings.jsonl; None: likewise


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably, then drop all but the two newest, for good."""
    name = _name(checkpoint.step)
    written = durable.write(folder / f"{name}.safetensors", _safetensors(checkpoint.tensors))
    body = {
        "step": checkpoint.step,
        "metrics_bytes": checkpoint.metrics_bytes,
        "settings": checkpoint.settings,
        "tensors": list(written),
        "metrics_digest": checkpoint.metrics_digest,
        "timings": checkpoint.timings and list(checkpoint.timings),
    }
    durable.write(folder / f"{name}.json", [records.encode(body)])
    keep(folder, _steps(folder)[:_KEEP])


def keep(folder: Path, steps: Iterable[int]) -> None:
    """Remove the files of all checkpoints but those of `steps`, for good.

    Raises:
        StoreError: the disk refused.
    """
    kept = {_name(step) for step in steps}
    found = [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: path.suffix):  # records first
        if path.stem not in kept:
            with durable.refusals(path):
                path.unlink(missing_ok=True)
    with durable.refusals(folder):
        # Also if nothing was left to remove: a killed process may have removed it without this.
        durable.sync_directory(folder)


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[Buffer]:
    """The parts of a safetensors file, one tensor in memory at a time."""
    entries = {}
    for name, tensor in tensors.items():
        entries[name] = Entry(_DTYPES[tensor.dtype], tensor.shape, tensor.nbytes)
    yield header(entries)
    for tensor in tensors.values():  # device sync, for each
        yield tensor.cpu().contiguous().view(-1).numpy().data.cast("B")


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, if any, and the names of newer damaged ones."""
    passed_over: list[str] = []
    for step in _steps(folder):
        try:
            record = _whole(folder, step)
        except StoreError:
            passed_over.append(_name(step))
            continue
        timings = record.get("timings")
        saved = Checkpoint(
            step=step,
            metrics_bytes=record["metrics_bytes"],
            settings=record["settings"],
            tensors=safetensors.torch.load_file(folder / f"{_name(step)}.safetensors"),
            metrics_digest=record.get("metrics_digest", ""),
            timings=timings and Written(*timings),
        )
        return saved, passed_over
    return None, passed_over


def check(folder: Path) -> Iterator[tuple[str, int | None]]:
    """The name of each checkpoint, the newest first, and its bytes; None: it is damaged."""
    for step in _steps(folder) if folder.is_dir() else ():
        try:
            nbytes = int(_whole(folder, step)["tensors"][0])
        except (StoreError, OSError):
            if not (folder / f"{_name(step)}.json").exists():
                continue  # a training has dropped it meanwhile
            nbytes = None
        yield _name(step), nbytes


def seen(folder: Path) -> tuple[Written, Written] | None:
    """metrics.jsonl and timings.jsonl as the newest whole record saw them; None: nothing says it.

    The tensors of that checkpoint are not read.
    """
    for step in _steps(folder) if folder.is_dir() else ():
        with suppress(StoreError, FileNotFoundError):
            path = folder / f"{_name(step)}.json"
            body = records.decode(path.read_bytes(), str(path))
            if body.get("timings"):
                metrics = Written(body["metrics_bytes"], body["metrics_digest"])
                return metrics, Written(*body["timings"])
    return None


def fallback(folder: Path, step: int) -> int:
    """The step of the newest whole checkpoint before `step`; 0, the start, if there is none."""
    for earlier in _steps(folder):
        with suppress(StoreError):
            if earlier < step and _whole(folder, earlier):
                return earlier
    return 0


def oldest(folder: Path) -> int:
    """The earliest step that training may fall back to: 0 until two checkpoints are kept.

    All that are there are taken for whole, as they are after `keep` and `save`.
    """
    kept = [step for step in _steps(folder) if (folder / f"{_name(step)}.safetensors").exists()]
    return kept[_KEEP - 1] if len(kept) >= _KEEP else 0


def _whole(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint's record says; StoreError if a byte of the pair is not what was written."""
    path = folder / f"{_name(step)}.json"
    record = records.decode(path.read_bytes(), str(path))
    data = path.with_suffix(".safetensors")
    digest = durable.digest_file(data) if data.exists() else None
    if record["step"] != step or digest != Written(*record["tensors"]):
        raise StoreError(f"{data} is missing or not what was written")
    return record


def _name(step: int) -> str:
    return f"step_{step:010d}"


def _steps(folder: Path) -> list[int]:
    """The steps of which there is a record, the newest first."""
    found = [match for path in folder.iterdir() if (match := _RECORD.fullmatch(path.name))]
    return sorted((int(match[1]) for match in found), reverse=True)
