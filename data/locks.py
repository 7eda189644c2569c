"""Locks on folders, where the file system has any.

A lock ends with its process at the latest.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from residual_saes.data import durable
from residual_saes.data.errors import TemporaryError, caused
from residual_saes.data.journal import tell

# What file systems answer that have no such locks: FUSE mounts, Lustre without flock, some NFS.
NONE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
FILE = ".lock"  # in a folder that cannot be locked itself


@contextmanager
def locked(folder: Path, busy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of `folder` for a `with` block; it ends with the process at the latest.

    Makes the folder if need be, and removes the temporaries of killed processes directly in it:
    under the lock none can be in use. Its subfolders may have locks of their own. Without any
    locks, one line says so and nothing is removed.

    Args:
        shared: others may hold it as well, if all do so with `shared`; then nothing is removed.

    Raises:
        TemporaryError: another process on this machine holds the lock; `busy` is the message.
    """
    durable.make_directory(folder)
    handles = [os.open(folder, os.O_RDONLY)]
    try:
        held = _taken(folder, handles, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if held is None:
            tell(
                f"{folder} is on a file system without locks: nothing keeps a second process from "
                "writing there, so see that there is none"
            )
        elif not held:
            raise TemporaryError(busy)
        elif not shared:
            durable.remove_temporaries(folder, os.listdir(folder))
        yield
    finally:
        for handle in handles:
            os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether another process holds the lock of `folder`, where folders themselves have locks."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not durable.lock(fcntl.flock, handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)


def _taken(folder: Path, handles: list[int], kind: int) -> bool | None:
    """Lock a folder by what its file system has; None: it has no locks.

    Args:
        kind: LOCK_EX or LOCK_SH.
        handles: the folder's. The lock is held until all that are in it afterwards are closed.
    """
    how = kind | fcntl.LOCK_NB
    try:
        return durable.lock(fcntl.flock, handles[0], how)
    except OSError as error:
        _require_none(folder, error)
    with durable.refusals(folder / FILE):
        handles.append(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666))
    try:
        return durable.lock(fcntl.lockf, handles[1], how)
    except OSError as error:
        _require_none(folder, error)
    return None


def _require_none(folder: Path, error: OSError) -> None:
    """Raise unless `error` says that the file system has no such locks."""
    if error.errno not in NONE:
        got = f"{folder} cannot be locked: {error.strerror}"
        raise caused(error, got, "choose another place") from error
