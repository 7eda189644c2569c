"""Every Zarr reader reads what we write, and damage is never read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from numpy.typing import NDArray

from residual_saes.data.errors import StoreError
from residual_saes.data.store.codec import exact
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.shard import Shard, UnitArray, native
from residual_saes.data.store.zarr_bfloat16 import to_bits, to_float32
from tests.conftest import make_store

CODECS = ("blosc", "none")
SHAPES = {
    "float32": (),
    "uint32": (5,),
    "float64": (2, 3),
    "bfloat16": (24,),
    "uint64": (),
    "uint8": (),
}


def write(root: Path, array: UnitArray, rows: NDArray[Any]) -> None:
    folder = root / array.name
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_text(json.dumps(array.metadata()))
    for unit in range(-(-array.length // array.unit)):
        part = rows[unit * array.unit : (unit + 1) * array.unit]
        (root / array.key(unit)).write_bytes(b"".join(array.encode(part)))


def sample(array: UnitArray) -> NDArray[Any]:
    rng = np.random.default_rng(3)
    return rng.integers(
        0, 250 if array.dtype.itemsize == 1 else 60_000, (array.length, *array.inner)
    ).astype(array.dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("data_type", SHAPES)
@pytest.mark.parametrize("chunk", [None, 16])
def test_plain_zarr_reads_every_array_and_so_do_we(
    tmp_path: Path, codec: str, data_type: str, chunk: int | None
) -> None:
    # The last unit is ragged.
    of_elements = exact(codec, native(data_type).itemsize)
    array = UnitArray("a", data_type, 200, SHAPES[data_type], 64, of_elements, chunk)
    rows = sample(array)
    write(tmp_path, array, rows)
    stored = zarr.open_array(tmp_path / "a", mode="r")
    assert stored.shape == rows.shape
    np.testing.assert_array_equal(stored[:], rows)
    place = LocalPlace(tmp_path)
    ours = np.concatenate([array.read(place, unit, min(64, 200 - 64 * unit)) for unit in range(4)])
    np.testing.assert_array_equal(ours, rows)


@pytest.mark.parametrize("codec", CODECS)
def test_tensorstore_reads_real_bfloat16(
    tmp_path: Path, random_bits: NDArray[np.uint16], codec: str
) -> None:
    store = make_store(tmp_path / "s.zarr", random_bits, codec=codec)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.name}/layer_3"}}
    opened = tensorstore.open(spec).result()
    assert opened.dtype.name == "bfloat16"
    stored = np.concatenate([store.residuals(3, unit) for unit in range(store.units)])
    np.testing.assert_array_equal(
        np.asarray(opened.read().result()).astype(np.float32), to_float32(stored)
    )


def test_zarrs_and_plain_zarr_agree_on_the_whole_store(
    tmp_path: Path, random_bits: NDArray[np.uint16]
) -> None:
    store = make_store(tmp_path / "s.zarr", random_bits)
    plain = zarr.open_group(store.name, mode="r")
    names = sorted(name for name, _ in plain.members())
    assert names == sorted(
        [
            "tokens",
            "document",
            "token_index",
            "layer_3",
            "norm_3",
            "kind_3",
            "moments_3",
            "summary_3",
        ]
    )
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        other = zarr.open_group(store.name, mode="r")
        for name in names:
            np.testing.assert_array_equal(other[name][:], plain[name][:])


def test_rows_lie_where_token_index_says(tmp_path: Path, random_bits: NDArray[np.uint16]) -> None:
    make_store(tmp_path / "s.zarr", random_bits)
    stored = zarr.open_group(tmp_path / "s.zarr", mode="r")
    index = stored["token_index"][:]
    np.testing.assert_array_equal(np.sort(index), np.arange(len(random_bits)))
    assert (index != np.arange(len(random_bits))).mean() > 0.9  # really permuted
    np.testing.assert_array_equal(stored["layer_3"][:], random_bits[index])
    norms = np.linalg.norm(to_float32(random_bits[index]), axis=1)
    np.testing.assert_allclose(stored["norm_3"][:], norms, rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("where", [0, 100, -30, -3])
def test_a_flipped_bit_is_never_read(tmp_path: Path, codec: str, where: int) -> None:
    array = UnitArray("a", "bfloat16", 64, (24,), 64, exact(codec, 2), 16)
    write(tmp_path, array, sample(array))
    path = tmp_path / array.key(0)
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"c\.0\.0"):
        array.read(LocalPlace(tmp_path), 0, 64)


@pytest.mark.parametrize("size", [0, 3, 200])
def test_a_cut_shard_is_never_read(tmp_path: Path, size: int) -> None:
    array = UnitArray("a", "bfloat16", 64, (24,), 64, exact("blosc", 2), 16)
    write(tmp_path, array, sample(array))
    path = tmp_path / array.key(0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StoreError, match=r"a/c\.0\.0.*action=repair"):
        array.read(LocalPlace(tmp_path), 0, 64)


def test_an_absent_chunk_is_never_taken_for_zeros(tmp_path: Path) -> None:
    array = UnitArray("a", "bfloat16", 20, (24,), 64, exact("blosc", 2), 16)
    write(tmp_path, array, sample(array))
    with Shard(array, LocalPlace(tmp_path), 0) as shard, pytest.raises(StoreError, match="chunk 3"):
        shard.read(3, np.empty((16, 24), np.uint16))


def test_encoding_does_not_depend_on_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    array = UnitArray("a", "bfloat16", 4096, (64,), 4096, exact("blosc", 2), 64)
    rows = sample(array)
    alone = b"".join(array.encode(rows))
    with ThreadPoolExecutor(8) as pool:
        assert all(b"".join(array.encode(rows, pool)) == alone for _ in range(5))


def test_bfloat16_rounds_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=generator) * 10.0 ** torch.randint(
        -30, 30, (10_000,), generator=generator
    )
    values[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    bits = to_bits(values.numpy())
    expected = values.bfloat16()
    torch.testing.assert_close(
        torch.from_numpy(bits).view(torch.bfloat16), expected, rtol=0, atol=0, equal_nan=True
    )
    np.testing.assert_array_equal(to_float32(bits), expected.float().numpy())
