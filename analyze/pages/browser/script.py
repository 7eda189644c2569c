"""Data as scripts: `loaded(NAME, VALUE);`, which a page takes from any static host and from a disk
alike.

A browser refuses to fetch from file://, but runs a script that lies beside the page. A file is
ASCII whatever the text is (a host may call it any charset), and `<` is escaped too, so it could
stand in a page as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 4  # of a number, significant


def script(name: str, value: Any) -> bytes:
    """The file that hands `value` (plain JSON without NaN) to the page as `name`."""
    said = (
        json.dumps(one, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        for one in (name, value)
    )
    return f"loaded({','.join(said)});\n".encode("ascii")


def short(values: Iterable[float] | NDArray[np.floating[Any]]) -> list[float | None]:
    """Numbers of few digits; None for NaN and infinity."""
    every = values.tolist() if isinstance(values, np.ndarray) else values
    rounded = (float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in every)
    return [int(value) if value is not None and value == int(value) else value for value in rounded]
