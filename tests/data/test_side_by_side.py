"""Rows of several hook points, and of two stores, side by side: which are kept, and in what order.

The reference knows the planted rows and nothing of the store's files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from residual_saes.data import order
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows import split, summary
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.rounds import KeptRows
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, held_out
from residual_saes.data.rows.windows import Tuning
from residual_saes.data.site import HookPoint
from residual_saes.data.store import ring_state
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.store.zarr_bfloat16 import to_bits
from residual_saes.data.text.packing import Cursor
from tests.conftest import commit, make_manifest
from tests.data.test_ring import SPAN, follower, harvester, make_ring

CONTEXT, UNIT, CHUNK, N, D = 8, 32, 8, 32 * 13 - 8, 6
POINTS = [HookPoint(3), HookPoint(5), HookPoint(3, "mlp_in")]
PLAIN = 11  # a token that drop_tokens may name


class Planted(NamedTuple):
    """A store and what it was made of, in the order of the text."""

    store: Store
    rows: dict[HookPoint, NDArray[np.float64]]  # (N, D) by hook point
    tokens: NDArray[np.int64]  # (N,)
    starts: NDArray[np.bool_]  # (N,) first tokens of pieces

    def sources(self, points: Sequence[HookPoint]) -> list[Source]:
        return [Source.of(self.store, point) for point in points]

    def kept(self, points: Sequence[HookPoint], policy: Policy) -> NDArray[np.bool_]:
        """(N,) which rows every source keeps, counted without our code."""
        kept = ~np.isin(self.tokens, policy.drop_tokens)
        if policy.drop_bos:
            kept &= ~self.starts
        for point in points:
            for first in range(0, N, UNIT):
                here = slice(first, first + UNIT)
                norms = np.linalg.norm(self.rows[point][here], axis=1)
                finite = np.isfinite(norms)
                kept[here] &= finite
                if policy.drop_outliers:
                    long = norms > 10 * np.median(norms[finite])
                    kept[here] &= ~long | self.starts[here]
        return kept

    def side_by_side(self, points: Sequence[HookPoint]) -> NDArray[np.float64]:
        return np.concatenate([self.rows[point] for point in points], axis=1)

    def numbers(self, units: Sequence[int]) -> NDArray[np.int64]:
        """The tokens of some units, in the order of the text."""
        return np.concatenate([np.arange(u * UNIT, min(N, (u + 1) * UNIT)) for u in units])


Outliers = Mapping[HookPoint, Sequence[int]]


def plant(
    path: Path,
    long: Outliers,
    broken: Outliers | None = None,
    codec: str = "none",
    seed: int = 3,
    width: int = D,
    text: int = 3,
) -> Planted:
    """A store of all POINTS.

    Args:
        long: tokens whose rows are outliers, by hook point.
        broken: tokens whose rows hold NaN.
        seed: of the rows.
        text: seed of the tokens.
    """
    of_text, rng = np.random.default_rng(text), np.random.default_rng(seed)
    starts = of_text.random((N // CONTEXT, CONTEXT)) < 0.1
    starts[:, 0] = True
    tokens = of_text.integers(20, 200, starts.shape)
    tokens[of_text.random(starts.shape) < 0.1] = PLAIN
    tokens[starts] = 2
    document = (starts.cumsum().reshape(starts.shape) - 1).astype(np.uint32)
    sizes = {"tokens": N, "context": CONTEXT, "unit": UNIT, "chunk": CHUNK, "codec": codec}
    store = Store.open_or_create(path, make_manifest(width, **sizes))
    packed = UNIT // CONTEXT
    for unit, first in enumerate(range(0, len(tokens), packed)):
        here = slice(first, first + packed)
        store.commit_spine(
            unit, tokens[here].astype(np.uint32), document[here], Cursor(first, 0, None)
        )
    store.close_spine(SpineEnd(len(tokens), ended_early=False))
    bits = {}
    for point in POINTS:
        rows = rng.normal(size=(N, width)) + 1
        rows[list(long.get(point, []))] *= 1000
        rows[list((broken or {}).get(point, [])), 1] = np.nan
        bits[point] = to_bits(rows.astype(np.float32))
    for unit in range(store.units):
        here = slice(unit * UNIT, (unit + 1) * UNIT)
        commit(store, unit, {point: rows[here] for point, rows in bits.items()})
    for point in POINTS:
        summary.write(store, point)
    stored = {
        point: torch.from_numpy(rows).view(torch.bfloat16).double().numpy()
        for point, rows in bits.items()
    }
    return Planted(store, stored, tokens.ravel(), starts.ravel())


def in_order(
    planted: Planted, points: Sequence[HookPoint], policy: Policy, window: int, seed: int
) -> Iterator[NDArray[np.float64]]:
    """The stream's rows, one by one, by its definition.

    Chunks are shuffled, `window` of them are gathered, and their kept rows are shuffled.
    """
    store, kept = planted.store, planted.kept(points, policy)
    rows = planted.side_by_side(points)
    parts = []
    for unit in split.training_units(store):
        stored = store.permutation(unit) + unit * UNIT
        for first in range(0, len(stored), CHUNK):
            chunk = stored[first : first + CHUNK]
            if kept[chunk].any():
                parts.append(rows[chunk[kept[chunk]]])
    for number in count():
        shuffled = [parts[at] for at in order.permutation(len(parts), seed, number)]
        for first in range(0, len(shuffled), window):
            together = np.concatenate(shuffled[first : first + window])
            yield from together[order.permutation(len(together), seed, number, first // window)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Planted]:
    """Outliers and broken rows in chunks of one source, in the same chunks of several, nowhere."""
    folder = tmp_path_factory.mktemp("several")
    a, b, c = POINTS
    rng = np.random.default_rng(1)
    anywhere = {point: rng.integers(0, N, 60).tolist() for point in POINTS}
    apart = {a: [17, 100], b: [41, 301], c: [262, 399]}  # no two in one chunk of a unit
    with _undisturbed_by_fsync():
        return [
            plant(folder / "anywhere", anywhere, {a: [3, 50, 72], b: [0, 50, 73], c: [51]}),
            plant(folder / "apart", apart),
            plant(folder / "same", {point: [9, 77, 200, 380] for point in POINTS}, codec="blosc"),
            plant(folder / "one", {b: [9, 77, 201]}, {b: [8, 32]}),
            plant(folder / "none", {}),
        ]


@contextmanager
def _undisturbed_by_fsync() -> Iterator[None]:
    """Disks take 3 ms for each of a store's 400 files, and nothing here asks what they hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


policies = st.builds(Policy, st.booleans(), st.booleans(), st.sampled_from([(), (PLAIN,)]))


@given(
    which=st.integers(0, 4),
    points=st.permutations(POINTS),
    count_of=st.integers(1, 3),
    policy=policies,
    batch=st.integers(1, 90),
    window=st.integers(1, 20),
    start=st.integers(0, 900),
)
@settings(max_examples=30)
def test_rows_are_kept_together_and_in_one_order(
    several: list[Planted],
    which: int,
    points: Sequence[HookPoint],
    count_of: int,
    policy: Policy,
    batch: int,
    window: int,
    start: int,
) -> None:
    """Wherever the outliers of the sources lie, in the same chunks or not."""
    planted = several[which]
    points = points[:count_of]
    sources = planted.sources(points)
    stream = Reader(
        sources, batch=batch, seed=5, policy=policy, window=window, tuning=Tuning(threads=2)
    )
    rows, kept = planted.side_by_side(points), planted.kept(points, policy)
    training = planted.numbers(split.training_units(planted.store))
    chosen = training[kept[training]]
    assert stream.rows == len(chosen)
    assert stream.widths == [D] * len(points)

    first = start // batch
    with closing(stream.batches(first)) as batches:
        got = np.concatenate([each.double().numpy() for each in islice(batches, 3)])
    order_of = in_order(planted, points, policy, window, 5)
    expected = list(islice(order_of, first * batch, (first + 3) * batch))
    np.testing.assert_array_equal(got, np.stack(expected))

    # Exact, for the sample is all of so small a store.
    norms = [np.linalg.norm(planted.rows[point][chosen], axis=1).mean() for point in points]
    np.testing.assert_allclose(stream.mean, rows[chosen].mean(0), rtol=1e-9)
    np.testing.assert_allclose(stream.variance, rows[chosen].var(0), rtol=1e-9)
    np.testing.assert_allclose(stream.mean_norms, norms, rtol=1e-6)


@pytest.mark.parametrize("policy", [Policy(), Policy(False, True, (PLAIN,))], ids=str)
def test_held_out_rows_are_kept_together(several: list[Planted], policy: Policy) -> None:
    planted = several[0]
    rows, kept = planted.side_by_side(POINTS), planted.kept(POINTS, policy)
    held = split.held_out_units(planted.store)
    stored = np.concatenate([planted.store.permutation(unit) + unit * UNIT for unit in held])
    evaluated = [each.double().numpy() for each in held_out(planted.sources(POINTS), policy, 7)]
    np.testing.assert_array_equal(np.concatenate(evaluated), rows[stored[kept[stored]]])
    assert max(map(len, evaluated)) == 7


def test_one_source_alone_has_the_order_of_its_kept_rows(several: list[Planted]) -> None:
    """Where no source drops a row more, each column is what its source gives alone."""
    planted = several[2]
    how: Any = {"batch": 20, "seed": 5, "policy": Policy(), "window": 9}
    together = Reader(planted.sources(POINTS), **how)
    batches = [each.clone() for each in islice(together.batches(3), 12)]
    for number, point in enumerate(POINTS):
        alone = Reader(planted.sources([point]), **how)
        columns = slice(number * D, (number + 1) * D)
        for batch, own in zip(batches, islice(alone.batches(3), 12), strict=True):
            assert torch.equal(batch[:, columns], own)
        # And the statistics are the store's, to the bit.
        np.testing.assert_array_equal(together.mean[columns], alone.mean)
        np.testing.assert_array_equal(together.variance[columns], alone.variance)
        assert together.mean_norms[number] == alone.mean_norms[0]


@pytest.mark.parametrize("policy", [Policy(), Policy(drop_tokens=(PLAIN,))], ids=str)
def test_what_is_left_out_of_all_sources_is_told(several: list[Planted], policy: Policy) -> None:
    """Each rule's share of the rows, and the mean of its shares of the energy."""
    planted = several[0]
    shares = Reader(planted.sources(POINTS), batch=4, seed=0, policy=policy).left_out
    training = planted.numbers(split.training_units(planted.store))
    before = planted.kept(POINTS, Policy(False, False))[training]
    total = before.copy()
    for rule in ("drop_bos", "drop_outliers", "drop_tokens"):
        if not getattr(policy, rule):
            assert rule not in shares
            continue
        so_far = Policy(True, rule != "drop_bos", policy.drop_tokens * (rule == "drop_tokens"))
        after = planted.kept(POINTS, so_far)[training]
        assert shares[rule].rows == pytest.approx((before & ~after).sum() / total.sum())
        energies = []
        for point in POINTS:
            squared = np.square(planted.rows[point][training]).sum(1)
            energies.append(squared[before & ~after].sum() / squared[total].sum())
        assert shares[rule].energy == pytest.approx(np.mean(energies), rel=1e-5)
        before = after


def test_records_alone_count_where_sources_drop_rows_of_other_chunks(
    several: list[Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large store nothing is read to count but units where that is in doubt."""
    read = []
    kinds = Store.kinds
    monkeypatch.setattr(
        Store, "kinds", lambda store, *which: read.append(which[1]) or kinds(store, *which)
    )
    for planted, doubtful in ((several[1], False), (several[3], False), (several[2], True)):
        read.clear()
        kept = KeptRows(planted.sources(POINTS), Policy())
        units = split.training_units(planted.store)
        counted = kept.of_chunks(units)
        assert bool(read) == doubtful
        assert counted.sum() == planted.kept(POINTS, Policy())[planted.numbers(units)].sum()


def test_a_source_that_is_not_there_is_refused(several: list[Planted]) -> None:
    missing = HookPoint(3, "mlp_out")
    with pytest.raises(StoreError, match=r"mlp_out of layer 3 .*mlp_in of layer 3"):
        Reader(several[0].sources([POINTS[0], missing]), batch=1, seed=0, policy=Policy())


# -- two stores ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two models' rows of the same tokens, of other widths, in stores of other codecs."""

    one: Planted
    other: Planted


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    with _undisturbed_by_fsync():
        return Pair(
            plant(folder / "base", {POINTS[0]: [40, 41, 200]}, seed=3),
            plant(folder / "it", {POINTS[0]: [40, 77, 250]}, codec="blosc", seed=4, width=9),
        )


def test_two_stores_give_rows_of_the_same_tokens(pair: Pair) -> None:
    point = POINTS[0]
    sources = [Source.of(planted.store, point) for planted in pair]
    stream = Reader(sources, batch=1, seed=5, policy=Policy(), window=9)
    assert stream.widths == [D, 9]
    kept = pair.one.kept([point], Policy()) & pair.other.kept([point], Policy())
    training = pair.one.numbers(split.training_units(pair.one.store))
    chosen = training[kept[training]]
    rows = np.concatenate([planted.rows[point] for planted in pair], axis=1)
    assert stream.rows == len(chosen) < pair.one.kept([point], Policy())[training].sum()
    got = np.concatenate([each.double().numpy() for each in islice(stream.batches(0), stream.rows)])
    np.testing.assert_array_equal(got[np.lexsort(got.T)], _sorted(rows[chosen]))
    evaluated = np.concatenate([n.double().numpy() for n in held_out(sources, Policy(), 50)])
    rest = np.setdiff1d(np.flatnonzero(kept), training)
    np.testing.assert_array_equal(_sorted(evaluated), _sorted(rows[rest]))


def _sorted(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows[np.lexsort(rows.T)]


def test_a_store_with_itself(pair: Pair) -> None:
    """The null of a comparison of two models."""
    source = Source.of(pair.one.store, POINTS[0])
    twice = Reader([source, source], batch=30, seed=5, policy=Policy())
    alone = Reader([source], batch=30, seed=5, policy=Policy())
    for both, own in zip(islice(twice.batches(0), 9), islice(alone.batches(0), 9), strict=True):
        assert torch.equal(both, torch.cat([own, own], 1))


@pytest.mark.parametrize("setting", ["seed", "unit", "context", "chunk", "tokens", "text", "ring"])
def test_two_stores_of_other_tokens_are_refused(pair: Pair, setting: str, tmp_path: Path) -> None:
    """By the setting, with both values; a text by the first unit that differs."""
    one = pair.one.store
    with _undisturbed_by_fsync():
        if setting == "text":
            other = plant(tmp_path / "s.zarr", {}, text=9).store
        elif setting == "ring":
            other = Store.open(shutil.copytree(pair.other.store.name, tmp_path / "s.zarr"))
            make_ring(LocalPlace(tmp_path / "s.zarr"))
        else:
            other = _spine_alone(tmp_path / "s.zarr", setting)
    sources = [Source.of(one, POINTS[0]), Source.of(other, POINTS[0])]
    wanted = {"text": "unit 0", "ring": "ring"}.get(setting, setting)
    with pytest.raises(SettingError, match=rf"\b{wanted}\b") as refused:
        Reader(sources, batch=1, seed=0, policy=Policy())
    assert len(str(refused.value).splitlines()) == 1


def _spine_alone(path: Path, differs: str) -> Store:
    """A store like `plant`'s with another value of one setting, and without rows."""
    sizes = {"tokens": N, "context": CONTEXT, "unit": UNIT, "chunk": CHUNK, "seed": 7}
    sizes[differs] = {"seed": 8, "tokens": N - CONTEXT}.get(differs, sizes[differs] // 2)
    seed = sizes.pop("seed")
    store = Store.open_or_create(path, {**make_manifest(D, **sizes), "seed": seed})
    packed = sizes["unit"] // sizes["context"]
    rows = sizes["tokens"] // sizes["context"]
    for unit, first in enumerate(range(0, rows, packed)):
        shape = min(packed, rows - first), sizes["context"]
        store.commit_spine(
            unit, np.ones(shape, np.uint32), np.ones(shape, np.uint32), Cursor(unit, 0, None)
        )
    store.close_spine(SpineEnd(rows, ended_early=False))
    return store


def test_two_texts_that_differ_in_one_token_are_refused(pair: Pair, tmp_path: Path) -> None:
    """Whatever the codecs: in one of these pairs the files of equal tokens are equal."""
    for number, planted in enumerate(pair):
        copy = tmp_path / str(number)
        with _undisturbed_by_fsync():
            shutil.copytree(planted.store.name, copy)
            last = planted.store.units - 1
            (copy / f"commits/spine/{last:08d}.json").unlink()
            changed = planted.store.tokens(last).copy()
            changed[-1, -1] += 1
            documents = planted.store.document(last)
            Store.open(copy).commit_spine(last, changed, documents, Cursor(0, 0, None))
        sources = [Source.of(pair.one.store, POINTS[0]), Source.of(Store.open(copy), POINTS[0])]
        with pytest.raises(SettingError, match=rf"unit {last}\b"):
            Reader(sources, batch=1, seed=0, policy=Policy())


# -- a ring ----------------------------------------------------------------------------------------


@pytest.fixture
def ring(several: list[Planted], tmp_path: Path) -> Planted:
    planted = several[0]
    folder = shutil.copytree(planted.store.name, tmp_path / "ring.zarr")
    make_ring(LocalPlace(folder))
    return planted._replace(store=Store.open(folder))


def test_a_ring_serves_several_points_group_by_group(ring: Planted) -> None:
    stream = Reader(ring.sources(POINTS), batch=6, seed=5, policy=Policy(), window=5)
    units = split.training_units(ring.store)
    kept, rows = ring.kept(POINTS, Policy()), ring.side_by_side(POINTS)
    batches = [each.double().numpy() for each in islice(stream.batches(0), stream.rows // 6)]
    served = np.concatenate(batches)
    end = 0
    for first in range(0, len(units), SPAN):
        numbers = ring.numbers(units[first : first + SPAN])
        group = rows[numbers[kept[numbers]]]
        part = served[end : end + len(group)]
        end += len(group)
        if len(part) == len(group):
            np.testing.assert_array_equal(_sorted(part), _sorted(group))
    assert end >= len(served) > len(rows[kept]) / 2

    # It registers by its hook points, and goes on when the first groups are freed.
    own = follower(ring.store, stream)
    own.begin(0)
    (registered,) = ring_state.registrations(ring.store.place).values()
    assert registered.layer == [3, 5, "mlp_in_3"] and "mlp_in of layer 3" in registered.read
    later = len(batches) - 1
    own.release(later)
    harvester(ring.store).free()
    again = Reader(ring.sources(POINTS), batch=6, seed=5, policy=Policy(), window=5)
    assert (again.rows, again.mean_norms) == (stream.rows, stream.mean_norms)
    np.testing.assert_array_equal(again.mean, stream.mean)
    assert again.left_out == stream.left_out
    np.testing.assert_array_equal(next(again.batches(later)).double().numpy(), batches[later])
    with pytest.raises(StoreError, match="freed"):
        next(again.batches(0))


def test_a_group_is_there_when_all_its_points_are(ring: Planted) -> None:
    """Points of a ring may be committed apart."""
    units = split.training_units(ring.store)
    late = units[SPAN + 1]
    store = Store.open(ring.store.name)
    ledgers = store.ledger.points
    ledgers[POINTS[2]].committed[late] = ledgers[POINTS[2]].named[late] = False
    stream = Reader([Source.of(store, point) for point in POINTS], batch=6, seed=5, policy=Policy())
    without = Reader(
        [Source.of(store, point) for point in POINTS[:2]], batch=6, seed=5, policy=Policy()
    )
    ends = stream.rows // 6 - 1
    store.refresh = lambda: None  # type: ignore[method-assign]
    assert stream.has(0) and not stream.has(ends) and without.has(ends)
