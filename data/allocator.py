"""The C library's allocator."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Of malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4


@contextmanager
def kept_when_freed() -> Iterator[None]:
    """Let glibc keep what is freed within the block, for the next step to use again.

    By itself it gives large tensors back, and the next ones cost a page fault every 4 KiB: an 84 MB
    gradient took 87 ms to write, and 16 in memory that was kept.
    """
    try:
        library = ctypes.CDLL(None)
        tune = library.mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        yield
        return
    if not tune(_MMAP_THRESHOLD, 1 << 30):  # glibc before 2.35 allows 32 MiB
        tune(_MMAP_MAX, 0)
    tune(_TRIM_THRESHOLD, (1 << 31) - 1)
    tune(_TOP_PAD, 64 << 20)
    try:
        yield
    finally:
        library.malloc_trim(0)
