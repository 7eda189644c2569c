"""study=verify finds damage in every file that belongs to a run, and none where there is none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.analyze.studies.verify import verify
from residual_saes.data import digests, locks, sealed
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.train import checkpoint
from residual_saes.train.checkpoint import Checkpoint
from residual_saes.train.export import bundle
from residual_saes.train.run import CHECKPOINTS, CONFIG, METRICS
from tests.analyze.conftest import Made, make_run, random_rows
from tests.faults import tree
from tests.faults.child import ask


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run with all that a run can have, and its store."""
    made = make_run(tmp_path_factory.mktemp("verify"), random_rows()[:512])
    (made.run / CHECKPOINTS).mkdir()
    for step in (8, 16):
        tensors = {"t": torch.full((64,), float(step))}
        checkpoint.save(made.run / CHECKPOINTS, Checkpoint(step, 0, "", tensors))
    for name in ("studies/quality", "studies/quality.0123456789ab", "studies/kept/means-01"):
        (folder := made.run / name).mkdir(parents=True)
        (folder / "quality.json").write_text('{"figures": 1}')
        digests.write(folder, ["quality.json"], {"study": "quality"})
    sealed.write(made.run / "studies/kept/means-01/000003.npz", [b"part"])
    bundle.write(made.run / "export" / "sparsify", {"layers.3/cfg.json": b"{}", "a.pt": b"a" * 99})
    bundle.write(made.run / "publish", {"README.md": b"card", CONFIG: b"store: s"})
    digests.write(made.run, [CONFIG, METRICS, "sae_final.pt"])
    return made


@pytest.fixture
def run(whole: Made) -> Iterator[Path]:
    """The run, which is put back afterwards."""
    root = whole.run.parent
    before = tree.read(root)
    yield whole.run
    tree.put(root, before)


def settings(run: Path, **changes: Any) -> dict[str, Any]:
    study = {"name": "verify", "store": changes.pop("store", True)}
    return {"run": str(run), "runs": None, "store": None, "study": study, **changes}


def test_a_whole_run_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree.read(run.parent)
    verify(settings(run))
    told = capsys.readouterr()
    assert told.out.count("\n") == 1 and "11 files and 2 checkpoints" in told.out
    assert "4 units" in told.out and told.err == ""
    assert tree.read(run.parent) == before
    verify(settings(run, store=False))
    assert "units" not in capsys.readouterr().out
    with pytest.raises(SettingError, match="run="):
        verify(settings(run, runs="runs/*"))
    with pytest.raises(StoreError, match="no run"):
        verify(settings(run / "none"))


def test_damage_in_any_file_is_one_line_with_the_way_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tree.files(run.parent)
    of_the_store = [name for name in whole if name.startswith("s.zarr/")]
    # Of the store some will do: it has its own tests.
    left_out = set(of_the_store) - {*of_the_store[::7]}
    named = [name for name in whole if name not in left_out and whole[name]]
    assert len(named) > 20
    for name in named:
        path = run.parent / name
        for damaged in (None, bytes([whole[name][0] ^ 1]) + whole[name][1:], whole[name][:-1]):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            found = tree.read(run.parent)
            is_record = path.name == digests.FILE or re.search(r"step_\d+\.json|npz", name)
            if damaged is None and (is_record or name in of_the_store):
                verify(settings(run, store=False))  # as if it had never been written
            else:
                with pytest.raises(StoreError, match="in a line each above"):
                    verify(settings(run, store=name in of_the_store))
                lines = capsys.readouterr().err.splitlines()
                stem = path.stem if CHECKPOINTS in name else path.name
                assert any(stem in line and "; " in line for line in lines), (name, lines)
            assert tree.read(run.parent) == found
            path.write_bytes(whole[name])
            capsys.readouterr()


def test_what_is_being_written_is_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "studies" / "quality"
    (folder / "quality.json").write_text("{")
    with locks.locked(run / "studies" / ".quality", "busy"):
        answer = ask(lambda: verify(settings(run, store=False)))
    assert answer.broken is None and not answer.refused
    assert "being written" in answer.said
    assert ask(lambda: verify(settings(run, store=False))).refused
    shutil.rmtree(folder)
    verify(settings(run, store=False))


def test_a_run_without_a_record_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / digests.FILE).unlink()
    verify(settings(run, store=False))
    assert "earlier version" in capsys.readouterr().err


def test_another_store_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, random_rows()[:256])
    with pytest.raises(StoreError):
        verify(settings(run, **{"store": True}) | {"store": other.store.name})
    shutil.rmtree(run.parent / "s.zarr")
    with pytest.raises(StoreError):
        verify(settings(run))
    verify(settings(run, store=False))
