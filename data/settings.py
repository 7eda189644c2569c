"""Settings as people write them on a command line, with exact types."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from residual_saes.data.errors import SettingError

T = TypeVar("T")
_POWERS = {"k": 3, "m": 6, "b": 9, "g": 9}  # as people write 200k, 1M and 1B


def whole(name: str, value: Any) -> int:
    """`value` as an integer: 1e9 arrives as a float and is one; 0.5 and text are none.

    Raises:
        SettingError: it is not a whole number.
    """
    exact = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if exact and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise SettingError(f"{name}={value} is too large; its size must be below 2^63")
        return int(value)
    short = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbg])", str(value).lower())
    hint = f"; did you mean {name}={short[1]}e{_POWERS[short[2]]}?" if short else ""
    raise SettingError(f"{name}={value} must be a whole number, such as 21, 200000 or 2e5{hint}")


def flag(name: str, value: Any) -> bool:
    """`value` if it is true or false: Python takes most other values for true.

    Raises:
        SettingError: it is neither.
    """
    if not isinstance(value, bool):
        raise SettingError(f"{name}={value} must be true or false")
    return value


def single(name: str, value: Any) -> Any:
    """`value`, unless it is a list.

    Raises:
        SettingError: it is one.
    """
    if isinstance(value, list):
        raise SettingError(f"{name}=[{','.join(map(str, value))}] must be one, and not a list")
    return value


def optional_whole(name: str, value: Any) -> int | None:
    """Like `whole`; None stays None."""
    return None if value is None else whole(name, value)


def number(name: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        SettingError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingError(f"{name}={value} must be a number")
    return float(value)


def require_like(name: str, value: Any, default: Any) -> None:
    """Require a value of the type of its setting's default, if that is a number, true or false.

    Raises:
        SettingError: it has another type.
    """
    if isinstance(default, bool):
        flag(name, value)
    elif isinstance(value, list) or value == "auto":
        return  # some settings take several numbers, or make their own
    elif isinstance(default, int):
        whole(name, value)
    elif isinstance(default, float):
        number(name, value)


def names(name: str, value: Any, known: Iterable[str]) -> list[str]:
    """One of `known`, or a list of them, or `all`.

    Raises:
        SettingError: a name is unknown, or the list is empty.
    """
    allowed = list(known)
    if value == "all":
        return allowed
    asked = list(dict.fromkeys(value)) if isinstance(value, list) else [value]
    for item in asked or ["[]"]:
        if item not in allowed:
            raise SettingError(f"{name}={item} must be one of {', '.join(allowed)}, or all")
    return asked


_READ = {"int": whole, "float": number, "bool": flag}


def build(kind: type[T], group: str, values: Mapping[str, Any]) -> T:
    """A frozen dataclass from a group's plain values; whole numbers may be written as 1e7.

    Raises:
        SettingError: a name is unknown, or a value has another type than its field.
    """
    known: dict[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if unknown := sorted(values.keys() - known.keys()):
        raise SettingError(f"{group}.{unknown[0]} is not a setting; {group} has {', '.join(known)}")
    typed = {}
    for name, value in values.items():
        types = known[name].type.split(" | ")
        typed[name] = _typed(f"{group}.{name}", types, value)
    return kind(**typed)


def _typed(name: str, types: list[str], value: Any) -> Any:
    if value is None and "None" not in types:
        raise SettingError(f"{name}=null must be given a value")
    if value is None or (isinstance(value, str) and "str" in types) or types[0] not in _READ:
        return value
    return _READ[types[0]](name, value)
