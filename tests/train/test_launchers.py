"""A sweep's arms have the same bits under every launcher, and `python -m train -m` reads the store once by default."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import killing
from tests.train.test_command import SMALL, make_store

ROOT = Path(__file__).resolve().parents[2]
SWEEP = [*SMALL, "tokens=256", "optim.lr=0.01,0.02", "optim.lr_floor=1e-3"]


def sweep(folder, *overrides):
    """Run the sweep as users do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "train", "-m", "store=s.zarr", *SWEEP, *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory):
    """The folder of a sweep on one read."""
    folder = tmp_path_factory.mktemp("one_pass")
    make_store(folder / "s.zarr")
    done = sweep(folder)
    assert done.returncode == 0, done.stderr
    assert "2 arms on one read of the store" in done.stderr
    return folder


def arms(folder):
    return {path.name: killing.bits(path) for path in (folder / "runs" / "s_tiny_L3").iterdir()}


def launcher(name, module, *overrides):
    absent = pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")
    return pytest.param([f"hydra/launcher={name}", *overrides], id=name, marks=absent)


@pytest.mark.parametrize(
    "launched",
    [
        launcher("basic", "hydra"),
        launcher("cores", "hydra_plugins.hydra_joblib_launcher"),
        launcher("local", "submitit", "hydra.launcher.timeout_min=5"),
    ],
)
def test_launchers_agree(launched, one_pass, tmp_path):
    make_store(tmp_path / "s.zarr")
    done = sweep(tmp_path, *launched)
    assert done.returncode == 0, done.stderr
    assert "on one read" not in done.stderr
    assert len(arms(one_pass)) == 2
    assert arms(tmp_path) == arms(one_pass)


def test_a_sweep_goes_on_and_a_refused_arm_is_one_line(one_pass):
    """The first arm is finished and left alone; in the second one's place stands a run with other settings."""
    before = arms(one_pass)
    done = sweep(one_pass)
    assert done.returncode == 0 and done.stderr.count("is finished") == 2
    done = sweep(one_pass, "sae.k=3,65")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "sae.k=65 must be at most sae.d_sae=32" in done.stderr
    assert {name: arms(one_pass)[name] for name in before} == before
    assert len(arms(one_pass)) == 4, "the arms that could be trained were"
