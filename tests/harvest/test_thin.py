"""A thin store: a copy with what studies read, for when the disk of the whole one goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.analyze.linear import _fit
from residual_saes.analyze.studies.quality import quality
from residual_saes.analyze.subject import Subject
from residual_saes.data import order
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.rows.statistics import SAMPLED
from residual_saes.data.store import retention, ring_state
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.ring_state import RingState
from residual_saes.data.store.store import Store
from residual_saes.harvest.command import command as harvest
from residual_saes.harvest.status import status
from residual_saes.harvest.thinning import thin
from residual_saes.train import sae
from tests.analyze.conftest import add_points, write_run
from tests.conftest import make_store
from tests.faults import tree
from tests.harvest.test_command import tiny

D = 6
UNIT = SAMPLED // 2  # so that a sample is two units


def rows(n: int, seed: int) -> NDArray[np.uint16]:
    values = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1.0
    values[::701] *= 100  # outliers
    return values.bfloat16().view(torch.uint16).numpy()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of seven units, one of them held out, in int8, of two sites."""
    path = tmp_path_factory.mktemp("thin") / "s.zarr"
    n = 7 * UNIT - 1024
    shape = {"context": 256, "unit": UNIT, "chunk": 1024}
    tokens = np.random.default_rng(0).integers(3, 99, (n // 256, 256)).astype(np.uint32)
    document = np.repeat(np.arange(n // 256, dtype=np.uint32)[:, None] // 8, 256, axis=1)
    store = make_store(path, rows(n, 0), **shape, spine=(tokens, document))
    return add_points(store, {"mlp_in_3": rows(n, 1)})


@pytest.fixture(scope="module")
def cut(whole: Store) -> Store:
    thin(whole.place, None)
    return Store.open(whole.name.replace("s.zarr", "s_thin.zarr"))


def test_studies_give_the_same_figures(whole: Store, cut: Store, tmp_path: Path) -> None:
    """To the bit; those of a policy that is sampled, and of a linear map, too."""
    config = sae.SAEConfig(d_sae=16, k=3, k_aux=4, dead_after=1000)
    write_run(tmp_path / "run", whole, 3, config, sae.initial(config, torch.ones(D), seed=0))
    found = []
    for store in (whole, cut):
        subject = Subject.open(tmp_path / "run", [store.name], torch.device("cpu"))
        sampled = subject.moments_of(Policy(drop_tokens=(5, 6)))
        arrays = [*_fit(subject).values(), sampled.mean, sampled.m2]
        found.append([json.dumps(quality(subject, 10**9)), *(array.tobytes() for array in arrays)])
    assert found[0] == found[1]


def test_it_has_few_units_and_all_records(whole: Store, cut: Store) -> None:
    held_out = order.held_out(whole.units, 7).tolist()
    kept = [unit for unit in range(whole.units) if retention.read(cut.place).stays(unit)]
    assert set(held_out) < set(kept)
    assert len(kept) == len(held_out) + 2
    assert cut.identity == whole.identity
    assert cut.points == whole.points
    assert not list(damage(cut.place))
    for point in whole.points:
        np.testing.assert_array_equal(
            cut.residuals(point, kept[0]), whole.residuals(point, kept[0])
        )
    gone = next(unit for unit in range(whole.units) if unit not in kept)
    np.testing.assert_array_equal(cut.kinds(3, gone), whole.kinds(3, gone))
    for read in (lambda: cut.residuals(3, gone), lambda: cut.tokens(gone)):
        with pytest.raises(StoreError, match="thin store"):
            read()
    assert any(line.startswith("thin: rows of 3 of 7 units") for line in status(cut.place))


def test_what_needs_all_rows_is_refused(cut: Store, whole: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="training needs"):
        Reader((Source.of(cut, 3),), batch=64, seed=0, policy=Policy(), pinned=False)
    with pytest.raises(StoreError, match="harvesting needs"):
        harvest(tiny(Path(cut.name)))
    for place, out in ((whole, whole.name), (whole, f"{whole.name}/x")):
        with pytest.raises(SettingError, match="out="):
            thin(place.place, out)
    other = make_store(tmp_path / "other.zarr", rows(640, 3), unit=128)
    with pytest.raises(StoreError, match=r"other\.zarr"):
        thin(whole.place, other.name)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(StoreError, match="not an activation store"):
        thin(whole.place, str(tmp_path))


class Stopping(LocalPlace):
    """A folder whose process ends before some write."""

    def __init__(self, path: Path, writes: int) -> None:
        super().__init__(path)
        self.left = writes

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def write(self, key: str, parts: Any) -> Any:
        self._count()
        return super().write(key, parts)

    def create(self, key: str, data: bytes) -> bool:
        self._count()
        return super().create(key, data)


@pytest.fixture
def small(tmp_path: Path) -> Store:
    return make_store(tmp_path / "s.zarr", rows(64 * 6, 0))


def test_a_stop_anywhere_is_gone_on_from(small: Store, tmp_path: Path) -> None:
    thin(small.place, str(tmp_path / "once.zarr"))
    out = tmp_path / "stopped.zarr"
    stops = 0
    for writes in range(1, 1000, 4):
        try:
            thin(small.place, Stopping(out, writes))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 5
    assert tree.read(out) == tree.read(tmp_path / "once.zarr")


def test_a_damaged_copy_is_found_and_made_again(small: Store, tmp_path: Path) -> None:
    out = tmp_path / "t.zarr"
    thin(small.place, str(out))
    expected = tree.read(out)
    file = next(file for file in sorted(out.glob("layer_3/c.*")))
    file.write_bytes(b"x" * file.stat().st_size)
    repair(LocalPlace(out))
    thin(small.place, str(out))
    assert tree.read(out) == expected


def test_a_damaged_store_is_not_copied(small: Store, tmp_path: Path) -> None:
    file = sorted(Path(small.name).glob("layer_3/c.*"))[2]
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(StoreError, match=r"layer_3/c\.2\.0.*repair"):
        thin(small.place, str(tmp_path / "t.zarr"))


def test_a_ring_keeps_what_is_held_out(small: Store, tmp_path: Path) -> None:
    held_out = order.held_out(small.units, 7).tolist()
    ring_state.write(small.place, RingState(10**6, 1, [3], held_out, small.units - len(held_out)))
    for unit in set(range(small.units)) - set(held_out):
        small.place.delete(small.arrays.rows(3).key(unit))
    thin(small.place, str(tmp_path / "t.zarr"))
    state = retention.read(LocalPlace(tmp_path / "t.zarr"))
    assert (state.span, [unit for unit in range(small.units) if state.stays(unit)]) == (1, held_out)


def test_an_incomplete_store_is_refused(tmp_path: Path, small: Store) -> None:
    next(Path(small.name).glob("commits/residuals/*2.3.json")).unlink()
    with pytest.raises(StoreError, match="lacks 1 of 6 units"):
        thin(small.place, str(tmp_path / "t.zarr"))
