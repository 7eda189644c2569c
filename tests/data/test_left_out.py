"""Rows that are left out by their token or their norm: planted sinks, as Qwen has them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows import split
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, held_out, held_out_units
from residual_saes.data.rows.statistics import sample, told
from residual_saes.data.store.kinds import OUTLIER
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.store import Store
from residual_saes.data.store.zarr_bfloat16 import to_bits
from tests.conftest import make_store
from tests.data.test_ring import SPAN, follower, harvester, make_ring

START, SINK, PLAIN = (
    7,
    9,
    11,
)  # an EOS that stands in for BOS, a token that sinks, one that does not
CONTEXT, UNIT, N, D = 16, 64, 1024, 6
NOTHING = Policy(drop_bos=False, drop_outliers=False)
BY_TOKEN = Policy(drop_bos=False, drop_outliers=False, drop_tokens=(START, SINK))
POLICIES = [
    NOTHING,
    Policy(),
    BY_TOKEN,
    Policy(drop_tokens=(PLAIN,)),
    Policy(drop_tokens=(SINK, PLAIN, 10**6)),
    Policy(drop_bos=False, drop_tokens=(START,)),
    Policy(drop_outliers=False, drop_tokens=(START, SINK, PLAIN)),
]


class Planted(NamedTuple):
    """A store and what it was made of, in the order of the text."""

    store: Store
    rows: NDArray[np.float64]  # (N, D)
    tokens: NDArray[np.int64]  # (N,)
    starts: NDArray[np.bool_]  # (N,) first tokens of pieces

    def kept(self, policy: Policy, units: list[int]) -> NDArray[np.int64]:
        """Rows that a policy keeps of some units, counted without our code."""
        found = []
        for unit in units:
            here = np.arange(unit * UNIT, (unit + 1) * UNIT)
            norms = np.linalg.norm(self.rows[here], axis=1)
            dropped = np.isin(self.tokens[here], policy.drop_tokens)
            if policy.drop_bos:
                dropped |= self.starts[here]
            if policy.drop_outliers:
                dropped |= (norms > 10 * np.median(norms)) & ~self.starts[here]
            found.append(here[~dropped])
        return np.concatenate(found)

    def energy(self, numbers: NDArray[np.int64]) -> float:
        return float(np.square(self.rows[numbers]).sum())


def plant(path: Path) -> Planted:
    rng = np.random.default_rng(3)
    starts = rng.random((N // CONTEXT, CONTEXT)) < 0.08
    starts[:, 0] = True
    tokens = rng.integers(20, 200, starts.shape)
    tokens[rng.random(starts.shape) < 0.06] = PLAIN
    tokens[rng.random(starts.shape) < 0.04] = SINK
    tokens[starts] = START
    document = starts.cumsum().reshape(starts.shape) - 1
    rows = rng.normal(size=(N, D)) + 0.5
    rows[np.isin(tokens.ravel(), (START, SINK))] *= 100
    bits = to_bits(rows.astype(np.float32))
    spine = (tokens.astype(np.uint32), document.astype(np.uint32))
    store = make_store(path, bits, context=CONTEXT, unit=UNIT, spine=spine)
    stored = torch.from_numpy(bits).view(torch.bfloat16).double().numpy()
    return Planted(store, stored, tokens.ravel(), starts.ravel())


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return plant(tmp_path / "s.zarr")


def reader(store: Store, policy: Policy, batch: int = 1) -> Reader:
    return Reader([Source.of(store, 3)], batch=batch, seed=5, policy=policy, window=7)


def rows_of(batches: Any) -> NDArray[np.float64]:
    rows = torch.cat([batch.clone() for batch in batches]).double().numpy()
    return rows[np.lexsort(rows.T)]


def require_equal(served: NDArray[np.float64], planted: Planted, kept: NDArray[np.int64]) -> None:
    rows = planted.rows[kept]
    np.testing.assert_array_equal(served, rows[np.lexsort(rows.T)])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_exactly_the_kept_rows_are_served(planted: Planted, policy: Policy) -> None:
    store = planted.store
    units = split.training_units(store)
    kept = planted.kept(policy, units)
    stream = reader(store, policy)
    assert stream.rows == len(kept) > 0
    require_equal(rows_of(islice(stream.batches(0), stream.rows)), planted, kept)
    evaluated = rows_of(held_out([Source.of(store, 3)], policy, batch=10))
    require_equal(evaluated, planted, planted.kept(policy, held_out_units(store)))

    # The statistics are those of the very rows that are served.
    rows = planted.rows[kept]
    np.testing.assert_allclose(stream.mean, rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(stream.variance, rows.var(0), rtol=1e-9)
    assert stream.mean_norms[0] == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-6)


def test_both_rules_drop_the_sinks(planted: Planted) -> None:
    sinks = np.isin(planted.tokens, (START, SINK))
    assert 100 < sinks.sum() < 200
    for policy in (Policy(), BY_TOKEN):
        kept = planted.kept(policy, list(range(planted.store.units)))
        assert not sinks[kept].any() and len(kept) == (~sinks).sum()
        evaluated = held_out([Source.of(planted.store, 3)], policy, 64)
        longest = max(map(np.max, map(np.abs, rows_of(evaluated))))
        assert longest < 10


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_shares_are_those_of_a_plain_count(planted: Planted, policy: Policy) -> None:
    """Each rule's share is what it adds to the rules before it."""
    units = split.training_units(planted.store)
    shares = reader(planted.store, policy).left_out
    before = planted.kept(NOTHING, units)
    total = (len(before), planted.energy(before))
    so_far = {"drop_bos": False, "drop_outliers": False, "drop_tokens": ()}
    for rule in so_far:
        value = getattr(policy, rule)
        assert (rule in shares) == bool(value)
        if value:
            so_far[rule] = value
            after = planted.kept(Policy(**so_far), units)
            rows = (len(before) - len(after)) / total[0]
            energy = (planted.energy(before) - planted.energy(after)) / total[1]
            assert shares[rule].rows == pytest.approx(rows, abs=1e-12)
            assert shares[rule].energy == pytest.approx(energy, abs=1e-6)
            before = after
    recorded = {rule: share._asdict() for rule, share in shares.items()}
    line = told(policy, recorded)
    for share in shares.values():
        words = f"{share.rows:.3%} of rows, {share.energy:.3%} of E|x|²" if share.rows else "(none)"
        assert words in line
    assert (line == "nothing") == (policy == NOTHING)


@pytest.mark.parametrize("policy", [BY_TOKEN, Policy(drop_tokens=(PLAIN,))], ids=str)
def test_a_ring_drops_tokens_too(planted: Planted, policy: Policy) -> None:
    store = planted.store
    make_ring(LocalPlace(Path(store.name)))
    units = split.training_units(store)
    stream = reader(store, policy, batch=8)
    kept = planted.kept(policy, units)
    first = len(planted.kept(policy, units[:SPAN]))
    assert first <= stream.rows <= len(kept)
    if policy == BY_TOKEN:  # the spine tells all of it before the rows are there
        assert stream.rows == len(kept) - (len(kept) - first) // 1000 - stream.batch
    batches = list(islice(stream.batches(0), stream.rows // 8))
    served = {tuple(row) for row in torch.cat(batches).double().tolist()}
    assert served <= {tuple(row) for row in planted.rows[kept].tolist()}
    expected = planted.rows[planted.kept(policy, held_out_units(store))]
    np.testing.assert_allclose(stream.mean, expected.mean(0), rtol=1e-9)

    # A run that goes on when the first groups are freed.
    follower(store, stream).begin(0)
    follower(store, stream).release(first // 8 + 1)
    harvester(store).free()
    again = reader(Store.open(store.name), policy, batch=8)
    with pytest.raises(StoreError, match="freed"):
        next(again.batches(0))
    assert (again.rows, again.mean_norms) == (stream.rows, stream.mean_norms)
    np.testing.assert_array_equal(again.mean, stream.mean)
    np.testing.assert_array_equal(again.variance, stream.variance)
    assert again.left_out == stream.left_out
    start = first // 8 + 1
    assert torch.equal(next(again.batches(start)), batches[start])


def test_a_large_stores_statistics_are_of_a_sample() -> None:
    """262,144 rows or more, from the beginning to the end: texts may be sorted."""
    units = list(range(10, 910))
    assert sample(units, 64) == units
    assert sample(units, 65_536) == [10, 310, 609, 909]
    assert sample(units, 1_000_000) == [10]
    assert sample([3], 64) == [3]


def test_kinds_that_are_marked(planted: Planted) -> None:
    """Only what the policy would serve is marked, so that each row has one reason."""
    kinds = planted.store.kinds(3, 0)
    marked = Policy(drop_tokens=(SINK, PLAIN)).kinds_of(planted.store, 3, 0)
    np.testing.assert_array_equal(split.stored_kind(marked), kinds)
    is_plain = (planted.tokens == PLAIN)[planted.store.permutation(0)]
    np.testing.assert_array_equal(marked >= split.EXCLUDED, is_plain)
    assert (marked == OUTLIER).any()  # sinks go by their norm


def test_policies_are_checked_and_recorded_as_before() -> None:
    assert Policy().recorded() == {"drop_bos": True, "drop_outliers": True}
    for policy in POLICIES:
        assert Policy.of(policy.recorded()) == policy
    for tokens in ((-1,), (3, 2), (2, 2)):
        with pytest.raises(SettingError, match="drop_tokens="):
            Policy(drop_tokens=tokens)


def test_nothing_left_is_refused(planted: Planted) -> None:
    everything = tuple(range(200))
    with pytest.raises(StoreError, match="drop_tokens"):
        reader(planted.store, Policy(drop_tokens=everything))
