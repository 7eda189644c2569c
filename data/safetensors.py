"""The header of a safetensors file, for files that are written tensor by tensor.

The library's own `save` holds all tensors twice: 4 GB more for a checkpoint of 32,768 latents at
width 2560. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """A tensor in the file."""

    dtype: str  # as the format names it: F32, I64, U16, ...
    shape: Sequence[int]
    nbytes: int


def header(entries: Mapping[str, Entry]) -> bytes:
    """The bytes before the tensors, which follow in the order of `entries` without gaps."""
    described = {}
    start = 0
    for name, entry in entries.items():
        end = start + entry.nbytes
        described[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
