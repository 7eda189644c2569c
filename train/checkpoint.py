"""Checkpoints: with one, a killed run ends with the bits of one that was not killed.

checkpoint/step_00001000.safetensors holds the state's tensors, step_00001000.json the rest, the
tensors' digest and its own. Both are written once under a new name, tensors first; the two newest
pairs stay. A pair that is torn or flipped is passed over for the one before it.

No random state is kept, because nothing is drawn after the initial weights: a batch is a pure
function of (seed, step).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from data import durable
from data.durable import Buffer, Written
from data.errors import StoreError
from data.safetensors import Entry, header
from data.store import records

_KEEP = 2
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # those of a state
_RECORD = re.compile(r"step_(\d{10})\.json")


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run."""

    step: int  # optimizer steps done
    metrics_bytes: int  # length of metrics.jsonl
    settings: str  # digest of the run's settings, store included
    tensors: dict[str, Tensor]  # the state's tensors by name


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably, then drop all but the two newest."""
    name = f"step_{checkpoint.step:010d}"
    (folder / f"{name}.json").unlink(missing_ok=True)  # there only if it was passed over as damaged
    written = durable.write(folder / f"{name}.safetensors", _safetensors(checkpoint.tensors))
    body = {
        "step": checkpoint.step,
        "metrics_bytes": checkpoint.metrics_bytes,
        "settings": checkpoint.settings,
        "tensors": list(written),
    }
    durable.create(folder / f"{name}.json", records.encode(body))
    _drop_old(folder)


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[Buffer]:
    """The parts of a safetensors file, one tensor in memory at a time."""
    entries = {}
    for name, tensor in tensors.items():
        entries[name] = Entry(_DTYPES[tensor.dtype], tensor.shape, tensor.nbytes)
    yield header(entries)
    for tensor in tensors.values():
        yield tensor.cpu().contiguous().view(-1).numpy().data.cast("B")


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, if any, and the names of newer damaged ones."""
    passed_over: list[str] = []
    for path in _newest_first(folder):
        try:
            return _read(path), passed_over
        except StoreError:
            passed_over.append(path.stem)
    return None, passed_over


def oldest(folder: Path) -> int:
    """The earliest step that training may fall back to: 0 until there are two checkpoints."""
    kept = list(_newest_first(folder))
    return int(kept[-1].stem.removeprefix("step_")) if len(kept) >= _KEEP else 0


def _read(path: Path) -> Checkpoint:
    body = records.decode(path.read_bytes(), str(path))
    data = path.with_suffix(".safetensors")
    digest = durable.digest_file(data) if data.exists() else None
    if digest != Written(*body["tensors"]):
        raise StoreError(f"{data} is missing or not what was written")
    tensors = safetensors.torch.load_file(data)
    return Checkpoint(body["step"], body["metrics_bytes"], body["settings"], tensors)


def _newest_first(folder: Path) -> Iterator[Path]:
    yield from sorted((p for p in folder.glob("*.json") if _RECORD.fullmatch(p.name)), reverse=True)


def _drop_old(folder: Path) -> None:
    """Remove all but the newest records, then every tensor file without a record."""
    kept = list(_newest_first(folder))
    for path in kept[_KEEP:]:
        path.unlink(missing_ok=True)
    stems = {path.stem for path in kept[:_KEEP]}
    for path in folder.glob("*.safetensors"):
        if path.stem not in stems:
            path.unlink(missing_ok=True)
