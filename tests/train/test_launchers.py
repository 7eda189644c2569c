"""A sweep's arms have the same bits under every launcher, and `python -m train -m` reads the store
once by default.
"""

import importlib.util
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from residual_saes.conf.command import start
from residual_saes.data import stopping
from tests.train import killing
from tests.train.test_command import SMALL, make_store

ROOT = Path(__file__).resolve().parents[2]
SWEEP = [*SMALL, "tokens=256", "optim.lr=0.01,0.02", "optim.lr_floor=1e-3"]


def sweep(folder, *overrides):
    """Run the sweep in this process: exit code and stderr."""
    torch.set_num_threads(1)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train", "-m", "store=s.zarr", *SWEEP, *overrides])
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setattr(stopping, "watch", stopping.answer_signals)  # see `unwatched`
        stopping.told.clear()
        try:
            start("train", "residual_saes.train.command")
        except SystemExit as stopped:
            return stopped.code, said.getvalue()
    return 0, said.getvalue()


def sweep_by_processes(folder, *overrides):
    """Run the sweep as users do, for launchers that start processes of their own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "train", "-m", "store=s.zarr", *SWEEP, *overrides]
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory):
    """The folder of a sweep on one read."""
    folder = tmp_path_factory.mktemp("one_pass")
    make_store(folder / "s.zarr")
    code, err = sweep(folder)
    assert code == 0, err
    assert re.search(r"arms +2 on one read", err)
    return folder


def arms(folder):
    return {path.name: killing.bits(path) for path in (folder / "runs" / "s_tiny_L3").iterdir()}


def assert_same_arms(ran, one_pass, folder):
    code, err = ran
    assert code == 0, err
    assert "on one read" not in err
    assert len(arms(one_pass)) == 2
    assert arms(folder) == arms(one_pass)


def test_the_basic_launcher_agrees(one_pass, tmp_path):
    make_store(tmp_path / "s.zarr")
    assert_same_arms(sweep(tmp_path, "hydra/launcher=basic"), one_pass, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="hydra-submitit-launcher is not installed"
)
def test_jobs_of_submitit_agree(one_pass, tmp_path):
    make_store(tmp_path / "s.zarr")
    ran = sweep_by_processes(tmp_path, "hydra/launcher=local", "hydra.launcher.timeout_min=5")
    assert_same_arms(ran, one_pass, tmp_path)


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("joblib") is None, reason="hydra-joblib-launcher is not installed"
)
def test_processes_of_joblib_agree(one_pass, tmp_path):
    make_store(tmp_path / "s.zarr")
    assert_same_arms(sweep_by_processes(tmp_path, "hydra/launcher=cores"), one_pass, tmp_path)


def test_a_sweep_goes_on_and_a_refused_arm_is_one_line(one_pass):
    before = arms(one_pass)
    code, err = sweep(one_pass)
    assert code == 0 and err.count("is finished") == 2
    code, err = sweep(one_pass, "sae.k=3,65")
    assert code == 2
    assert err.count("error:") == 1 and "sae.k=65 must be at most sae.d_sae=32" in err
    assert {name: arms(one_pass)[name] for name in before} == before
    assert len(arms(one_pass)) == 4, "the arms that could be trained were"
