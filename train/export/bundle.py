"""A bundle: the folder of an export or a release, with the record of what belongs to it.

digests.json (data/digests.py) is written first here: it names each file by what it is going to
hold. So a folder whose writing was stopped is refused. Without a record it would be taken for
another author's, who has none. Files of what was written there before are removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from residual_saes.data import digests, durable, locks
from residual_saes.data.durable import Buffer, Written
from residual_saes.data.errors import StoreError, TemporaryError, caused

_AGAIN = "restore or download it, or write it again"
_BLOCK_BYTES = 1 << 22

Content = bytes | Path  # of a file; the file at a path is copied


def write(folder: Path, files: Mapping[str, Content]) -> dict[str, int]:
    """Make `folder` hold these files by their paths in it, and no others; bytes of each.

    Raises:
        StoreError: it holds a file that was not written here, or the disk refused.
        TemporaryError: another process writes it, or a file changed while it was copied.
    """
    busy = f"{folder} is being written by another process; wait, or choose another out="
    with locks.locked(folder, busy):
        durable.sweep(folder)
        _remove_earlier(folder, files)
        expected = {name: _expected(content) for name, content in files.items()}
        digests.put(folder, expected)
        for name, content in files.items():
            durable.make_directory((folder / name).parent)
            if durable.write(folder / name, _parts(content)) != expected[name]:
                raise TemporaryError(f"{content!s} changed while it was copied; copy it again")
    sizes = {name: written.bytes for name, written in expected.items()}
    return {**sizes, digests.FILE: (folder / digests.FILE).stat().st_size}


def _remove_earlier(folder: Path, files: Mapping[str, Content]) -> None:
    """Remove what was written before and is not among `files`; StoreError if it is foreign."""
    kept = digests.read(folder, f"delete {folder}, or choose another out=")
    earlier = kept.files if kept else {}
    stale = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in files or name in (digests.FILE, locks.FILE):
            continue
        if name not in earlier:
            raise StoreError(
                f"{path} is not of what is written there; delete it, or choose another out="
            )
        stale.append(path)
    for path in stale:
        path.unlink()


def _expected(content: Content) -> Written:
    if isinstance(content, bytes):
        return Written(len(content), durable.digest(content))
    try:
        return durable.digest_file(content)
    except OSError as error:
        got = f"{content} cannot be read: {error.strerror}"
        raise caused(error, got, "restore it") from error


def _parts(content: Content) -> Iterator[Buffer]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def require_whole(path: Path) -> None:
    """Raise StoreError if a file, or one below a folder, is not what was written there.

    Nothing says that of another author's, which pass.
    """
    path = path.absolute()
    if path.is_dir() and (kept := digests.read(path, _AGAIN)):
        kept.require(kept.files, _AGAIN)
    elif kept := digests.read(path.parent, _AGAIN):
        below = f"{path.name}/"
        names = [name for name in kept.files if name.startswith(below)]
        kept.require(names if path.is_dir() else [path.name], _AGAIN)
