"""Damage to the files of a run, finished or at rest, to exports, a release and an imported run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.analyze.peers import imported
from residual_saes.analyze.peers.imported import READERS
from residual_saes.analyze.subject import Subject
from residual_saes.data import digests
from residual_saes.data.errors import Interrupted, StoreError
from residual_saes.train import run as runs
from residual_saes.train.export import bundle, format, golden
from residual_saes.train.ports import ports_of
from residual_saes.train.publish import release
from residual_saes.train.sae import SAE
from tests.analyze.conftest import Made, make_run, random_rows
from tests.faults import flips, tree
from tests.faults.report import Outcome, Tally
from tests.train import killing
from tests.train.test_formats import ABOUT, TAKEN, about, made
from tests.train.test_publish import REPO
from tests.train.test_publish import finished as publishable
from tests.train.test_resume import stop_at

FLIPPED = (
    *("?/sae_final.pt", "?/config.yaml", "?/metrics.jsonl", "?/timings.jsonl", "?/digests.json"),
    *("?/checkpoint/*", "?/export/*", "?/publish/*", "imported/*/sae_final.pt"),
    *("imported/*/config.yaml", "imported/*/digests.json"),
)
COUNT = 80  # flips of a file
pytestmark = pytest.mark.long  # tests/train/test_run_record.py and test_golden.py have a flip each


def tensors_of(sae: SAE) -> dict[str, bytes]:
    """All that an SAE computes with."""
    named = sae.tensors().items()
    return {"k": bytes([sae.k]), **{name: tensor.numpy().tobytes() for name, tensor in named}}


def kind(name: str) -> str:
    return f"checkpoint/*{Path(name).suffix}" if name.startswith("checkpoint/") else name


# -- a run -----------------------------------------------------------------------------------------


def results(folder: Path) -> Any:
    """All that others read of a finished run."""
    runs.require(folder, runs.TIMINGS)
    sae, digest = runs.sae_of(folder)
    return digest, tensors_of(sae), runs.read_config(folder), runs.metrics_of(folder)


def train_again(folder: Path) -> None:
    """The way out of every message but that of damaged metrics."""
    try:
        runs.record(folder)
    except StoreError:
        (folder / digests.FILE).unlink()
    killing.run(folder)


def test_of_a_finished_run(tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "run"
    killing.run(folder)
    files = [*runs.FILES, digests.FILE]
    repair = partial(train_again, folder)
    flips.tried(tally, folder, files, partial(results, folder), count=COUNT, repair=repair)
    assert tally.cases(Outcome.REPAIRED) > tally.cases() / 2


def test_of_a_run_at_rest(tmp_path: Path, tally: Tally) -> None:
    """What was damaged while it rested joins no record."""
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        killing.run(folder, stop_at(9))
    names = [name for name, data in tree.files(folder).items() if data]

    def work() -> Any:
        killing.run(folder)
        return killing.bits(folder), runs.read_config(folder)

    flips.tried(tally, folder, names, work, lambda name: f"resting {kind(name)}", COUNT // 4)
    assert (
        tally.cases(Outcome.SAME) + tally.cases(Outcome.REPAIRED) > 0 < tally.cases(Outcome.REFUSED)
    )


# -- exports, a release, an imported run -----------------------------------------------------------


@pytest.mark.parametrize("name", format.names())
def test_of_an_export(tmp_path: Path, tally: Tally, name: str) -> None:
    root, kind = tmp_path / name, TAKEN[name][0]
    bundle.write(root, golden.files(name, made(kind), about(kind)))
    folder = next(root.rglob("golden.*")).parent
    damage(tally, root, lambda: tensors_of(READERS[name](folder)), f"export {name}")


def test_of_a_release(tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "publish"
    release.prepare(publishable(tmp_path / "run", made("topk")), REPO, folder)

    def work() -> Any:
        bundle.require_whole(folder)
        places = {"reference": folder, "safetensors": folder, "saelens": folder / "saelens"}
        return {name: tensors_of(READERS[name](place)) for name, place in places.items()}

    damage(tally, folder, work, "release")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("stored"), random_rows()[:512])


def test_of_an_imported_run(
    stored: Made, tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle.write(
        tmp_path / "sae",
        format.find("saelens").write(
            stored.sae, ABOUT._replace(ports=ports_of("sae", [3], ["resid_post"], None))
        ),
    )

    def work() -> Any:
        run = imported.run_of("saelens:sae", stored.store.name, None, ("model", "context"))
        subject = Subject.open(run, None, torch.device("cpu"))
        return tensors_of(subject.sae), subject.config, subject.digest

    work()
    damage(tally, tmp_path / "runs", work, "imported")
    assert tally.cases(Outcome.REFUSED) == 0  # it is made again


def damage(tally: Tally, root: Path, work: Callable[[], Any], what: str) -> None:
    flips.tried(
        tally, root, tree.files(root), work, lambda name: f"{what} {Path(name).name}", COUNT
    )
    assert tally.cases() > 10
