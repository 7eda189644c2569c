"""Parts of a result while it is made, on the disk: a stop costs no more than the part at hand."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.results import made
from residual_saes.data import sealed

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Parts:
    """A folder of parts, a file each. A file holds its digest, and a damaged one is made again."""

    folder: Path | None = None  # None: parts are made each time they are asked for

    def of(self, number: int, make: Callable[[], Arrays]) -> Arrays:
        """Part `number`: what `make` gives, or gave before a stop."""
        if self.folder is None:
            return make()
        path = self.folder / f"{number:06d}.npz"
        if (there := sealed.read(path)) is not None:
            with np.load(io.BytesIO(there)) as file:
                return {name: file[name] for name in file.files}
        arrays = make()
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        made(self.folder)
        sealed.write(path, [content.getbuffer()])
        return arrays

    def within(self, name: str) -> Parts:
        """Parts of one of these parts, in a folder beside it."""
        return Parts(self.folder and self.folder / name)

    def remove(self) -> None:
        """Remove all parts: what they were for is whole."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


NOWHERE = Parts()
