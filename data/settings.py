"""Settings as people write them on a command line, made exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from data.errors import SettingError

T = TypeVar("T")


def whole(name: str, value: Any) -> int:
    """`value` as an integer: 1e9 arrives as a float and is one; 1e9.5 arrives as text, 0.5 is no
    whole number.

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


def number(name: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        SettingError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingError(f"{name}={value} must be a number")
    return float(value)


def names(name: str, value: Any, known: Iterable[str]) -> list[str]:
    """One of `known`, or a list of them, or `all`.

    Raises:
        SettingError: one is not known, or none is named.
    """
    allowed = list(known)
    asked = (
        allowed
        if value == "all"
        else list(dict.fromkeys(value))
        if isinstance(value, list)
        else [value]
    )
    for one in asked or ["[]"]:
        if one not in allowed:
            raise SettingError(f"{name}={one} must be one of {', '.join(allowed)}, or all")
    return asked


_READ = {"int": whole, "float": number, "bool": flag}


def build(kind: type[T], group: str, values: Mapping[str, Any]) -> T:
    """A frozen dataclass from a group's plain values: whole numbers may be written as 1e7.

    Raises:
        SettingError: a value is unknown, or of another type than its field.
    """
    known: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if unknown := sorted(values.keys() - known.keys()):
        raise SettingError(f"{group}.{unknown[0]} is not a setting; {group} has {', '.join(known)}")
    return kind(
        **{
            key: _typed(f"{group}.{key}", known[key].type.split(" | "), value)
            for key, value in values.items()
        }
    )


def _typed(name: str, types: list[str], value: Any) -> Any:
    if value is None and "None" not in types:
        raise SettingError(f"{name}=null must be given a value")
    if value is None or (isinstance(value, str) and "str" in types) or types[0] not in _READ:
        return value
    return _READ[types[0]](name, value)
