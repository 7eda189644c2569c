"""A harvest, from its first file to the whole store: power losses, then the same command again.

Before that, what the power loss left is read: each unit that counts as committed must hold its
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from residual_saes.data.durable import is_temporary
from residual_saes.data.errors import StoreError
from residual_saes.data.store.claims import Claims
from residual_saes.data.store.leases import Leases
from residual_saes.data.store.place import LocalPlace
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import FileText
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import ModelConfig, load
from residual_saes.harvest.provenance import manifest_of
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.spine_writer import write_spine
from tests.faults import kills, tree
from tests.faults.child import ask, in_child, outcome
from tests.faults.power import EVERY, images
from tests.faults.report import Tally, judged
from tests.faults.trace import traced
from tests.harvest.models import save_model

Work = Callable[[Path], object]
_NOT_OF_THE_STORE = ("commits/claims", "commits/leases")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six layers and width 32, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", "gemma4")
    (folder / "text.txt").write_text("All work and no play makes nobody happy. " * 40)
    return folder


class Harvests:
    """Two units of 64 tokens. The spine is written in the same process, so that it is traced."""

    def __init__(self, inputs: Path) -> None:
        self._source = FileText(inputs / "text.txt")
        # Loaded once. What a harvest does to it, it does in a child.
        self._lm = load(ModelConfig(str(inputs / "model"), dtype="float32"))

    def into(self, store: Path, *layers: int, **settings: Any) -> None:
        """Harvest `layers`, or go on with them; in a child."""
        sizes = {"tokens": 128, "context": 16, "batch": 2, "unit": 64, "chunk": 16}
        config = HarvestConfig(store, layers, **{**sizes, **settings})
        self._write_spine(config)
        harvest(config, self._lm, self._source)

    def _write_spine(self, config: HarvestConfig) -> None:
        lm = self._lm
        lm.truncate_(max(config.layers))
        lm.isolation = choose_isolation(lm, config.layers, config.context)
        store = Store.open_or_create(config.store, manifest_of(config, lm, self._source))
        with closing(store.place.claims()):
            write_spine(store, self._source, lm.tokenizer)

    def by_two_ranks(self, store: Path) -> None:
        """Two processes at the same time, behind the spine and a first layer."""
        assert outcome(in_child(partial(self.into, store, 1))) == 0
        ranks = [in_child(partial(self.into, store, 1, 4, rank=rank, world=2)) for rank in range(2)]
        assert [outcome(child) for child in ranks] == [0, 0]


@pytest.fixture(scope="module")
def harvests(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Harvests:
    warm = Harvests(inputs)
    warm.into(tmp_path_factory.mktemp("imports") / "s", 1)  # not 1 s of them in every child
    return Harvests(inputs)


def kept(store: Path) -> dict[str, bytes]:
    """The files that make the store, without those of claims.

    Nor temporaries: where there are no locks, nobody knows whether one is in use.
    """
    return {
        name: data
        for name, data in tree.files(store).items()
        if not name.startswith(_NOT_OF_THE_STORE) and not is_temporary(Path(name))
    }


def run(tally: Tally, kind: str, root: Path, before: Work | None, work: Work, part: int) -> None:
    """Trace `work` on a store that `before` has made, and go on from every `part`-th image."""
    if before is not None:
        assert outcome(in_child(partial(before, root))) == 0
    trace = traced(root, partial(work, root))
    assert trace.code == 0
    whole = Store.open(root)
    expected = kept(root)
    rows = {
        (layer, unit): whole.residuals(layer, unit).tobytes()
        for layer in whole.layers
        for unit in range(whole.units)
    }

    def after() -> dict[str, bytes]:
        _require_right_bytes(root, rows)
        work(root)
        return kept(root)

    for number, image in enumerate(images(trace)):
        if number % (part * EVERY) == 0:
            image.put()
            answer = ask(after)
            told = answer.refusal or answer.broken or answer.said
            tally.add(kind, judged(answer, expected), f"{image}: {told}")


def _require_right_bytes(root: Path, rows: dict[tuple[int, int], bytes]) -> None:
    """Read every unit that counts as committed."""
    try:
        found = Store.open(root)
    except StoreError:
        return  # nothing counts as committed
    for layer in found.layers:
        for unit in set(range(found.units)) - set(found.missing([layer])):
            assert found.residuals(layer, unit).tobytes() == rows[layer, unit], (layer, unit)


def test_some_power_losses_of_a_harvest(tally: Tally, harvests: Harvests, tmp_path: Path) -> None:
    run(tally, "power loss: store", tmp_path / "s", None, lambda s: harvests.into(s, 1), 97)
    assert tally.cases() > 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["one layer", "another layer", "int8", "two ranks", "leases"])
def test_power_losses_of_a_harvest(
    kind: str,
    tally: Tally,
    harvests: Harvests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before: Work | None = None
    work: Work = lambda store: harvests.into(store, 1)  # noqa: E731
    if kind == "another layer":
        before, work = work, lambda store: harvests.into(store, 1, 4)
    elif kind == "int8":
        work = lambda store: harvests.into(store, 1, codec="int8")  # noqa: E731
    elif kind == "two ranks":
        work = harvests.by_two_ranks
    elif kind == "leases":  # as where the file system has no locks; they end soon

        def claims(place: LocalPlace) -> Claims:
            return Leases(place, life_s=0.2, poll_s=0.02)

        monkeypatch.setattr(LocalPlace, "claims", claims)
    part = {"two ranks": 7, "leases": 3}.get(kind, 1)  # of 1,481 and 600 images
    run(tally, f"power loss: store, {kind}", tmp_path / "s", before, work, part)
    assert tally.cases() > 60 // EVERY


@pytest.mark.long
def test_a_harvest_goes_on_after_a_kill(tally: Tally, harvests: Harvests, tmp_path: Path) -> None:
    root = tmp_path / "s"
    work = partial(harvests.into, root, 1, 4)
    assert outcome(in_child(work)) == 0
    expected = kept(root)

    def after() -> dict[str, bytes]:
        work()
        return kept(root)

    for moment in kills.killed(partial(tree.put, root, {}), work, 2 * EVERY - 1, threads=True):
        answer = ask(after)
        told = answer.refusal or answer.broken or answer.said
        tally.add("kill: store", judged(answer, expected), f"moment {moment}: {told}")
    assert tally.cases() > 130 // (2 * EVERY - 1)
