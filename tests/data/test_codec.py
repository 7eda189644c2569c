"""What a codec writes is read back: by us, by zarr-python, and as exactly as its name promises."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ShardingCodec

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.store.codec import Codec, exact
from residual_saes.data.store.int8 import StandardizedInt8, squared_errors, standardisation
from residual_saes.data.store.moments import Moments
from residual_saes.data.store.scales import Int8
from residual_saes.data.store.zarr_bfloat16 import to_bits, to_float32

D = 256


def synthetic(n: int, seed: int = 0) -> NDArray[np.uint16]:
    """Bits of rows of very uneven lengths, hence heavy tails.

    Some channels are massive: |mean| of 400 deviations.
    """
    rng = np.random.default_rng(seed)
    deviation = np.exp(np.linspace(-1, 1, D))
    rows = rng.normal(size=(n, D)) * rng.lognormal(0, 0.5, (n, 1)) * deviation
    # bfloat16 keeps 8 bits: about 3,200 its steps are 16, and smaller deviations than 8 would be
    # none.
    rows[:, ::64] = 3200 + 8 * rng.normal(size=(n, D // 64))
    return to_bits(rows.astype(np.float32))


def codec_for(bits: NDArray[np.uint16]) -> Int8:
    return Int8(standardisation(Moments.of(to_float32(bits))))


def read_back(codec: Codec, bits: NDArray[Any]) -> NDArray[Any]:
    out = np.empty_like(bits)
    codec.decode(codec.encode(bits), out)
    return out


# -- bit-exact -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blosc", "none"])
@pytest.mark.parametrize(
    ("dtype", "shape"), [("<u2", (64, 24)), ("<f4", (10,)), ("<f8", (2, 3, 2, 5)), ("|u1", (7,))]
)
def test_lossless_codecs_give_back_every_bit(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    chunk = bits.view(dtype)[..., 0]
    codec = exact(name, chunk.itemsize)
    out = np.empty_like(chunk)
    codec.decode(codec.encode(chunk), out)
    assert out.tobytes() == chunk.tobytes()
    assert codec.lossless
    assert codec.stored(chunk) is chunk


def test_none_copies_nothing_and_its_parts_are_the_whole() -> None:
    chunk = synthetic(32)
    body, crc = exact("none", 2).parts(chunk)
    assert np.shares_memory(np.frombuffer(body, np.uint8), chunk)
    assert bytes(body) + crc == exact("none", 2).encode(chunk)


# -- int8 ------------------------------------------------------------------------------------------


def test_int8_loses_little_even_beside_massive_channels() -> None:
    bits = synthetic(4096)
    rows = to_float32(bits).astype(np.float64)
    assert (np.abs(rows.mean(0)) / rows.std(0)).max() > 350
    codec = codec_for(synthetic(2048, seed=1))  # statistics of other rows, as a first unit's are
    stored = codec.stored(bits)
    error = np.square(rows - to_float32(stored))
    total = np.square(rows - rows.mean(0))
    assert error.sum() / total.sum() < 1e-4
    assert (error.sum(0) / total.sum(0)).max() < 1.5e-4
    np.testing.assert_allclose(squared_errors(bits, stored), error.sum(1), rtol=1e-12)
    # What standardising buys: int8 per token alone loses everything but the massive channels.
    scale = np.abs(rows).max(1, keepdims=True) / 127
    plain = np.square(rows - np.rint(rows / scale) * scale)
    assert plain.sum() / total.sum() > 1e-2


def test_int8_is_within_half_a_step_and_one_rounding() -> None:
    bits = synthetic(300)
    codec = codec_for(bits)
    rows, back = (
        to_float32(bits).astype(np.float64),
        to_float32(read_back(codec, bits)).astype(np.float64),
    )
    mean, deviation = rows.mean(0), rows.std(0)
    step = deviation * (np.abs((rows - mean) / deviation).max(1, keepdims=True) / 127)
    assert (np.abs(back - rows) <= 0.501 * step + 2.0**-8 * np.abs(back)).all()


def test_int8_computes_what_its_page_says() -> None:
    """The formula once more, in torch: the same bits."""
    bits = synthetic(130)
    codec = codec_for(bits)
    texts = codec.statistics.to_dict()["configuration"]
    mean, deviation = (
        torch.tensor(struct.unpack(f"<{D}f", base64.b64decode(texts[name])))
        for name in ("mean", "deviation")
    )
    data = codec.statistics.encode_rows(bits)
    scales = torch.from_numpy(data[: 4 * 130].view("<f4").copy())
    levels = torch.from_numpy(data[4 * 130 :].view(np.int8).reshape(130, D).copy())
    assert levels.abs().amax(1).eq(127).all()
    expected = (levels.float() * scales[:, None] * deviation + mean).bfloat16()
    np.testing.assert_array_equal(read_back(codec, bits), expected.view(torch.uint16).numpy())


def test_constant_channels_and_rows_at_the_mean_are_exact() -> None:
    bits = synthetic(64)
    bits[:, 7] = to_bits(np.array([3.140625], np.float32))
    codec = codec_for(bits)
    np.testing.assert_array_equal(read_back(codec, bits)[:, 7], bits[:, 7])
    mean, deviation = np.full(D, 1.5, np.float32), np.ones(D, np.float32)
    at_mean = to_bits(np.full((5, D), 1.5, np.float32))
    np.testing.assert_array_equal(
        read_back(Int8(StandardizedInt8.of(mean, deviation)), at_mean), at_mean
    )


def test_rows_that_are_not_finite_stay_so_and_harm_no_other() -> None:
    bits = synthetic(200)
    codec = codec_for(bits)
    whole = codec.stored(bits)
    broken = bits.copy()
    for row, value in ((3, np.nan), (70, np.inf), (199, -np.inf)):
        broken[row, row % D] = to_bits(np.array([value], np.float32))[0]
    stored = codec.stored(broken)
    bad = np.isin(np.arange(200), [3, 70, 199])
    assert np.isnan(to_float32(stored[bad])).all()
    assert np.unique(stored[bad]).tolist() == [0x7FC0]
    np.testing.assert_array_equal(stored[~bad], whole[~bad])
    errors = squared_errors(broken, stored)
    assert np.isnan(errors[bad]).all()
    np.testing.assert_array_equal(errors[~bad], squared_errors(bits, whole)[~bad])
    data = codec.statistics.encode_rows(broken)
    data[: 4 * 200].view(np.uint32)[3] = 0x7FFF_FFFF  # another writer's NaN
    out = np.empty_like(broken)
    codec.statistics.decode_rows(data, out)
    np.testing.assert_array_equal(out, stored)
    # The same bytes on every machine, whatever it makes of NaN as an integer.
    assert not codec.statistics.encode_rows(broken)[4 * 200 :].reshape(200, D)[bad].any()


def test_tiny_and_huge_rows_do_not_overflow() -> None:
    codec = Int8(StandardizedInt8.of(np.zeros(4, np.float32), np.full(4, 1e-3, np.float32)))
    rows = np.array(
        [[1e-40, 0, 0, 0], [1e-36, -1e-36, 0, 0], [1e30, 1, 0, 0], [3e38, 0, 0, 0]], np.float32
    )
    back = to_float32(read_back(codec, to_bits(rows)))
    np.testing.assert_allclose(back[0], 0, atol=1e-39)
    np.testing.assert_allclose(back[1:3], rows[1:3], rtol=0.01, atol=1e28)
    assert not codec.statistics.encode_rows(to_bits(rows[:1])).any()
    assert np.isnan(back[3]).all()  # no float32 multiple of 1e-3: refused, never a wrong number


@given(n=st.integers(1, 140), d=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_int8_round_trip_of_any_shape(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = to_bits(
        (rng.normal(size=(n, d)) * 10.0 ** rng.integers(-3, 4, d) + 5).astype(np.float32)
    )
    rows = to_float32(bits)
    codec = Int8(StandardizedInt8.of(rows.mean(0), rows.std(0)))
    first = codec.stored(bits)
    np.testing.assert_array_equal(read_back(codec, bits), first)
    alone = np.concatenate([codec.stored(bits[at : at + 1]) for at in range(n)])
    np.testing.assert_array_equal(alone, first)  # a row's bits do not depend on its neighbours


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_the_size_of_blocks_changes_no_bit(rows: int) -> None:
    bits = synthetic(rows)
    bits[rows // 2, 3] = 0x7FC0
    statistics = codec_for(synthetic(300)).statistics
    data = statistics.encode_rows(bits)
    stored = statistics.stored(bits)
    for block in (1, 7 * D, rows * D, 10**9):
        np.testing.assert_array_equal(statistics.encode_rows(bits, block), data)
        out = np.empty_like(bits)
        statistics.decode_rows(data, out, block)
        np.testing.assert_array_equal(out, stored)
        np.testing.assert_array_equal(
            squared_errors(bits, stored, block), squared_errors(bits, stored)
        )


# -- through zarr-python ---------------------------------------------------------------------------


def our_array(
    root: Path, codec: Codec, bits: NDArray[np.uint16], chunk: int, shard: int | None
) -> Path:
    """An array whose metadata are ours and whose chunks zarr-python writes."""
    codecs = codec.metadata()
    if shard:
        inner = {"chunk_shape": [chunk, bits.shape[1]], "codecs": codecs}
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        codecs = [{"name": "sharding_indexed", "configuration": {**inner, "index_codecs": index}}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [shard or chunk, bits.shape[1]]}}
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": bits.shape,
        "data_type": "bfloat16",
        "chunk_grid": grid,
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0,
        "codecs": codecs,
        "attributes": {},
    }
    root.mkdir(exist_ok=True)
    (root / "zarr.json").write_text(json.dumps(metadata))
    return root


def test_zarr_reads_what_we_write_and_writes_what_we_read(tmp_path: Path) -> None:
    bits = synthetic(64)
    codec = codec_for(bits)
    root = our_array(tmp_path / "a", codec, bits, 32, None)
    for number in (0, 1):
        (root / f"c.{number}.0").write_bytes(codec.encode(bits[number * 32 : number * 32 + 32]))
    np.testing.assert_array_equal(zarr.open_array(root, mode="r")[:], codec.stored(bits))
    other = our_array(tmp_path / "b", codec, bits, 32, None)
    zarr.open_array(other, mode="r+")[:] = bits
    for number in (0, 1):
        assert (other / f"c.{number}.0").read_bytes() == (root / f"c.{number}.0").read_bytes()


@pytest.mark.parametrize("rows", [64, 50])
def test_zarr_shards_and_ragged_ends(tmp_path: Path, rows: int) -> None:
    bits = synthetic(rows)
    codec = codec_for(bits)
    root = our_array(tmp_path / "a", codec, bits, 16, 32)
    zarr.open_array(root, mode="r+")[:] = bits
    again = zarr.open_array(root, mode="r")
    np.testing.assert_array_equal(again[:], codec.stored(bits))
    np.testing.assert_array_equal(again[17:19], codec.stored(bits)[17:19])


def test_zarr_creates_an_array_with_the_codec(tmp_path: Path) -> None:
    from residual_saes.data.store.zarr_bfloat16 import BFloat16

    bits = synthetic(64)
    codec = codec_for(bits)
    chain = [
        codec.statistics,
        BloscCodec(typesize=1, cname="zstd", clevel=1, shuffle="noshuffle"),
        Crc32cCodec(),
    ]
    created = zarr.create_array(
        tmp_path / "a",
        shape=bits.shape,
        dtype=BFloat16(),
        chunks=(32, D),
        serializer=chain[0],
        compressors=chain[1:],
    )
    created[:] = bits
    reopened = zarr.open_array(tmp_path / "a", mode="r")
    assert reopened.metadata == created.metadata  # our codec compares by its statistics
    np.testing.assert_array_equal(reopened[:], codec.stored(bits))
    assert (
        ShardingCodec(chunk_shape=(16, D), codecs=chain).to_dict()["configuration"]["codecs"][0]
        == chain[0].to_dict()
    )


@pytest.mark.parametrize("where", [0, 5, 500, -5, -1])
def test_damage_is_never_read(tmp_path: Path, where: int) -> None:
    bits = synthetic(32)
    codec = codec_for(bits)
    data = bytearray(codec.encode(bits))
    data[where] ^= 16
    with pytest.raises(StoreError, match="crc32c"):
        codec.decode(bytes(data), np.empty_like(bits))
    root = our_array(tmp_path / "a", codec, bits, 32, None)
    (root / "c.0.0").write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(root, mode="r")[:]


def test_another_size_is_never_read() -> None:
    bits = synthetic(32)
    codec = codec_for(bits)
    for rows in (31, 33):
        with pytest.raises(StoreError):
            codec.decode(codec.encode(bits), np.empty((rows, D), np.uint16))
        for other in (exact("blosc", 2), exact("none", 2)):
            with pytest.raises(StoreError):
                other.decode(other.encode(bits), np.empty((rows, D), np.uint16))
    with pytest.raises(ValueError, match=f"{D} channels"):
        codec.statistics.decode_rows(
            codec.statistics.encode_rows(bits), np.empty((64, D // 2), np.uint16)
        )


# -- refusals --------------------------------------------------------------------------------------

ONE = StandardizedInt8.of(np.zeros(3, np.float32), np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "int7"}, "int7"),
        ({"configuration": None}, "configuration"),
        ({"configuration": {"mean": ONE.mean}}, "takes mean and deviation"),
        ({"configuration": {"mean": ONE.mean, "deviation": ONE.deviation, "levels": 15}}, "levels"),
        ({"configuration": {"mean": "%%", "deviation": ONE.deviation}}, "base64"),
        ({"configuration": {"mean": ONE.mean, "deviation": "AAAA"}}, "base64"),
        ({"configuration": {"mean": [0, 0, 0], "deviation": ONE.deviation}}, "base64"),
        ({"configuration": {"mean": "", "deviation": ""}}, "got 0 means"),
        ({"configuration": {"mean": ONE.mean, "deviation": ""}}, "3 means, 0 deviations"),
    ],
)
def test_unknown_parameters_are_refused(change: dict[str, Any], message: str) -> None:
    good = ONE.to_dict()
    assert StandardizedInt8.from_dict(json.loads(json.dumps(good))) == ONE
    with pytest.raises(SettingError, match=message):
        StandardizedInt8.from_dict({**good, **change})


@pytest.mark.parametrize("deviation", [-1.0, np.nan, np.inf])
def test_statistics_that_are_none_are_refused(deviation: float) -> None:
    with pytest.raises(SettingError, match="finite"):
        StandardizedInt8.of(np.zeros(2, np.float32), np.array([1, deviation], np.float32))


def test_arrays_that_it_is_not_for_are_refused(tmp_path: Path) -> None:
    bits = synthetic(32)
    root = our_array(tmp_path / "a", codec_for(bits), bits, 32, None)
    metadata = json.loads((root / "zarr.json").read_text())
    for change in ({"data_type": "uint16", "fill_value": 0}, {"shape": [32, D + 1]}):
        (root / "zarr.json").write_text(json.dumps(metadata | change))
        with pytest.raises((SettingError, StoreError), match="standardized_int8"):
            zarr.open_array(root, mode="r")


def test_unknown_codecs_and_too_few_rows_are_refused() -> None:
    with pytest.raises(SettingError, match="codec='zip'"):
        exact("zip", 2)
    with pytest.raises(StoreError, match="codec=blosc"):
        standardisation(Moments(1, np.zeros(3), np.zeros(3)))
