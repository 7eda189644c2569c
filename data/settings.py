"""Settings as people write them on a command line, made exact."""

from __future__ import annotations

from typing import Any

from data.errors import SettingError


def whole(name: str, value: Any) -> int:
    """`value` as an integer: 1e9 arrives as a float and is one; 1e9.5 arrives as text, 0.5 is no whole number.

    Raises:
        SettingError: it is not a whole number.
    """
    exact = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if exact and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise SettingError(f"{name}={value} is too large; its size must be below 2^63")
        return int(value)
    raise SettingError(f"{name}={value} must be a whole number, such as 21, 200000 or 2e5")


def flag(name: str, value: Any) -> bool:
    """`value` if it is true or false; any other word would be taken for true.

    Raises:
        SettingError: it is neither.
    """
    if not isinstance(value, bool):
        raise SettingError(f"{name}={value} must be true or false")
    return value


def optional_whole(name: str, value: Any) -> int | None:
    """Like `whole`, with None for a setting that is left open."""
    return None if value is None else whole(name, value)
