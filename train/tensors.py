"""What a file may hold: dense tensors of finite real numbers, and whole numbers.

Files of SAEs may be anybody's. Each function raises StoreError in one line, with the file or its
folder, what it has, and what can be taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residual_saes.data.errors import StoreError
from residual_saes.data.foreign import shortened

_TEXT = 1000  # characters of a name
_SHOWN = 80  # characters of a value or a name that nobody vouches for
# Of a weight. Those of honest SAEs are below 1e6; products of larger ones leave float32.
_LARGEST = 1e12


def refuse(condition: bool, place: Path, got: str, allowed: str) -> None:
    """Raise StoreError under a condition."""
    if condition:
        raise StoreError(f"{place} has {shortened(got)}; what can be taken is {allowed}")


def shown(value: Any) -> str:
    """A value for a message, which may be of any kind and size."""
    if isinstance(value, str | float | bool | None) or (
        isinstance(value, int) and abs(value) < 10**_SHOWN
    ):
        return str(value)[:_SHOWN]
    return f"of type {type(value).__name__}"


def refuse_shape(name: str, tensor: Tensor, shape: tuple[int, ...], place: Path) -> None:
    """Raise StoreError if a tensor of a file has another shape."""
    got = tuple(tensor.shape)
    refuse(got != shape, place, f"{name} of shape {got}", f"{shape}, which the others say")


def agree_on(name: str, place: Path, *values: Any) -> Any:
    """The one value that files give in several places; None: none gives it.

    Raises:
        StoreError: two of them differ.
    """
    given = [value for value in values if value is not None]
    different = " and ".join(shown(value) for value in given)
    refuse(any(value != given[0] for value in given), place, f"{name} {different}", "one value")
    return given[0] if given else None


def whole_of(name: str, place: Path, *values: Any) -> int:
    """The whole number that files give in one place or several.

    Raises:
        StoreError: none gives it, it is no whole number, or two differ.
    """
    numbers = []
    for value in values:
        if isinstance(value, Tensor):
            plain = dense_of({name: value}, name, place)
            refuse(plain.numel() != 1, place, f"{name} {tuple(plain.shape)}", "one number")
            value = plain.item()
        numbers.append(value)
    value = agree_on(name, place, *numbers)
    refuse(value is None, place, f"no {name} in its configuration", "a whole one")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_whole = is_number and abs(value) < 2**63 and value == value // 1
    refuse(not is_whole, place, f"{name}={shown(value)}", "a whole number")
    return int(value)


def any_whole_of(name: str, place: Path, *values: Any) -> int | None:
    """The whole number that files give, if any does. Raises StoreError as `whole_of`."""
    given = [value for value in values if value is not None]
    return whole_of(name, place, *given) if given else None


def text_of(name: str, place: Path, value: Any) -> str:
    """A text of a file, such as a model's name. Raises StoreError: it is none, or a long one."""
    fits = isinstance(value, str) and len(value) <= _TEXT
    refuse(not fits, place, f"{name} {shown(value)}", f"a text of at most {_TEXT} characters")
    return str(value)


def any_text_of(name: str, place: Path, value: Any) -> str | None:
    """The text, if there is one. Raises StoreError as `text_of`."""
    return None if value is None else text_of(name, place, value)


def dense_of(state: Mapping[str, Any], name: str, place: Path) -> Tensor:
    """A tensor of a file. Raises StoreError: it is not there, or does not hold its numbers."""
    tensor = state.get(name)
    if not isinstance(tensor, Tensor):
        raise StoreError(f"{place} has no tensor {name}; what can be taken is an SAE that has it")
    is_odd = tensor.is_meta or tensor.is_quantized or tensor.is_nested
    is_plain = tensor.layout == torch.strided and not is_odd
    # An expanded tensor is as large as it says only when somebody computes with it.
    held = is_plain and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
    refuse(not held, place, f"{name} that does not hold its numbers", "a dense tensor")
    refuse(tensor.is_complex(), place, f"{name} as complex numbers", "real ones")
    return tensor.detach()


def tensor_of(state: Mapping[str, Any], name: str, place: Path) -> Tensor:
    """A tensor of a file as float32.

    Raises:
        StoreError: as `any_tensor_of`, or it is a matrix of zeros.
    """
    values = any_tensor_of(state, name, place)
    is_empty = values.ndim > 1 and not bool(values.any())
    refuse(is_empty, place, f"{name} of zeros alone", "a trained SAE")
    return values


def any_tensor_of(state: Mapping[str, Any], name: str, place: Path) -> Tensor:
    """A tensor of a file as float32, of any values.

    Raises:
        StoreError: it is not there, not of real floating-point numbers, not finite or so large
            that nothing can be computed with it.
    """
    tensor = dense_of(state, name, place)
    kind = str(tensor.dtype).removeprefix("torch.")
    refuse(not tensor.is_floating_point(), place, f"{name} as {kind}", "floating point")
    values = tensor.float()
    require_usable(name, values, place)
    return values


def require_usable(name: str, values: Tensor, place: Path) -> None:
    """Raise StoreError if a tensor is not finite, or leaves float32 in a product."""
    if not values.numel():
        return
    least, most = (float(end) for end in values.aminmax())
    finite = math.isfinite(least) and math.isfinite(most)
    refuse(not finite, place, f"NaN or infinity in {name}", "finite weights")
    size = max(-least, most)
    refuse(size > _LARGEST, place, f"{name} up to {size:.3g}", f"weights up to {_LARGEST:g}")


def vector_of(state: Mapping[str, Any], name: str, size: int, place: Path) -> Tensor:
    """A tensor of one number for each latent. Raises StoreError as `tensor_of`, or by its shape."""
    vector = tensor_of(state, name, place)
    refuse_shape(name, vector, (size,), place)
    return vector
