"""Residual rows at one byte per element: the Zarr codec `standardized_int8`.

Importing this module registers the codec with zarr-python.

A row x is stored as q = round(z / s), with z = (x − mean) / deviation per channel and s = max |z| /
127 per row. It is read as mean + deviation · s · q, rounded to bfloat16.

Massive channels (|mean| up to 400 deviations) make int8 per token and fp8 inaccurate. Standardised
per channel, int8 loses 7e-5 of the variance of ordinary rows. In attention sinks the massive
channels set s: sinks keep those channels and little else. A row without a finite z is read as NaN
in every channel, so that it stays a row that is never served.

A chunk of n rows is n little-endian float32 scales s, then n·d int8. The statistics stand in the
array's own metadata. Every step is a separate, correctly rounded float32 operation: every machine
reads the same bits.

Shapes: n rows, d channels.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec
from zarr.registry import register_codec

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.store.moments import Moments
from residual_saes.data.store.zarr_bfloat16 import to_float32

NAME = "standardized_int8"
SCALE_BYTES = 4
_LEVELS = 127
# Smaller scales are stored as 0: their inverse would overflow, and 1e-35 deviations are nothing.
_SMALLEST = 1e-37
_NAN_BITS = 0x7FC0
# Elements held as float32 at a time: 0.65 MB, which fit the cache. NumPy and not torch: threads
# take a chunk each, and torch would start threads of its own in every one.
BLOCK = 64 * 2560


@dataclass(frozen=True)
class StandardizedInt8(ArrayBytesCodec):  # type: ignore[misc]
    """The codec with its statistics, which are frozen before the first row is written."""

    mean: str  # (d,) little-endian float32 in base64
    deviation: str  # (d,) the same

    is_fixed_size = True

    def __post_init__(self) -> None:
        mean, deviation = self._statistics
        same_shape = mean.shape == deviation.shape and len(mean) > 0
        if not same_shape or not np.isfinite([mean, deviation]).all() or (deviation < 0).any():
            raise SettingError(
                f"{NAME} needs one finite mean and one finite deviation >= 0 per channel (got "
                f"{len(mean)} means, {len(deviation)} deviations); take them from the array's own "
                "zarr.json"
            )

    @classmethod
    def of(cls, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> Self:
        """The codec for (d,) statistics."""
        return cls(_to_text(mean), _to_text(deviation))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The codec that an array's metadata names.

        Raises:
            SettingError: it is another codec, or its parameters are not as we write them.
        """
        configuration = data.get("configuration")
        if data.get("name") != NAME or not isinstance(configuration, dict):
            raise SettingError(f"codec {data.get('name')!r} is not {NAME} with its configuration")
        if configuration.keys() != {"mean", "deviation"}:
            raise SettingError(
                f"{NAME} has the parameters {', '.join(sorted(configuration))}; it takes mean and "
                "deviation"
            )
        return cls(**configuration)

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME, "configuration": {"mean": self.mean, "deviation": self.deviation}}

    @cached_property
    def _statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return _from_text("mean", self.mean), _from_text("deviation", self.deviation)

    @property
    def d(self) -> int:
        """Channels."""
        return len(self._statistics[0])

    @cached_property
    def _inverse(self) -> NDArray[np.float32]:
        """(d,) 1 / deviation; 0 for a constant channel, which is then read as its mean."""
        deviation = self._statistics[1]
        return np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > _SMALLEST)

    def encode_rows(self, bits: NDArray[np.uint16], block: int = BLOCK) -> NDArray[np.uint8]:
        """(n·(4 + d),) bytes of (n, d) bfloat16 bits.

        Args:
            block: elements held as float32 at a time; it changes no byte.
        """
        out = np.empty(self.encoded_bytes(len(bits)), np.uint8)
        scales, levels = self._parts(out)
        mean = self._statistics[0]
        inverse = self._inverse
        step = max(1, block // self.d)
        z_block = np.empty((min(step, len(bits)), self.d), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # such rows are read as NaN
            for start in range(0, len(bits), step):
                # z, as float32.
                rows = bits[start : start + step]
                z = z_block[: len(rows)]
                np.left_shift(rows, 16, out=z.view(np.uint32), dtype=np.uint32)
                z -= mean
                z *= inverse

                # The scale of each row.
                scale = np.maximum(z.max(1), -z.min(1)) / _LEVELS
                usable = np.isfinite(scale)
                if not usable.all():
                    z[~usable] = 0  # NaN as int8 differs between machines
                scale[scale < _SMALLEST] = 0

                # Levels.
                positive = usable & (scale > 0)
                z *= np.divide(1, scale, out=np.zeros_like(scale), where=positive)[:, None]
                levels[start : start + step] = np.rint(z, out=z)
                scales[start : start + step] = np.where(usable, scale, np.nan)
        return out

    def decode_rows(
        self, data: NDArray[np.uint8], out: NDArray[np.uint16], block: int = BLOCK
    ) -> None:
        """Read what `encode_rows` made into the C-contiguous (n, d) `out`.

        Args:
            block: elements held as float32 at a time; it changes no bit.

        Raises:
            ValueError: the size is wrong.
        """
        if out.shape[1:] != (self.d,) or len(data) != self.encoded_bytes(len(out)):
            raise ValueError(
                f"{len(data)} bytes of {NAME} where {out.shape} values of {self.d} channels belong"
            )
        scales, levels = self._parts(data)
        mean, deviation = self._statistics
        step = max(1, block // self.d)
        x_block = np.empty((min(step, len(out)), self.d), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # rows of NaN
            for start in range(0, len(out), step):
                rows = out[start : start + step]
                x = x_block[: len(rows)]
                np.multiply(levels[start : start + step], scales[start : start + step, None], out=x)
                x *= deviation
                x += mean
                _round(x, rows)
        lost = np.isnan(scales)
        if lost.any():
            out[lost] = _NAN_BITS  # `_round` may carry another writer's NaN into -0

    def stored(self, bits: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """(n, d) bfloat16 bits that a reader will get back for `bits`."""
        out = np.empty(bits.shape, np.uint16)
        self.decode_rows(self.encode_rows(bits), out)
        return out

    def encoded_bytes(self, n: int) -> int:
        """Bytes of n rows."""
        return n * (SCALE_BYTES + self.d)

    def _parts(self, data: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Views of a chunk's bytes: (n,) scales, (n, d) levels."""
        n = len(data) // (SCALE_BYTES + self.d)
        scales = data[: n * SCALE_BYTES].view("<f4")
        levels = data[n * SCALE_BYTES :].view(np.int8).reshape(n, self.d)
        return scales, levels

    # -- what Zarr calls ---------------------------------------------------------------------------

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Raise SettingError for an array that is not (n, d) bfloat16."""
        if dtype.to_json(zarr_format=3) != "bfloat16" or len(shape) != 2 or shape[1] != self.d:
            raise SettingError(
                f"{NAME} with {self.d} channels is for (n, {self.d}) bfloat16, not {shape} {dtype}"
            )

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: Any) -> int:
        return self.encoded_bytes(input_byte_length // (2 * self.d))

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        encoded = self.encode_rows(chunk_array.as_numpy_array())
        return chunk_spec.prototype.buffer.from_array_like(encoded)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        out = np.empty(chunk_spec.shape, np.uint16)
        self.decode_rows(np.require(chunk_bytes.as_numpy_array(), np.uint8, ["C", "A"]), out)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(out)


def standardisation(ordinary: Moments) -> StandardizedInt8:
    """The codec for the moments of a first unit's ORDINARY rows.

    Outliers among those rows would coarsen every other row.

    Raises:
        StoreError: there are fewer than two rows, so that there is no deviation.
    """
    if ordinary.count < 2:
        raise StoreError(
            "int8 takes its channels' means and deviations from the first unit, which has "
            f"{ordinary.count} ordinary rows; choose codec=blosc"
        )
    deviation = np.sqrt(ordinary.variance)
    return StandardizedInt8.of(ordinary.mean.astype(np.float32), deviation.astype(np.float32))


def squared_errors(
    bits: NDArray[np.uint16], stored: NDArray[np.uint16], block: int = BLOCK
) -> NDArray[np.float64]:
    """(n,) sum over channels of (x − x')² per row, for (n, d) bfloat16 bits before and after.

    A row that is not finite gives NaN or infinity. The sum over ORDINARY rows, divided by the sum
    of their `m2`, is the share of their variance that storing lost.

    Args:
        block: elements held as float64 at a time; it changes no bit.
    """
    out = np.empty(len(bits))
    step = max(1, block // bits.shape[1])
    with np.errstate(invalid="ignore"):  # infinity less infinity
        for start in range(0, len(bits), step):
            part = slice(start, start + step)
            error = np.subtract(to_float32(bits[part]), to_float32(stored[part]), dtype=np.float64)
            out[part] = np.einsum("nd,nd->n", error, error)
    return out


def _round(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round (n, d) values to bfloat16 bits, nearest, ties to even; overwrites `values`.

    NaN gives any bits.
    """
    wide = values.view(np.uint32)
    up = wide >> np.uint32(16)
    up &= 1
    up += 0x7FFF
    wide += up
    wide >>= 16
    out[...] = wide


def _to_text(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def _from_text(name: str, text: object) -> NDArray[np.float32]:
    try:
        data = base64.b64decode(str(text), validate=True)
        return np.frombuffer(data, "<f4").astype(np.float32)
    except (ValueError, binascii.Error) as error:
        raise SettingError(f"{NAME}: its {name} is not float32 in base64: {error}") from error


register_codec(NAME, StandardizedInt8)
