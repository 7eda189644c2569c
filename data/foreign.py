"""Bytes that are not ours: what a library raises on them becomes one line with a way out.

Libraries that read files have no list of what they raise, and hostile files find the rest: a
RecursionError for deep nesting, a MemoryError for a size that a header claims, a panic of Rust
code. So no list of classes stands where such a file is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from residual_saes.data.errors import PipelineError, StoreError, caused, first_line
from residual_saes.data.machine import is_out_of_memory
from residual_saes.data.neutral import neutral

_LONGEST = 200  # characters of a library's message
JSON_BYTES = 1 << 26  # of a configuration; the largest index of a model's shards has 10 MB
YAML_BYTES = 1 << 17  # of a run's settings, which have 2 kB; PyYAML reads 100 kB/s
_NODES = 1 << 16  # of YAML, with what its aliases stand for


@contextmanager
def reading(what: str, way_out: str, kind: type[PipelineError] = StoreError) -> Iterator[None]:
    """Turn whatever a library raises on foreign bytes into one `kind`: "what: reason; way out".

    Keep the block small: a defect of our own in it would be taken for one of the bytes.

    Args:
        what: the file, or what else is read.
        way_out: what the user can do about it.

    Raises:
        TemporaryError: the disk or the network is what failed.
    """
    try:
        yield
    except PipelineError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise  # a stop, which is no fault of the bytes
        raise caused(error, f"{neutral(what)}: {reason(error)}", way_out, kind) from error


def require_file(path: Path, way_out: str, kind: type[PipelineError] = StoreError) -> int:
    """The bytes of a regular file, whose reading ends: that of a pipe or a device may not.

    Raises:
        PipelineError: of `kind`, it is missing or no regular file.
    """
    with reading(str(path), way_out, kind):
        size = path.stat().st_size
    if not path.is_file():
        raise kind(f"{neutral(str(path))} is no regular file; {way_out}")
    return size


def content(path: Path, most: int, way_out: str, kind: type[PipelineError] = StoreError) -> bytes:
    """The bytes of a small file.

    Args:
        most: bytes that such a file may have.

    Raises:
        PipelineError: of `kind`, as `require_file`, or it is larger, or cannot be read.
    """
    size = require_file(path, way_out, kind)
    if size > most:
        name = neutral(str(path))
        raise kind(f"{name} has {size:,} bytes, and such a file at most {most:,}; {way_out}")
    with reading(str(path), way_out, kind):
        return path.read_bytes()


def json_object(path: Path, way_out: str, kind: type[PipelineError] = StoreError) -> dict[str, Any]:
    """A configuration: a file with one JSON object.

    Raises:
        PipelineError: of `kind`, as `content`, or it holds anything else, or a key twice.
    """
    data = content(path, JSON_BYTES, way_out, kind)
    with reading(str(path), way_out, kind):
        value = json.loads(data, object_pairs_hook=_unique)
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    return value


def yaml_object(path: Path, way_out: str, kind: type[PipelineError] = StoreError) -> dict[str, Any]:
    """A file with one YAML mapping, without Python's own tags.

    Raises:
        PipelineError: of `kind`, as `content`, or it holds anything else, or names that stand for
            more than a file may have.
    """
    import yaml

    data = content(path, YAML_BYTES, way_out, kind)
    with reading(str(path), way_out, kind):
        if sum(1 for _ in _nodes(yaml.compose(data, yaml.SafeLoader))) == _NODES:
            raise ValueError("it says too much, by names that stand for other names")
        value = yaml.safe_load(data)
        if not isinstance(value, dict):
            raise ValueError("it is no mapping")
    return value


def _nodes(root: Any) -> Iterator[Any]:
    """The nodes of a document with every alias followed, up to `_NODES`: it may hold itself."""
    waiting = [root] if root else []
    for _ in range(_NODES):
        if not waiting:
            return
        node = waiting.pop()
        yield node
        if node.id == "sequence":
            waiting += node.value
        elif node.id == "mapping":
            for pair in node.value:
                waiting += pair


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):  # readers differ in which of the two they take
        raise ValueError("it has a key twice")
    return value


def reason(error: BaseException) -> str:
    """Why a library gave up, in a few words on one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if is_out_of_memory(error):
        return "it wants more memory than there is"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not {error.encoding} from byte {error.start:,} on"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return shortened(f"it has no entry {first_line(error)}")
    text = first_line(error)
    name = type(error).__name__
    return shortened(text if text == name else f"{name}: {text}")


def _is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a Rust extension, which pyo3 derives from BaseException."""
    return type(error).__module__ == "pyo3_runtime"


def shortened(text: str) -> str:
    """Some words of a stranger for a message: on one line, and not for ever."""
    line = neutral(text[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
