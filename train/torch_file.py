"""Files that torch.save wrote, which may be anybody's.

They are read with weights_only, so no code of theirs runs. What may still fill the memory or never
end is refused before: compressed parts, and pickles that torch.save does not write.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from residual_saes.data.foreign import reading, require_file

_ZIP = b"PK\x03\x04"
_PICKLE_BYTES = 1 << 20  # of the part that names tensors: an SAE's has 1 kB
_TUPLES = 10_000  # in it: each tensor has three


def load(path: Path, way_out: str) -> Any:
    """What a file holds, on the CPU.

    Raises:
        StoreError: it is missing, unreadable, or holds anything but tensors and plain values.
    """
    size = require_file(path, way_out)
    with reading(f"{path} cannot be read as an SAE", way_out):
        _require_plain(path, size)
        return torch.load(path, map_location="cpu", weights_only=True)


def _require_plain(path: Path, size: int) -> None:
    """Raise ValueError unless the file's parts are as large as they say, and its pickle flat."""
    with path.open("rb") as file:
        begins = file.read(len(_ZIP))
    if begins != _ZIP:  # torch would take it for an older format
        raise ValueError("it is no zip file, as torch.save has written since version 1.6")
    with zipfile.ZipFile(path) as parts:
        infos = parts.infolist()
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
        if not stored or sum(info.file_size for info in infos) > size:
            raise ValueError("its parts are compressed, and may be of any size")
        for info in infos:
            if info.filename.endswith(".pkl"):
                if info.file_size > _PICKLE_BYTES:
                    raise ValueError(f"{info.filename} has {info.file_size:,} bytes")
                _require_flat(parts.read(info))


def _require_flat(pickled: bytes) -> None:
    """Raise ValueError for tuples that cannot be hashed as keys.

    That of a tuple which holds another one twice, and so on, takes twice as long at each level; a
    very deep one overflows the stack.
    """
    tuples = 0
    memoised: set[int] = set()
    was_tuple = False
    operation: tuple[Any, Any, Any]
    for operation in pickletools.genops(pickled):
        code, argument, _ = operation
        name = code.name
        if was_tuple and name.endswith("PUT"):
            memoised.add(int(argument))
            continue
        if name == "DUP" or (name.endswith("GET") and int(argument) in memoised):
            raise ValueError("its pickle holds a value within itself several times")
        was_tuple = name.startswith("TUPLE")
        tuples += was_tuple
    if tuples > _TUPLES:
        raise ValueError(f"its pickle has {tuples:,} tuples")
