"""How one chunk of rows becomes bytes, and back with its checksum checked.

The array's Zarr metadata names what the codec does, so any Zarr reader decodes it. Three names can
be asked for:

    blosc   zstd 1 over a byte shuffle, in blocks of 512 KiB; keeps every bit. Against Blosc's
            default block size: a 15 % better ratio and 3.9 times the decoding speed. The ratio is
            1.43-1.46, against an order-0 entropy bound of 1.46-1.50.
    none    the bytes as they are, for disks that are faster than a core decodes.
    int8    one byte per element of bfloat16 rows (data/store/int8.py): 2.2 times smaller, for 7e-5
            of the variance. zstd 1 takes another 10 % off it; a shuffle of single bytes does
            nothing, and a bitwise shuffle leaves 2 %.

Every chunk ends in crc32c: without it each codec would read a flipped bit in silence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import google_crc32c
import numcodecs.blosc
import numpy as np
from numcodecs import Blosc
from numpy.typing import NDArray

from residual_saes.data.durable import Buffer
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.site import HookPoint, Point

if TYPE_CHECKING:  # the process that writes the spine runs without torch
    import torch

    from residual_saes.data.store.place import Place

# Blosc's own threads append blocks in the order in which they finish: other bytes every time. Our
# threads take a chunk each.
numcodecs.blosc.use_threads = False

BLOCK_BYTES = 524_288
CRC_BYTES = 4
_BLOSC_NBYTES = slice(4, 8)  # of Blosc's header: the decoded size, little-endian uint32

# Bytes of bfloat16 rows over their bytes on the disk. Measured on residuals of two models.
EXPECTED_RATIO = {"blosc": 1.45, "none": 1.0, "int8": 2.2}
NAMES = tuple(EXPECTED_RATIO)
_LOSSY = "int8"
FITS = "commits/scales"  # the records of what a lossy codec was fitted to, a point each


class Codec(ABC):
    """A chain [elements to bytes, compressor, crc32c]."""

    lossless: ClassVar[bool]  # whether a reader gets back the bits that were written
    compresses: ClassVar[bool]  # else the bytes on the disk are the elements' own

    # -- what each codec does ----------------------------------------------------------------------

    @abstractmethod
    def chain(self) -> list[dict[str, Any]]:
        """The Zarr v3 codecs before crc32c."""

    @abstractmethod
    def pack(self, chunk: NDArray[Any]) -> Buffer:
        """The bytes of a C-contiguous chunk, without checksum."""

    @abstractmethod
    def unpack(self, body: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Decode what `pack` made into `out`; StoreError if its size is wrong."""

    @abstractmethod
    def stored(self, chunk: NDArray[Any]) -> NDArray[Any]:
        """What a reader will get back for `chunk`: itself, from a lossless codec."""

    @abstractmethod
    def error(self, rows: NDArray[np.uint16], stored: NDArray[np.uint16]) -> NDArray[np.float64]:
        """(n,) squared error of each row, for (n, d) bfloat16 bits before and after storing."""

    # -- what all of them do -----------------------------------------------------------------------

    def metadata(self) -> list[dict[str, Any]]:
        """The chain as Zarr v3 `codecs`."""
        return [*self.chain(), {"name": "crc32c"}]

    def parts(self, chunk: NDArray[Any]) -> tuple[Buffer, bytes]:
        """The chunk's bytes and their checksum, to be written one behind the other.

        The codec `none` copies nothing, which halves its time. Its bytes are the chunk's own: write
        them before `chunk` changes. `chunk` is C-contiguous.
        """
        assert chunk.flags.c_contiguous
        body = self.pack(chunk)
        # google_crc32c takes no memoryview.
        crc: int = google_crc32c.value(np.frombuffer(body, np.uint8))
        return body, crc.to_bytes(CRC_BYTES, "little")

    def encode(self, chunk: NDArray[Any]) -> bytes:
        """The chunk's bytes, checksum last. `chunk` is C-contiguous."""
        return b"".join(self.parts(chunk))

    def decode(self, data: Buffer, out: NDArray[Any]) -> None:
        """Decode into the C-contiguous `out`.

        Raises:
            StoreError: the checksum or the decoded size is wrong.
        """
        view = np.frombuffer(data, np.uint8)
        body = view[:-CRC_BYTES]
        crc = int.from_bytes(view[-CRC_BYTES:].tobytes(), "little")
        if len(view) <= CRC_BYTES or google_crc32c.value(body) != crc:
            raise StoreError(
                "crc32c does not match: the bytes on disk are not the ones that were written"
            )
        self.unpack(body, out)


class Exact(Codec):
    """A codec that keeps every bit."""

    lossless = True

    def stored(self, chunk: NDArray[Any]) -> NDArray[Any]:
        return chunk

    def error(self, rows: NDArray[np.uint16], stored: NDArray[np.uint16]) -> NDArray[np.float64]:
        return np.zeros(len(rows))


_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}


class Plain(Exact):
    """`none`: the elements' own bytes."""

    compresses = False

    def chain(self) -> list[dict[str, Any]]:
        return [_LITTLE_ENDIAN]

    def pack(self, chunk: NDArray[Any]) -> Buffer:
        return chunk.reshape(-1).view(np.uint8).data

    def unpack(self, body: NDArray[np.uint8], out: NDArray[Any]) -> None:
        _require_size(len(body), out)
        out[...] = body.view(out.dtype).reshape(out.shape)


@dataclass(frozen=True)
class Shuffled(Exact):
    """`blosc`: zstd over a byte shuffle."""

    typesize: int  # bytes per element: the shuffle's stride

    compresses = True

    def chain(self) -> list[dict[str, Any]]:
        return [_LITTLE_ENDIAN, blosc_metadata("shuffle", self.typesize)]

    def pack(self, chunk: NDArray[Any]) -> Buffer:
        assert chunk.itemsize == self.typesize
        packed: Buffer = _SHUFFLING.encode(chunk)
        return packed

    def unpack(self, body: NDArray[np.uint8], out: NDArray[Any]) -> None:
        unpack_blosc(_SHUFFLING, body, out)


def blosc(shuffle: int) -> Blosc:
    """The compressor; threads may share it."""
    return Blosc(cname="zstd", clevel=1, shuffle=shuffle, blocksize=BLOCK_BYTES)


_SHUFFLING = blosc(Blosc.SHUFFLE)


def blosc_metadata(shuffle: str, typesize: int) -> dict[str, Any]:
    """The compressor as a Zarr v3 codec."""
    options = {"typesize": typesize, "cname": "zstd", "clevel": 1, "blocksize": BLOCK_BYTES}
    return {"name": "blosc", "configuration": {**options, "shuffle": shuffle}}


def unpack_blosc(compressor: Blosc, body: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Decompress into `out`; StoreError if `body` is of another size."""
    # Blosc's header says what the chunk decodes to. Into a larger `out`, Blosc would decode without
    # an error and leave the rest as it was.
    _require_size(int.from_bytes(body[_BLOSC_NBYTES].tobytes(), "little"), out)
    compressor.decode(body, out)


def _require_size(nbytes: int, out: NDArray[Any]) -> None:
    if nbytes != out.nbytes:
        raise StoreError(f"chunk of {nbytes} bytes where {out.nbytes} belong")


# -- the codec of a name ---------------------------------------------------------------------------


def require_known(name: str) -> None:
    """Raise SettingError for a codec that there is not."""
    if name not in NAMES:
        raise SettingError(f"codec={name!r} is unknown; choose one of {', '.join(NAMES)}")


def is_lossless(name: str) -> bool:
    """Whether a store with this codec gives back the rows that were written."""
    return name != _LOSSY


@cache
def exact(name: str, typesize: int) -> Codec:
    """The codec of arrays that keep every bit, in a store whose rows are kept by codec `name`.

    Args:
        typesize: bytes per element.
    """
    require_known(name)
    return Plain() if name == "none" else Shuffled(typesize)


def of_rows(name: str, place: Place, point: Point) -> Codec:
    """The codec of a point's bfloat16 rows; a lossy one is fitted to the point.

    Raises:
        FileNotFoundError: it is not fitted yet.
    """
    if is_lossless(name):
        return exact(name, 2)
    from residual_saes.data.store import scales

    return scales.read(place, point)


def unfitted(name: str, place: Place, points: Iterable[Point]) -> list[HookPoint]:
    """The points to which the codec must be fitted before their first row is written."""
    if is_lossless(name):
        return []
    from residual_saes.data.store import scales

    return [point for point in map(HookPoint.of, points) if not scales.exist(place, point)]


def fit_key(point: Point) -> str:
    """The record of what a lossy codec was fitted to."""
    return f"{FITS}/{HookPoint.of(point).record_name}.json"


def fitted_point(key: str) -> HookPoint | None:
    """The point of such a record; None of another object."""
    folder, _, name = key.rpartition("/")
    return HookPoint.of_record(name.removesuffix(".json")) if folder == FITS else None


def restore_fit(place: Place, point: Point) -> bool:
    """Write that record again from its copies in Zarr metadata; False if there are none."""
    from residual_saes.data.store import scales

    return scales.restore(place, point)


def fit(place: Place, point: Point, rows: torch.Tensor, bos: torch.Tensor) -> None:
    """Fit the lossy codec to a point, once and for all; the first process to do so counts.

    Args:
        rows: (n, d) bfloat16, a sample of the point's rows.
        bos: (n,) which of them are BOS.
    """
    from residual_saes.data.store import scales

    scales.freeze(place, point, rows, bos)
