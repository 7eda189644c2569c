"""Numbers as people write them on a command line, made exact."""

from __future__ import annotations

from typing import Any

from data.errors import SettingError


def whole(name: str, value: Any) -> int:
    """`value` as an integer: 1e9 arrives as a float and is one; 1e9.5 arrives as text, 0.5 is no whole number.

    Raises:
        SettingError: it is not a whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise SettingError(f"{name}={value} must be a whole number, such as 21, 200000 or 2e5")


def optional_whole(name: str, value: Any) -> int | None:
    """Like `whole`, with None for a setting that is left open."""
    return None if value is None else whole(name, value)
