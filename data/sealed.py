"""A file with its own digest in its first line, for what lies alone or grows.

    {"checksum": ..., "xxh3_128": ...}
    content

Each write replaces the whole file, so what was there before is whole until the new content is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from residual_saes.data import durable
from residual_saes.data.durable import Buffer
from residual_saes.data.errors import first_line
from residual_saes.data.journal import tell
from residual_saes.data.store import records


def write(path: Path, parts: Sequence[Buffer]) -> None:
    """Write `parts` as the content of `path`, durably.

    Raises:
        StoreError: the disk refused; the file that was there before is untouched.
    """
    head = records.encode({"xxh3_128": durable.digest(*parts)})
    durable.write(path, [head, *parts])


def read(path: Path) -> bytes | None:
    """The content of `path`; None if it is missing or, as one line then says, damaged."""
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        tell(f"{path} cannot be read ({first_line(error)}) and is made again")
        return None
    if _is_whole(head + b"\n", content):
        return content
    tell(f"{path} does not hold the bytes that were written and is made again")
    return None


def is_whole(path: Path) -> bool | None:
    """Whether a file holds what was written; None: it has no digest of its own, or is gone.

    Raises:
        OSError: it cannot be read.
    """
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    # A flipped bit is in one of these, at most.
    is_sealed = head.startswith(records.HEAD) or b'"xxh3_128"' in head[: 2 * len(records.HEAD) + 64]
    return _is_whole(head + b"\n", content) if is_sealed else None


def _is_whole(head: bytes, content: bytes) -> bool:
    if records.fault(head):
        return False
    return bool(durable.digest(content) == records.decode(head, "")["xxh3_128"])
