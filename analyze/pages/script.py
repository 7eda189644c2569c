"""Data as scripts: `loaded(NAME, VALUE);`, which a page takes from a static host and from a disk.

A browser refuses to fetch from file://, but runs a script that lies beside the page. A file is
ASCII whatever the text is, since a host may declare any charset. `<` is escaped too, so the script
could stand in a page as well.
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
    return f"loaded({_json(name)},{_json(value)});\n".encode("ascii")


def loaded(content: bytes) -> Any:
    """What the file that `script` made hands to the page."""
    text = content.decode("ascii")
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def _json(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def short(values: Iterable[float] | NDArray[np.floating[Any]]) -> list[float | None]:
    """Numbers of DIGITS digits, whole ones as integers; None for NaN and infinity."""
    numbers = values.tolist() if isinstance(values, np.ndarray) else values
    rounded: list[float | None] = []
    for number in numbers:
        if not np.isfinite(number):
            rounded.append(None)
            continue
        few = float(f"{number:.{DIGITS}g}")
        rounded.append(int(few) if few == int(few) else few)
    return rounded
