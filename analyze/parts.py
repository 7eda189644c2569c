"""Parts of a result while it is made, on the disk: a stop costs no more than the part at hand."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze.results import made
from data import durable

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Parts:
    """A folder of parts, a file each. A file holds checksums, and a damaged one is made again."""

    folder: Path | None = None  # None: parts are made each time they are asked for

    def of(self, number: int, make: Callable[[], Arrays]) -> Arrays:
        """Part `number`: what `make` gives, or gave before a stop."""
        if self.folder is None:
            return make()
        path = self.folder / f"{number:06d}.npz"
        if (there := _read(path)) is not None:
            return there
        arrays = make()
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        made(self.folder)
        durable.write(path, [content.getbuffer()])
        return arrays

    def remove(self) -> None:
        """Remove all parts: what they were for is whole."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> Arrays | None:
    """The arrays of a part; None if it is missing or damaged."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


NOWHERE = Parts()
