"""Beside a harvest, and after one that was killed, a store is whole for verify and for readers.

A place that is left at some step of a harvest is what a kill at that step leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from residual_saes.data.errors import StoreError
from residual_saes.data.rows.split import held_out_units
from residual_saes.data.store import ring_state
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.ring import Ring
from residual_saes.data.store.ring_state import Registration, RingState
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import FileText
from residual_saes.harvest import loop, spine
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.spine_writer import write_spine
from residual_saes.harvest.status import status
from tests.harvest.models import save_model
from tests.harvest.replayed import Noted, Replayed, Step

LAYERS = (1, 4)
Steps = tuple[list[Step], int | None]


class Enough(Exception):
    """One unit of the text is written."""


class Inline:
    """Writes the spine in this process, a unit a look, so that it is noted with the rest."""

    @staticmethod
    def begin() -> None:
        """No process is needed."""

    def __init__(self, store: Store, source: Any, tokenizer: Any, bad: Any, *_: Any) -> None:
        self._all = (Store.open(store.place), source, tokenizer)
        self._looks = 0

    def finished(self) -> bool:
        self._looks = 0
        try:
            write_spine(*self._all, stop=self)
        except Enough:
            return False
        return True

    def check(self) -> None:
        self._looks += 1
        if self._looks > 1:
            raise Enough

    def stop(self) -> None:
        pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    folder = tmp_path_factory.mktemp("beside")
    save_model(folder / "model", "gemma4")
    (folder / "text.txt").write_text("All work and no play makes nobody happy. " * 9)
    lm = load(ModelConfig(str(folder / "model"), dtype="float32"))
    lm.isolation = choose_isolation(lm, LAYERS, 16)
    return folder, lm


@pytest.fixture(scope="module", params=[("blosc", None), ("int8", 1000)], ids=["folder", "bucket"])
def steps(
    request: pytest.FixtureRequest,
    made: tuple[Path, LanguageModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Steps:
    """What a harvest of layer 1 writes, then one of layers 1 and 4; and the place's page.

    The text ends before the tokens that are asked for, so the shapes change.
    """
    codec, page = request.param
    folder, lm = made
    place = Noted(tmp_path_factory.mktemp(codec) / "s.zarr", page)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spine, "SpineProcess", Inline)
        patch.setattr(spine, "is_small", lambda *_: False)
        patch.setattr(loop, "choose_isolation", lambda *_: lm.isolation)
        for layers in (LAYERS[:1], LAYERS):
            wanted = HarvestConfig(
                place,  # type: ignore[arg-type]
                layers,
                tokens=10_000,
                context=16,
                batch=2,
                unit=64,
                chunk=16,
                codec=codec,
            )
            lm_of_it = load(ModelConfig(str(folder / "model"), dtype="float32"))
            harvest(wanted, lm_of_it, FileText(folder / "text.txt"))
    return place.steps, page


def alarms(place: Any) -> list[str]:
    """What verify finds; nothing where there is no store yet."""
    if not any(step.startswith("commits/") for step in place.objects):
        return []
    try:
        return [line for _, lines in damage(place) for line in lines]
    except StoreError as error:
        return [str(error)]


def read_all(place: Any) -> None:
    """Everything that reads a store."""
    store = Store.open(place)
    for layer in store.layers:
        for unit in np.flatnonzero(store.committed(layer)).tolist():
            assert store.residuals(layer, unit).shape == (64, store.d_model)
            assert len(store.norms(layer, unit)) == len(store.kinds(layer, unit))
    list(status(place))
    texts = zarr_metadata(place)
    assert texts or not store.layers


def zarr_metadata(place: Any) -> dict[str, Any]:
    """What other Zarr readers open: the arrays that the group repeats, each with its own file."""
    if not place.exists("zarr.json"):
        return {}
    group = json.loads(place.read("zarr.json"))
    repeated = group["consolidated_metadata"]["metadata"]
    for name in repeated:
        assert json.loads(place.read(f"{name}/zarr.json"))["zarr_format"] == 3
    return dict(repeated)


def plays(steps: list[Step], page: int | None, pace: float, stride: int = 1) -> Iterator[Replayed]:
    for start in range(1, len(steps) + 1, stride):
        yield Replayed(steps, start, pace, page)


def test_a_harvest_that_was_killed_at_any_step_is_no_damage(steps: Steps) -> None:
    for place in plays(*steps, pace=0):
        assert not alarms(place), len(place.objects)
        read_all(place)


@pytest.mark.parametrize(("pace", "stride"), [(0.3, 5), (1, 3), (7, 5)])
def test_a_harvest_that_goes_on_meanwhile_is_no_damage(
    steps: Steps, pace: float, stride: int
) -> None:
    for place in plays(*steps, pace, stride):
        assert not alarms(place)
    for place in plays(*steps, pace, stride):
        read_all(place)


@pytest.mark.long
@pytest.mark.parametrize("pace", [0.1, 0.2, 0.5, 1, 2, 3, 5, 11, 23])
def test_at_any_pace_it_is_no_damage(steps: Steps, pace: float) -> None:
    for stale in (False, True):
        for start in range(1, len(steps[0]) + 1):
            place = Replayed(steps[0], start, pace, steps[1], stale=stale)
            assert not alarms(place)
            read_all(Replayed(steps[0], start, pace, steps[1], stale=stale))
    print(f"pace {pace}: {2 * len(steps[0])} passes of verify and of readers, 0 alarms")


def test_damage_in_a_store_that_is_being_written_is_found_in_every_pass(steps: Steps) -> None:
    passes = 0
    for number, place in enumerate(plays(*steps, pace=1, stride=2)):
        objects = [
            key
            for name, data in place.objects.items()
            if name.startswith(("commits/spine/0", "commits/residuals"))
            for key in json.loads(data)["objects"]
        ]
        if not objects:
            continue
        key = objects[number * 7 % len(objects)]
        data = bytearray(place.objects[key])
        data[len(data) // 2] ^= 4
        place.objects[key] = bytes(data)
        passes += 1
        assert any(f"/{key} " in line for line in alarms(place))
    assert passes > 40


def test_what_a_repair_drops_meanwhile_is_no_damage(steps: Steps) -> None:
    """As if each had been damaged; the pack goes before the records that it copies."""
    made, page = steps
    keys = [step.key for step in made if "/packs/" in step.key or "/residuals/" in step.key]
    dropped = [Step(key, None) for key in sorted(keys, key=lambda key: "/packs/" not in key)]
    for start in range(len(dropped)):
        for pace in (0.2, 1, 3):
            place = Replayed([*made, *dropped], len(made) + start, pace, page)
            assert not alarms(place)
            place = Replayed([*made, *dropped], len(made) + start, pace, page)
            Store.open(place)


def test_a_pack_that_a_fuller_one_replaces_is_no_damage(steps: Steps) -> None:
    made, page = steps
    if page is None:
        pytest.skip("a folder has no packs")
    key = "commits/packs/00000000.1.5.jsonl"
    data = next(step.data for step in made if step.key == key)
    smaller = key.replace(".5.", ".4.")
    for pace in (0.2, 1, 2):
        for start in range(len(made) - 20, len(made) + 1):
            renamed = [Step(smaller, data), *made, Step(smaller, None)]
            assert not alarms(Replayed(renamed, start, pace, page))


def on_disk(steps: Steps, folder: Path) -> Noted:
    """The store as a folder, of which nothing is noted yet."""
    place = Noted(folder / "s.zarr", steps[1])
    for key, data in {step.key: step.data for step in steps[0]}.items():
        if data is not None:
            place.write(key, [data])
    place.steps.clear()
    return place


def test_the_statistics_of_int8_are_written_again_from_their_copies(
    steps: Steps, tmp_path: Path
) -> None:
    """Without them no row can be decoded, and no harvest could go on to make them anew."""
    place = on_disk(steps, tmp_path)
    key = "commits/scales/00004.json"
    if not place.exists(key):
        pytest.skip("a lossless codec has none")
    whole = place.read(key)
    for damaged in (whole[:-9], None):
        place.delete(key)
        if damaged is not None:
            place.write(key, [damaged])
        with pytest.raises(StoreError, match=key):
            Store.open(place).residuals(4, 0)
        assert repair(place) == [key]
        assert place.read(key) == whole and not list(damage(place))
    # One copy that is damaged too vouches for nothing.
    text = place.read("layer_4/zarr.json")
    place.write("layer_4/zarr.json", [text.replace(b'"mean": "', b'"mean": "A', 1)])
    place.delete(key)
    with pytest.raises(StoreError, match="harvest anew"):
        repair(place)


def test_what_a_ring_frees_meanwhile_is_no_damage(steps: Steps, tmp_path: Path) -> None:
    made, page = steps
    place = on_disk(steps, tmp_path)
    store = Store.open(place)
    state = RingState(10**9, 1, list(LAYERS), held_out_units(store), 0)
    ring_state.write(place, state)
    claims = place.claims()
    ring = Ring(store, claims, 1, 10**4)
    for passed in range(1, store.units):
        ring_state.write_registration(place, "run", Registration("run", 1, 1, passed))
        ring.free()
    claims.close()
    assert sum(step.data is None for step in place.steps) > 3
    both = [*made, *place.steps]
    for start in range(len(made), len(both)):
        for pace in (0.1, 0.5, 1):
            assert not alarms(Replayed(both, start, pace, page))
