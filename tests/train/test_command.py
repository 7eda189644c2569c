"""`python -m train` on a small store: names, numbers, errors, signals."""

import os
import signal
import string
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from residual_saes.conf import command as command_line
from residual_saes.conf.command import Job
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import read_metrics
from residual_saes.data.site import RESID_POST, HookPoint
from residual_saes.data.store import coming
from residual_saes.data.store.store import SpineEnd, Store
from residual_saes.data.text.packing import Cursor
from residual_saes.train import checkpoint, command
from residual_saes.train.sae_file import load
from tests.conftest import commit, make_manifest
from tests.forked import start_forked
from tests.train import killing

SMALL = ["sae=tiny", "optim=tiny", "sae.d_sae=32", "sae.k=2", "batch=64", "device=cpu"]
UNIT, CONTEXT, D = 512, 32, 8


def make_store(path, units=8, layers=(3, 5), model="nobody/none"):
    """A store of planted rows, with BOS rows that would spoil any fit.

    Args:
        layers: hook points, by their names.
    """
    points = list(map(HookPoint.of, layers))
    shape = {"tokens": units * UNIT, "context": CONTEXT, "unit": UNIT, "chunk": 128}
    manifest = {**make_manifest(D, **shape, codec="none"), "seed": 0}
    manifest["model"]["id"] = model
    store, reader = Store.open_or_create(path, manifest), killing.planted()
    for unit in range(units):
        tokens = np.ones((UNIT // CONTEXT, CONTEXT), np.uint32)
        document = (
            np.arange(UNIT // CONTEXT, dtype=np.uint32)[:, None]
            + unit * (UNIT // CONTEXT)
            + 0 * tokens
        )
        store.commit_spine(unit, tokens, document.astype(np.uint32), Cursor(unit, 0, None))
    store.close_spine(SpineEnd(units * UNIT // CONTEXT, ended_early=False))
    for unit in range(units):
        rows = {}
        for point in points:
            number = 1000 * point.layer + unit
            drawn = reader.draw(number if point.site == RESID_POST else -number, UNIT)
            rows[point] = drawn + len(point.site) - len(RESID_POST)
        for drawn in rows.values():
            drawn[::CONTEXT] = 1000.0
        commit(
            store, unit, {point: drawn.view(torch.uint16).numpy() for point, drawn in rows.items()}
        )
    store.declare(points)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "small.zarr")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, unwatched):
    """Run the command in this process (a new one takes seconds to start), in an empty directory:
    exit code, stderr.
    """
    monkeypatch.chdir(tmp_path)

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        code = 0
        try:
            command_line.start("train", "residual_saes.train.command")
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err

    return called


def test_trains_says_so_and_is_finished_the_second_time(store, tmp_path, call):
    code, err = call(f"store={store}", *SMALL, "optim.lr=0.02")
    assert code == 0, err
    folder = tmp_path / "runs" / "small_tiny_L3"
    assert (
        f"wrote {folder.relative_to(tmp_path) / 'sae_final.pt'}: held-out variance explained" in err
    )
    assert load(folder / "sae_final.pt").d_sae == 32
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["settings"]["layer"] == 3
    assert recorded["settings"]["tokens"] == 3456  # 7 of 8 units, without BOS, whole batches
    assert recorded["store_path"] == str(store)
    assert read_metrics(folder / "metrics.jsonl")[-1]["rows"] == UNIT - UNIT // CONTEXT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"], (
        "Hydra left something behind"
    )
    code, err = call(f"store={store}", *SMALL, "optim.lr=0.02")
    assert (code, "is finished" in err) == (0, True)
    code, err = call(f"store={store}", *SMALL, "optim.lr=0.03")
    assert code == 2
    assert "optim.lr is 0.02 there and 0.03 here" in err


def test_sigterm_saves_and_exits_143(store, tmp_path):
    command_line = ("-m", "train", f"store={store}", *SMALL, "run=r", "tokens=6.4e7")
    said = tmp_path / "stderr"
    process = start_forked(*command_line, files=[tmp_path / "stdout", said], cwd=tmp_path)
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process, signal.SIGTERM)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 143, said.read_text()
    assert "the same command again goes on" in said.read_text()
    assert checkpoint.latest(tmp_path / "r" / "checkpoint")[0].step > 0


def test_multirun_names_its_arms_and_never_leaves_runs(store, tmp_path, call):
    code, err = call("-m", f"store={store}", *SMALL, "tokens=128", "sae.aux_coef=0,0.125")
    assert code == 0, err
    names = {"aux_coef-0", "aux_coef-0.125"}
    assert {path.name for path in (tmp_path / "runs" / "small_tiny_L3").iterdir()} == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "store="),
        (["{store}", "layer=4"], "layer 4"),
        (["{store}", "layer=x"], "layer=x"),
        (["{store}", "layer=-1"], "layer=-1"),
        (["{store}", "layer=[]"], "layer=[]"),
        (["{store}", "layer=[3,5]"], "sae=crosscoder_32k"),
        (["{store}", "layer=[3,3]", "sae.kind=crosscoder"], "layer=[3, 3]"),
        (["{store}", "layer=3", "sae.kind=crosscoder"], "layer=[21,27]"),
        (["{store}", "layer={sae:3,cross:5}"], "cross"),
        (["{store}", "site=residual"], "site=residual"),
        (["{store}", "site=[]"], "site=[]"),
        (["{store}", "site=[mlp_in,mlp_out]"], "sae=crosscoder_32k"),
        (["{store}", "site=mlp_in"], "site=[mlp_in] layer=..."),
        (["{store}", "site=mlp_in", "layer=3"], "`python -m harvest site=mlp_in layer=3"),
        (["{store}", "sae.kind=transcoder"], "site=[mlp_in,mlp_out]"),
        (["store=[{path},{path}]"], "sae=crosscoder_32k"),
        (["{store}", "tokens=1e9.5"], "tokens=1e9.5"),
        (["{store}", "tokens=100.5"], "tokens=100.5"),
        (["{store}", "tokens=0"], "tokens=0"),
        (["{store}", "tokens=-5"], "tokens=-5"),
        (["{store}", "tokens=1B"], "tokens=1B"),
        (["{store}", "batch=0"], "batch=0"),
        (["{store}", "seed=99999999999999999999"], "seed=99999999999999999999"),
        (["{store}", "drop_bos=no"], "drop_bos=no"),
        (["{store}", "seed=null"], "seed=None"),
        (["{store}", "device=tpu"], "device=tpu"),
        (["{store}", "train.matmul=fp8"], "train.matmul=fp8"),
        (["{store}", "train.matmul=tf32"], "train.matmul=tf32"),
        (["{store}", "sae.activation=relu"], "sae.activation='relu'"),
        (["{store}", "sae.activation=null"], "sae.activation=None"),
        (["{store}", "sae.activation=gated"], "sae.aux_coef=0.03125"),
        (["{store}", "sae.k=64"], "sae.k=64"),
        (["{store}", "sae.nested=null"], "sae.nested=null"),
        (["{store}", "optim.lr=null"], "optim.lr=null"),
        (["{store}", "optim.beta1=x"], "optim.beta1=x"),
        (["{store}", "+sae.kk=64"], "sae.kk"),
        (["{store}", "+sae.l1_coef=1"], "sae.l1_coef"),
        (["{store}", "sae.aux_norm=l2"], "sae.aux_norm='l2'"),
        (["{store}", "optim.lr=1e-5"], "optim.lr_floor"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, store, tmp_path, call):
    words = {"{store}": f"store={store}", "{path}": str(store)}
    for word, meant in words.items():
        arguments = [item.replace(word, meant) for item in arguments]
    code, err = call(*SMALL, *arguments)
    assert code == 2
    assert named in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_mistyped_store_is_waited_for_a_while(call, monkeypatch):
    """It may be the store of a ring's harvest that is starting up."""
    monkeypatch.setattr(coming, "PATIENCE_S", 0.1)
    code, err = call(*SMALL, "store=/nowhere")
    assert code == 2
    assert [line.count("/nowhere") > 0 for line in err.splitlines()] == [True, True]
    assert "`python -m harvest store=/nowhere ...`" in err.splitlines()[1]
    code, err = call(*SMALL, "store=/nowhere", "batch=0")  # before the wait
    assert (code, err.count("\n")) == (2, 1)


def test_gated_trains_with_settings_of_its_own(store, tmp_path, call):
    small = ["optim=tiny", "sae.d_sae=32", "sae.k=2", "batch=64", "device=cpu", "tokens=640"]
    code, err = call(f"store={store}", "sae=gated_32k", "sae.l1_coef=0.2", *small, "run=r")
    assert code == 0, err
    recorded = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert recorded["settings"]["sae"]["l1_coef"] == 0.2
    assert load(tmp_path / "r" / "sae_final.pt").threshold is not None


@pytest.mark.parametrize(("text", "number"), [(1e9, 10**9), (4096, 4096), (2.0, 2)])
def test_whole_numbers_may_be_written_as_floats(text, number):
    assert command.whole("tokens", text) == number


@pytest.mark.parametrize("value", [1.5, "1B", True, None, float("nan"), float("inf"), [1]])
def test_whole_refuses_the_rest(value):
    with pytest.raises(SettingError, match="tokens="):
        command.whole("tokens", value)


@pytest.mark.parametrize(
    "override",
    [
        "a=/../../etc",
        "a=..",
        "..",
        ".",
        "../x",
        "a=b/c",
        "a=b\x00c",
        "a=~",
        "a=$(touch x)",
        "ä=1",
        "x" * 400,
        "",
        ".hid",
    ],
)
def test_arm_names_stay_one_component(override, tmp_path):
    name = command.arm_name(Job(True, [override]))
    assert name
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")
    assert not name.startswith(".")
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    (tmp_path / name).mkdir()


def test_arm_names_that_had_to_be_changed_stay_apart():
    changed = [command.arm_name(Job(True, [f"a=b{sign}c"])) for sign in "/:-"]
    assert len(set(changed)) == 3


def test_an_arm_is_named_by_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ("store=x/y", "optim.lr=0.001", "layer=[3,4]", "sae=tiny", "+sae.k=8")
    job = Job(True, overrides, frozenset({"sae"}))
    assert command.arm_name(job) == "lr-0.001_layer-3-4_k-8"
    alike = Job(True, ("sae.lr=1", "optim.lr=2"))
    assert command.arm_name(alike) == "sae.lr-1_optim.lr-2"
    assert command.run_directory(None, "x", job) == Path("runs/x/lr-0.001_layer-3-4_k-8")
    # run= is the folder of all arms, unless each has another.
    shared = Job(True, (*overrides, "run=there"), frozenset({"sae", "run"}))
    assert command.run_directory("there", "x", shared) == Path("there/lr-0.001_layer-3-4_k-8")
    assert command.run_directory("there", "x", Job(True, ("run=there",))) == Path("there")
    own = Job(True, ("run=r_${seed}", "seed=1"), frozenset({"run"}))
    assert command.run_directory("r_1", "x", own) == Path("r_1")
    # A sweep that an earlier version began goes on where it is.
    job = Job(True, ("store=x/y", "optim.lr=0.001", "sae.k=8"), frozenset({"sae.k"}))
    earlier = Path("runs/x/optim.lr=0.001,sae.k=8")
    earlier.mkdir(parents=True)
    assert command.run_directory(None, "x", job) == earlier
