"""Dictionaries of several hook points, trained from stores: alone, together, killed, gone on."""

import random
import shutil

import pytest
import torch

from residual_saes.conf.command import plain
from residual_saes.data.errors import MismatchError
from residual_saes.data.store.store import Store
from residual_saes.train import command
from residual_saes.train.loop import train
from residual_saes.train.run import read_config
from residual_saes.train.sweep import passes, train_sweep
from tests.faults.child import in_child, outcome
from tests.faults.kills import kill_after
from tests.train.killing import CPU, bits
from tests.train.test_command import SMALL, make_store

POINTS = (3, 5, "mlp_in_3", "mlp_out_3")
KINDS = ("sae", "transcoder", "crosscoder")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "base.zarr", layers=POINTS)


@pytest.fixture(scope="module")
def other(store, tmp_path_factory):
    """The same tokens by another model."""
    folder = tmp_path_factory.mktemp("stores") / "it.zarr"
    return make_store(folder, layers=(3,), model="another")


def settings(*overrides):
    from hydra import compose, initialize_config_module

    from residual_saes.conf.names import quoted

    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        short = ["tokens=640", "log_every=3", "eval_every=4", "checkpoint_every=3"]
        return plain(compose("train", quoted([*SMALL, *short, *overrides])))


def arm(folder, *overrides):
    return command.arm(settings(f"run={folder}", *overrides))


def three(store, folder):
    """What `-m sae.kind=sae,transcoder,crosscoder` trains, layers as the store has them."""
    return [arm(folder / kind, f"store={store}", f"sae.kind={kind}") for kind in KINDS]


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for each in three(store, folder):
        train(each, CPU)
    return {kind: bits(folder / kind) for kind in KINDS}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_sae_a_transcoder_and_a_crosscoder_on_one_read(store, alone, tmp_path):
    arms = three(store, tmp_path)
    read = [[port.name for port in each.config.ports.every] for each in arms]
    assert read == [["3"], ["mlp_in_3", "mlp_out_3"], ["3", "5"]]
    assert passes(arms, None) == [[0, 1, 2]]
    train_sweep(arms, CPU)
    assert {kind: bits(tmp_path / kind) for kind in KINDS} == alone


def test_killed_together_they_end_the_same(store, alone, tmp_path):
    body = lambda: train_sweep(three(store, tmp_path), CPU)  # noqa: E731
    draw = random.Random(0)
    killed = 0
    while killed < 3 and kill_after(draw.uniform(0.05, 0.4), body) != 0:
        killed += 1
    assert outcome(in_child(body)) == 0
    assert {kind: bits(tmp_path / kind) for kind in KINDS} == alone


def test_what_is_read_is_part_of_the_run(store, other, tmp_path):
    """Other layers, sites, stores, or another order of them: refused, with both values."""
    one = f"store={store}"
    cases = [
        ([one, "layer=[3,5]"], [one, "layer=[5,3]"], "layer is [3, 5] there and [5, 3] here"),
        ([one, "site=[mlp_in,mlp_out]"], [one, "site=[mlp_out,mlp_in]"], "site is ['mlp_in', "),
        ([f"store=[{store},{other}]"], [f"store=[{other},{store}]"], "store.identities"),
        ([f"store=[{store},{store}]"], [f"store=[{store},{other}]"], "store.identities"),
    ]
    for number, (began, changed, named) in enumerate(cases):
        how = ["sae.kind=crosscoder", f"run={tmp_path / str(number)}", "tokens=64"]
        train(command.arm(settings(*how, *began)), CPU)
        train(command.arm(settings(*how, *began)), CPU)  # it is finished
        with pytest.raises(MismatchError) as refused:
            train(command.arm(settings(*how, *changed)), CPU)
        assert named in str(refused.value)


def test_two_stores_of_the_same_tokens(store, other, tmp_path):
    stores = f"store=[{store},{other}]"
    arms = [
        arm(tmp_path / "one", f"store={store}", "layer=3"),
        arm(tmp_path / "both", stores, "sae.kind=crosscoder", "layer=3"),
        arm(tmp_path / "other", f"store={other}"),
    ]
    assert passes(arms, None) == [[0, 1, 2]]  # one of them reads both
    assert passes([arms[0], arms[2]], None) == [[0], [1]]
    train_sweep(arms[:2], CPU)
    recorded = read_config(tmp_path / "both")
    both = [str(store), str(other)]
    identities = [Store.open(path).identity for path in both]
    assert recorded["store_path"] == both[0] and recorded["store_paths"] == both
    assert recorded["settings"]["store"] == {"identity": identities[0], "identities": identities}
    assert set(recorded["scales"]) == {"3", "1/3"}
    assert "store_paths" not in read_config(tmp_path / "one")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["layer=3"], "base_tiny_L3"),
        (["sae.kind=crosscoder"], "base_tiny_L3_5"),
        (["sae.kind=crosscoder", "layer=[5,3]"], "base_tiny_L5_3"),
        (["sae.kind=transcoder"], "base_tiny_mlp_in_3"),
        (["site=mlp_out"], "base_tiny_mlp_out_3"),
        (["sae.kind=crosscoder", "site=[resid_post,mlp_out]"], "base_tiny_resid_post_mlp_out_3"),
        (["sae.kind=crosscoder", "layer={crosscoder:[5,3],sae:3}"], "base_tiny_L5_3"),
        (["layer={crosscoder:[5,3],sae:5}"], "base_tiny_L5"),
        (["layer={crosscoder:[5,3]}"], "base_tiny_L3"),
    ],
)
def test_runs_are_named_by_what_they_read(overrides, name, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = command.arm(settings(f"store={store}", *overrides))
    assert str(named.folder) == f"runs/{name}"


def test_a_store_is_found_by_all_that_is_read(store, other, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in (store, other):
        shutil.copytree(path, tmp_path / "activations" / path.name)
    for overrides in (
        ["layer=5"],
        ["sae.kind=crosscoder"],
        ["sae.kind=transcoder"],
        ["site=mlp_in"],
    ):
        found = command.arm(settings(*overrides))
        assert found.facts["store_path"] == "activations/base.zarr"
