"""What is meant where store= and run= are not given: the owner's commands in an empty folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from residual_saes.data.errors import SettingError
from residual_saes.data.site import HookPoint
from residual_saes.data.store import default
from residual_saes.data.store.store import Store
from residual_saes.train import run
from residual_saes.train.command import default_store
from tests.conftest import Call
from tests.train.test_command import SMALL, make_store


def first(store: Store) -> list[HookPoint]:
    return store.points[:1]


def layer(number: int) -> Callable[[Store], list[HookPoint]]:
    return lambda store: [HookPoint(number)]


ROOT = Path(__file__).parents[1]
HARVEST = ("model=tiny", "text=tiny", "layer=5", "tokens=3000", "context=32", "device=cpu")


@pytest.fixture
def train(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`python -m train` on small SAEs, as a process of its own would do it."""

    def trained(*arguments: str) -> tuple[int, str]:
        default_store.cache_clear()
        return call("train", "residual_saes.train.command", *arguments, *SMALL, "tokens=256")

    return trained


def test_the_first_commands_find_each_other(tmp_path: Path, call: Call, train: Call) -> None:
    code, err = call("harvest", "residual_saes.harvest.command", *HARVEST)
    assert code == 0, err
    store = "activations/tiny_tiny.zarr"
    folder = Path("runs/tiny_tiny_tiny_L5")

    # A multirun first, then a run of its own, and both again: one folder holds them.
    for _ in range(2):
        code, err = train("-m", "optim.lr=1e-2,2e-2")
        assert (code, err.count(f"store={store}")) == (0, 1), err
        code, err = train()
        assert (code, err.count(f"store={store}")) == (0, 1), err
    arms = [path for path in folder.iterdir() if path.name.startswith("lr-0.0")]
    assert len(arms) == 2
    for trained in (folder, *arms):
        recorded = yaml.safe_load((trained / run.CONFIG).read_text())
        assert recorded["store_path"] == store

    code, err = call("analyze", "residual_saes.analyze.command", "device=cpu", "study.rows=100")
    assert (code, err.count(f"run={folder}: ")) == (0, 1), err
    assert (folder / "studies" / "quality").is_dir()
    code, err = call("export", "residual_saes.train.export.command", "to=saelens")
    assert code == 0, err
    assert (folder / "export" / "saelens").is_dir()
    code, err = call(
        "analyze", "residual_saes.analyze.command", "device=cpu", "study=sweep", f"runs={folder}"
    )
    assert code == 0, err
    assert (folder / "sweep.html").is_file()


def test_nothing_there_is_one_line(tmp_path: Path, call: Call, train: Call) -> None:
    (tmp_path / "activations").mkdir()
    (tmp_path / "activations" / "README").write_text("")
    (tmp_path / "activations" / "other").mkdir()
    calls = {
        "store=": train(),
        "run=": call("analyze", "residual_saes.analyze.command"),
        "run= ": call("export", "residual_saes.train.export.command"),
        "run=  ": call("publish", "residual_saes.train.publish.command", "repo=a/b"),
    }
    for name, (code, err) in calls.items():
        assert (code, err.count("\n")) == (2, 1), err
        assert f"{name.strip()} is missing" in err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete store, one that lacks a unit of layer 3, and a damaged one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "activations"
    whole = make_store(folder / "whole.zarr", units=2)
    part = shutil.copytree(whole, folder / "part.zarr")
    record = part / "commits" / "residuals" / "00000001.3_5.json"
    record.unlink()
    damaged = shutil.copytree(whole, folder / "damaged")
    next((damaged / "layer_3").glob("c.1*")).unlink()
    return folder


def test_the_only_complete_store_is_taken(activations: Path) -> None:
    assert default.find(first)[0] == default.find(layer(5))[0] == "activations/whole.zarr"
    with pytest.raises(SettingError, match="store=") as refused:
        default.find(layer(4))
    assert str(refused.value).count("no layer 4") == 2


def test_several_stores_are_listed_with_their_states(activations: Path) -> None:
    make_store(activations / "more.zarr", units=2, layers=(5,))
    assert default.find(layer(3))[0] == "activations/whole.zarr"
    with pytest.raises(SettingError, match="store=activations/more") as refused:
        default.find(first)
    for state in ("more.zarr (complete)", "whole.zarr (complete)", "part.zarr (layer 3: 1 of 2 "):
        assert f"activations/{state}" in str(refused.value)
    shutil.rmtree(activations / "more.zarr")
    shutil.rmtree(activations / "whole.zarr")
    with pytest.raises(SettingError, match="harvest") as refused:
        default.find(first)
    assert "damaged (damaged), " in str(refused.value)


def test_the_default_harvests_store_comes_first(activations: Path) -> None:
    shutil.copytree(activations / "part.zarr", default.HARVESTED)
    assert default.find(first)[0] == default.HARVESTED


def test_the_newest_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ["a", "b/arm", "b", "c", "imported/d", "b/studies/e"]
    for number, name in enumerate(made):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in (run.CONFIG, run.METRICS, "sae_final.pt"):
            (folder / file).write_text("")
            os.utime(folder / file, (number, number))
    (tmp_path / "runs" / "c" / "sae_final.pt").unlink()  # not finished
    (tmp_path / "runs" / "imported" / "d" / run.METRICS).unlink()  # not trained here
    os.utime(tmp_path / "runs" / "b" / "arm" / "sae_final.pt", (9, 9))
    assert run.named_or_newest("x") == Path("x")
    assert run.named_or_newest(None) == run.named_or_newest(None) == Path("runs/b/arm")
    assert capsys.readouterr().err.count("run=runs/b/arm") == 1
