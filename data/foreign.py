"""Bytes that are not ours: what a library raises on them becomes one line with a way out.

Libraries that read files have no list of what they raise, and hostile files find the rest: a
RecursionError for deep nesting, a MemoryError for a size that a header claims, a panic of Rust
code. So no list of classes stands where such a file is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import PipelineError, StoreError, caused, first_line
from data.machine import is_out_of_memory
from data.neutral import neutral

_LONGEST = 200  # characters of a library's message


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
        return _bounded(f"it has no entry {first_line(error)}")
    text = first_line(error)
    name = type(error).__name__
    return _bounded(text if text == name else f"{name}: {text}")


def _is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a Rust extension, which pyo3 derives from BaseException."""
    return type(error).__module__ == "pyo3_runtime"


def _bounded(text: str) -> str:
    line = neutral(text)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
