"""Row statistics against a two-pass reference in extended precision, which shares no code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_saes.data.store.kinds import (
    BOS,
    NON_FINITE,
    ORDINARY,
    OUTLIER,
    RowStatistics,
    describe,
    kinds_of,
)

DEVICES = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))


BLOCK = 7 * 24  # so few elements at a time that every test has many blocks


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is."""
    device: str = request.param
    return device


def reference(rows: torch.Tensor, bos: torch.Tensor, chunk: int) -> RowStatistics:
    """The same by its definition: python loops and long doubles."""
    exact = rows.float().numpy().astype(np.longdouble)
    with np.errstate(all="ignore"):
        norms = np.sqrt((exact**2).sum(1)).astype(np.float32)
    finite = sorted(norm for norm in norms.tolist() if np.isfinite(norm))
    middle = (finite[(len(finite) - 1) // 2] + finite[len(finite) // 2]) / 2 if finite else 0.0
    kinds = []
    for norm, is_bos in zip(norms.tolist(), bos.tolist(), strict=True):
        ordinary = OUTLIER if norm > 10 * middle else ORDINARY
        kinds.append(NON_FINITE if not np.isfinite(norm) else BOS if is_bos else ordinary)
    moments = np.zeros((3, 2, rows.shape[1]))
    for kind in (BOS, OUTLIER, ORDINARY):
        if kind in kinds:
            own = exact[np.array(kinds) == kind]
            mean = own.mean(0)
            moments[kind] = mean, ((own - mean) ** 2).sum(0)
    parts = [kinds[at : at + chunk] for at in range(0, len(kinds), chunk)]
    return RowStatistics(
        norms=norms,
        kinds=np.array(kinds, np.int8),
        moments=moments,
        counts=np.array([kinds.count(kind) for kind in (BOS, OUTLIER, ORDINARY)]),
        norm_sums=np.array(
            [norms[np.array(kinds) == kind].astype(np.longdouble).sum() for kind in range(3)], float
        ),
        per_chunk=np.array([[part.count(kind) for kind in range(4)] for part in parts]),
    )


def check(rows: torch.Tensor, bos: torch.Tensor, chunk: int, device: str) -> RowStatistics:
    """Compare with the reference.

    What is counted or read is equal; what is summed is equal to float64 rounding.
    """
    found = describe(rows.to(device), bos.to(device), chunk, BLOCK)
    wanted = reference(rows, bos, chunk)
    np.testing.assert_array_equal(found.kinds, wanted.kinds)
    np.testing.assert_array_equal(found.counts, wanted.counts)
    np.testing.assert_array_equal(found.per_chunk, wanted.per_chunk)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=2e-7)
    np.testing.assert_allclose(found.norm_sums, wanted.norm_sums, rtol=2e-7)
    scale = np.sqrt(wanted.moments[:, 1] / np.maximum(wanted.counts, 1)[:, None])
    assert (
        np.abs(found.moments[:, 0] - wanted.moments[:, 0])
        <= 1e-12 * (scale + np.abs(wanted.moments[:, 0]))
    ).all()
    np.testing.assert_allclose(found.moments[:, 1], wanted.moments[:, 1], rtol=1e-12)
    types = {"norms": np.float32, "kinds": np.int8, "moments": np.float64, "counts": np.int64}
    types |= {"norm_sums": np.float64, "per_chunk": np.int64}
    assert {name: value.dtype.type for name, value in found._asdict().items()} == types
    np.testing.assert_array_equal(
        found.kinds, kinds_of(found.norms, bos.numpy())
    )  # as every reader decides
    return found


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_planted_kinds_are_found_and_described(device: str) -> None:
    rows, bos = normal(203, 24), torch.zeros(203, dtype=torch.bool)
    rows[:, 3] += 400  # massive channels: mean / deviation of 400 and of 4,000
    rows[:, 5] = 0.5
    rows = rows / torch.linalg.vector_norm(rows.float(), dim=1, keepdim=True) * 20
    rows = rows.bfloat16()
    bos[[0, 50, 120]] = True
    rows[[0, 50]] *= 100  # a BOS stays one however long it is
    rows[[7, 8, 202]] = (normal(3, 24, 1) * 500).bfloat16()
    rows[9] = float("nan")
    rows[10, 4], rows[11, 0], rows[120, 1] = float("inf"), -float("inf"), float("nan")
    found = check(rows, bos, 16, device)
    assert np.flatnonzero(found.kinds == BOS).tolist() == [0, 50]
    assert np.flatnonzero(found.kinds == OUTLIER).tolist() == [7, 8, 202]
    assert np.flatnonzero(found.kinds == NON_FINITE).tolist() == [9, 10, 11, 120]
    assert found.counts.tolist() == [2, 3, 194]
    assert found.per_chunk.shape == (13, 4)
    assert found.per_chunk.sum() == 203


@pytest.mark.parametrize("ratio", [400, 1e5])
def test_moments_are_exact_where_the_mean_dwarfs_the_deviation(device: str, ratio: float) -> None:
    """Steps of one bfloat16 ulp about a large mean.

    float32 sums, or E[x²] − E[x]² in float64, would fail.
    """
    rows = normal(500, 24)
    sparse = torch.rand(500, 24, generator=torch.Generator().manual_seed(5)) < min(
        1.0, (128 / ratio) ** 2 * 8
    )
    rows[:, ::2] = torch.where(sparse[:, ::2], 129.0, 128.0).bfloat16() * 2.0**20
    rows[:, 4] = 3.0  # constant: no deviation at all, and no rounding that looks like one
    found = check(rows, torch.zeros(500, dtype=torch.bool), 64, device)
    assert found.moments[ORDINARY, 1, 4] == 0
    assert found.moments[ORDINARY, 0, 4] == 3


def test_sinks_that_are_all_but_equal_keep_their_deviation(device: str) -> None:
    """Sums about the ordinary rows' mean would lose it: it is 1e-4 of the distance."""
    rows, bos = normal(100, 24), torch.zeros(100, dtype=torch.bool)
    bos[::10] = True
    rows[bos] = 10_000.0
    rows[0] = 10_048.0
    check(rows, bos, 16, device)


def test_extreme_values_of_bfloat16(device: str) -> None:
    rows, bos = normal(40, 24), torch.zeros(40, dtype=torch.bool)
    huge = torch.finfo(torch.bfloat16).max
    rows[3] = huge  # finite, but its norm is no float32
    rows[4] = 0
    rows[4, 0] = huge  # norm just representable: an outlier with squares beyond float32
    rows[5] = 1e-40  # subnormal: squares that float32 rounds to zero
    rows[6] = 0
    found = check(rows, bos, 16, device)
    assert found.kinds[3:7].tolist() == [NON_FINITE, OUTLIER, ORDINARY, ORDINARY]
    assert found.norms[5] > 0
    assert np.isfinite(found.moments).all()


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
@pytest.mark.parametrize("is_bos", [False, True])
def test_one_row(device: str, value: float, is_bos: bool) -> None:
    found = check(torch.full((1, 24), value).bfloat16(), torch.tensor([is_bos]), 16, device)
    assert found.kinds.tolist() == [NON_FINITE if value != value else BOS if is_bos else ORDINARY]
    assert np.isfinite(found.moments).all()


def test_all_bos_and_all_broken(device: str) -> None:
    rows = normal(30, 24)
    assert check(rows, torch.ones(30, dtype=torch.bool), 16, device).counts.tolist() == [30, 0, 0]
    rows[:] = float("inf")
    assert check(rows, torch.zeros(30, dtype=torch.bool), 16, device).counts.tolist() == [0, 0, 0]


def test_the_same_rows_give_the_same_bits(device: str) -> None:
    rows, bos = normal(300, 24).to(device), torch.zeros(300, dtype=torch.bool, device=device)
    first = describe(rows, bos, 16, BLOCK)
    again = describe(rows.clone(), bos.clone(), 16, BLOCK)
    for one, other in zip(first, again, strict=True):
        assert one.tobytes() == other.tobytes()


@given(
    n=st.integers(1, 60), d=st.integers(1, 40), chunk=st.integers(1, 70), seed=st.integers(0, 99)
)
@settings(max_examples=60)
def test_any_shape(n: int, d: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(
        rng.normal(size=(n, d)) * 10.0 ** rng.integers(-2, 3, (n, 1))
    ).bfloat16()
    rows[torch.from_numpy(rng.random(n) < 0.1)] = float("nan")
    check(rows, torch.from_numpy(rng.random(n) < 0.2), chunk, DEVICES[-1])
