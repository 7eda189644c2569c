"""bfloat16 as a data type of zarr-python, which has none (zarr-python issue 2656).

The native type is uint16, a view of the bits. tensorstore reads the same store as real bfloat16;
zarrs and plain zarr read the bits; `torch.from_numpy(bits).view(torch.bfloat16)` costs nothing.
Importing this module registers the type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.core.dtype.wrapper import ZDType


def to_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 (nearest, ties to even); NaN stays NaN."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The exact float32 value of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[np.dtypes.UInt16DType, np.uint16], HasEndianness, HasItemSize):
    """Zarr v3 `bfloat16` with uint16 bits as its native type."""

    dtype_cls = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        raise DataTypeValidationError(f"{dtype} is never taken for bfloat16: ask for it by name")

    def to_native_dtype(self) -> np.dtypes.UInt16DType:
        return np.dtypes.UInt16DType()

    @classmethod
    def _from_json_v2(cls, data: object) -> Self:
        raise DataTypeValidationError(f"Zarr v2 has no bfloat16 (got {data!r})")

    @classmethod
    def _from_json_v3(cls, data: object) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        raise DataTypeValidationError(f"expected 'bfloat16', got {data!r}")

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        if zarr_format != 3:
            raise ValueError("Zarr v2 has no bfloat16")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, np.uint16 | int)

    def cast_scalar(self, data: object) -> np.uint16:
        if not isinstance(data, np.uint16 | int):
            raise TypeError(f"bfloat16 bits are uint16, not {type(data).__name__}")
        return np.uint16(data)

    def default_scalar(self) -> np.uint16:
        return np.uint16(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> np.uint16:
        return np.uint16(to_bits(np.array([data], np.float32))[0])

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> float:
        return float(to_float32(np.array([data], np.uint16))[0])


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
