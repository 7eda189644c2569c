"""A multirun means paths from the folder where it was given, wherever its jobs run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from hydra_plugins.all_jobs import _absolute
from residual_saes.conf.names import absolute, quoted
from tests.conftest import Call
from tests.train.test_command import SMALL, make_store

SETTINGS = [*SMALL, "tokens=64"]


class Elsewhere(BasicLauncher):
    """Runs jobs in another folder, as engines do on another machine."""

    folder: Path
    shipped: Sequence[Sequence[str]]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        Elsewhere.shipped = job_overrides
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            return super().launch(job_overrides, initial_job_idx)
        finally:
            os.chdir(here)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jobs run there."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Elsewhere.folder = folder

    def instantiate(_: Plugins, **given: Any) -> Elsewhere:
        launcher = Elsewhere()
        launcher.setup(**given)
        return launcher

    monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate)
    return folder


def shipped(number: int) -> dict[str, Any]:
    """What one job was told."""
    parsed = OverridesParser.create().parse_overrides(list(Elsewhere.shipped[number]))
    return {override.key_or_group: override.value() for override in parsed}


def test_jobs_elsewhere_work_in_the_folder_of_the_command(
    tmp_path: Path, elsewhere: Path, call: Call
) -> None:
    make_store(tmp_path / "a b.zarr", units=2, layers=(3,))
    line = ("train", "residual_saes.train.command", "-m", *SETTINGS)
    code, err = call(*line, "store=a b.zarr", "run=choice(r,s/t)")
    assert code == 0, err
    for number, run in enumerate(("r", "s/t")):
        assert shipped(number)["store"] == f"{tmp_path}/a b.zarr"
        assert shipped(number)["run"] == f"{tmp_path}/{run}"
    assert (tmp_path / "r" / "sae_final.pt").exists()
    assert (tmp_path / "s" / "t" / "sae_final.pt").exists()

    # The defaults too, and what Hydra leaves.
    (tmp_path / "activations").mkdir()
    (tmp_path / "a b.zarr").rename(tmp_path / "activations" / "c.zarr")
    code, err = call(*line, "seed=0,1")
    assert code == 0, err
    trained = tmp_path.glob("runs/c_tiny_L3/*/sae_final.pt")
    assert {path.parent.name for path in trained} == {"seed-0", "seed-1"}
    assert (tmp_path / "runs" / "multirun.yaml").exists()
    assert not [*elsewhere.glob("**/*.*")]


def test_a_single_run_and_a_sweep_here_record_what_was_typed(tmp_path: Path, call: Call) -> None:
    make_store(tmp_path / "s.zarr", units=2, layers=(3,))
    for line in (["run=a"], ["-m", "run=b"]):
        code, err = call("train", "residual_saes.train.command", *line, "store=s.zarr", *SETTINGS)
        assert code == 0, err
        recorded = yaml.safe_load((tmp_path / line[-1][4:] / "config.yaml").read_text())
        assert recorded["store_path"] == "s.zarr"


def test_a_machine_without_the_folder_is_one_line(
    tmp_path: Path, elsewhere: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless nothing is meant from there."""
    store = make_store(elsewhere / "s.zarr", units=2, layers=(3,))
    launch = Elsewhere.launch

    def without_folder(self: Elsewhere, *arguments: Any) -> Any:
        tmp_path.rename(tmp_path.with_name("gone"))
        Elsewhere.folder = tmp_path.with_name("gone")
        try:
            return launch(self, *arguments)
        finally:
            tmp_path.with_name("gone").rename(tmp_path)

    monkeypatch.setattr(Elsewhere, "launch", without_folder)
    line = ("train", "residual_saes.train.command", "-m", *SETTINGS)
    code, err = call(*line, f"store={store}", "seed=0")
    assert code == 2 and str(tmp_path) in err and "run=" in err


class UncompletedJobError(RuntimeError):
    """As submitit names a job whose process was killed."""


def test_a_job_that_is_lost_goes_on_by_the_same_command(
    tmp_path: Path, elsewhere: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s.zarr", units=2, layers=(3,))

    def lose(*_: Any) -> None:
        raise UncompletedJobError("Job 3 was lost\nwith a long log")

    line = ("train", "residual_saes.train.command", "-m", *SETTINGS, "store=s.zarr", "seed=0")
    with monkeypatch.context() as patch:
        patch.setattr(Elsewhere, "launch", lose)
        code, err = call(*line)
        assert (code, err.count("\n")) == (75, 1)
    assert call(*line)[0] == 0


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("store", "s.zarr", "/here/s.zarr"),
        ("store", "../s.zarr", "/here/../s.zarr"),
        ("store", "/a/s.zarr", "/a/s.zarr"),
        ("store", "s3://bucket/s", "s3://bucket/s"),
        ("store", "file:///a", "file:///a"),
        ("store", "~/s", "~/s"),
        ("store", "${sae.k}", "${sae.k}"),
        ("store", "a/${sae.k}", "/here/a/${sae.k}"),
        ("run", "r,s", "/here/r,s"),
        ("run", "saelens:none", "saelens:none"),
        ("out", "o", "/here/o"),
        ("text.path", "data/*.jsonl", "/here/data/*.jsonl"),
        ("+text.sources.mine.path", "t", "/here/t"),
        ("text.sources.mine.dataset", "t", "t"),
        ("model.path", "owner/name", "owner/name"),
        ("problems", "tiny", "tiny"),
        ("model.revision", "main", "main"),
    ],
)
def test_paths(name: str, value: str, expected: str) -> None:
    assert absolute(name, value, "/here") == expected


def test_what_may_be_a_path_is_one_if_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for name in ("model.path", "problems"):
        assert absolute(name, "owner/name", str(tmp_path)) == f"{tmp_path}/owner/name"
        # A model's name in manifests is its folder's last one.
        assert absolute(name, ".", str(tmp_path)) == "."
    assert absolute("run", "saelens:owner", str(tmp_path)) == f"saelens:{tmp_path}/owner"


def test_each_of_several_stores_is_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (given,) = quoted(["store=[a b.zarr,/x/b.zarr]"])
    assert _absolute(given) == f"store=['{tmp_path}/a b.zarr','/x/b.zarr']"
