"""Processes that share a store without locks: each goes on without the others."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from residual_saes.data.store.claims import METADATA, SPINE, Claims, unit_claim
from residual_saes.data.store.leases import FOLDER, Leases
from residual_saes.data.store.manifest import KEY
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.retention import KeepAll
from residual_saes.data.text.sources import FileText
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.waiting import Waiting
from tests.faults.child import in_child, outcome
from tests.faults.tree import files as tree
from tests.harvest.models import save_model
from tests.harvest.test_kills import open_model

LIFE_S = 1.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "model", "gemma4")
    (folder / "text.txt").write_text("All work and no play makes nobody happy. " * 40)
    return folder


@pytest.fixture
def leased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders have no locks, and leases end soon."""

    def claims(place: LocalPlace) -> Claims:
        return Leases(place, life_s=LIFE_S, poll_s=0.05)

    monkeypatch.setattr(LocalPlace, "claims", claims)


def config(store: Path, rank: int = 0) -> HarvestConfig:
    return HarvestConfig(
        str(store),
        (4,),
        tokens=512,
        context=16,
        batch=2,
        unit=64,
        chunk=16,
        sites=("mlp_in", "resid_post"),
        rank=rank,
        world=3,
    )


def harvest_into(store: Path, root: Path, rank: int = 0) -> None:
    harvest(config(store, rank), open_model(root), FileText(root / "text.txt"))


def contents(store: Path) -> dict[str, bytes]:
    files = tree(store)
    files.pop("commits/claims", None)
    return files


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, bytes]:
    """The store of one process, on a file system with locks."""
    harvest_into(root / "alone.zarr", root)
    return contents(root / "alone.zarr")


def test_what_dead_processes_held_is_made_by_the_living(
    root: Path, tmp_path: Path, alone: dict[str, bytes], leased: None
) -> None:
    store = tmp_path / "s.zarr"
    place = LocalPlace(store)
    assert place.create(KEY, alone[KEY])
    dead = [Leases(place, life_s=3600.0) for _ in range(3)]  # nobody renews these within an hour
    assert dead[0].take(SPINE) and dead[0].take(unit_claim(0))
    assert dead[1].take(unit_claim(5)) and dead[1].take(METADATA)
    assert dead[2].take(unit_claim(6))
    harvest_into(store, root, rank=1)
    assert contents(store) == alone
    assert os.listdir(store / FOLDER) == []


def test_two_that_begin_together_make_one_store(
    root: Path, tmp_path: Path, alone: dict[str, bytes], leased: None
) -> None:
    store = tmp_path / "s.zarr"
    child = in_child(partial(harvest_into, store, root, 1))
    harvest_into(store, root, 0)
    assert outcome(child) == 0
    assert contents(store) == alone
    assert os.listdir(store / FOLDER) == []


def test_every_rank_goes_over_all_units_from_a_place_of_its_own() -> None:
    missing = {unit: [3] for unit in range(0, 64, 2)}
    orders = [[unit for unit, _ in KeepAll().ordered(missing, rank)] for rank in range(16)]
    assert orders[0] == list(missing)
    assert all(sorted(order) == list(missing) for order in orders)
    starts = sorted(order[0] for order in orders)
    assert starts == list(range(0, 64, 4))  # as far apart as they can be
    assert not list(KeepAll().ordered({}, 7))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that were told."""
    lines: list[str] = []
    monkeypatch.setattr("residual_saes.harvest.waiting.tell", lines.append)
    return lines


def test_a_wait_is_said_once_it_lasts_and_again_later(told: list[str]) -> None:
    waiting = Waiting(quiet_s=0.0, again_s=3600.0)
    waiting.on("the text")
    assert told == []
    for _ in range(3):
        waiting.on("the text", ": 3 of 7")
    waiting.on("2 units")
    waiting.on("2 units")
    waiting.over()
    waiting.on("2 units")
    assert told == ["waiting for the text: 3 of 7", "waiting for 2 units"]
    often = Waiting(quiet_s=0.0, again_s=0.0)
    for _ in range(3):
        often.on("the text")
    assert len(told) == 4
