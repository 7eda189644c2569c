"""Two processes that train one SAE make the steps of one, and stop together."""

import os
import signal
import socket
from dataclasses import replace

import pytest
import torch

from residual_saes.data.errors import Interrupted, SettingError, TemporaryError
from residual_saes.data.journal import read_metrics
from residual_saes.train import checkpoint
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train
from residual_saes.train.objectives.gated import GatedConfig
from residual_saes.train.parallel import Group
from residual_saes.train.sae import SAEConfig
from residual_saes.train.sae_file import load
from residual_saes.train.trainer import Trainer
from tests.faults.child import in_child, outcome
from tests.train import killing
from tests.train.killing import BATCH, CPU, config, planted
from tests.train.planted import planted_stream

WORLD = 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(folder, readers=None, **changes):
    """Train the small run by two processes; how each ended."""
    port = free_port()

    def member(rank):
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(WORLD),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        stream = planted_stream(readers[rank] if readers else planted())
        try:
            with Group(CPU) as group:
                train(Arm(config(**changes), stream, folder), CPU, group)
        except (Interrupted, TemporaryError) as stopped:
            os._exit(stopped.exit_code)

    children = [in_child(lambda rank=rank: member(rank)) for rank in range(WORLD)]
    return [outcome(child) for child in children]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of one run by one process and by two."""
    folder = tmp_path_factory.mktemp("both")
    killing.run(folder / "one")
    assert together(folder / "two") == [0, 0]
    return folder / "one", folder / "two"


def test_two_processes_make_the_steps_of_one(both):
    one, two = (load(folder / "sae_final.pt").tensors() for folder in both)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_statistics_are_of_all_processes(both):
    """Losses, dead latents, coverage and variance explained of whole batches: AuxK divides by a
    batch's variance.
    """
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in both)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert max(line["dead"] for line in one) > 0
    for single, shared in zip(one, two, strict=True):
        assert single["dead"] == shared["dead"]
        for name in single.keys() - {"split"}:
            assert shared[name] == pytest.approx(single[name], rel=1e-3, abs=1e-6), (
                single["step"],
                name,
            )


def test_the_state_is_of_all_processes(both):
    one, two = (checkpoint.latest(folder / "checkpoint")[0].tensors for folder in both)
    assert torch.equal(one["silent"], two["silent"])
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name].double(), tensor.double(), rtol=1e-3, atol=1e-6, msg=name
        )


def test_a_signal_to_one_stops_both_at_one_step_and_they_go_on(both, tmp_path):
    folder = tmp_path / "run"
    stopping = planted(
        spoil=lambda at, _: os.kill(os.getpid(), signal.SIGUSR1) if at == 9 else None
    )
    assert together(folder, [planted(), stopping]) == [75, 75]
    saved, _ = checkpoint.latest(folder / "checkpoint")
    assert saved.step == 10
    assert together(folder) == [0, 0]
    for name, tensor in load(both[1] / "sae_final.pt").tensors().items():
        assert torch.equal(load(folder / "sae_final.pt").tensors()[name], tensor), (
            "two processes repeat their bits"
        )
    assert together(folder) == [0, 0], "finished, and left alone"


def test_a_process_that_is_lost_ends_the_others_and_the_command_goes_on(both, tmp_path):
    folder = tmp_path / "run"
    dying = planted(spoil=lambda at, _: os.kill(os.getpid(), signal.SIGKILL) if at == 9 else None)
    assert together(folder, [planted(), dying]) == [75, -signal.SIGKILL]
    assert together(folder) == [0, 0]
    for name, tensor in load(both[1] / "sae_final.pt").tensors().items():
        assert torch.equal(load(folder / "sae_final.pt").tensors()[name], tensor), name


class Pair(Group):
    """As a process of two sees it, without the other."""

    def __init__(self):
        super().__init__()
        self.world = 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch": BATCH - 1, "tokens": 200}, "batch=15"),
        ({"activation": "batchtopk"}, "sae.activation=batchtopk"),
        ({"activation": "jumprelu"}, "sae.activation=jumprelu"),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, named):
    if "activation" in changes:
        changes = {"sae": replace(config().sae, **changes)}
    with pytest.raises(SettingError, match=named):
        Trainer(config(**changes), planted(), CPU, Pair())


@pytest.mark.parametrize("sae", [SAEConfig(d_sae=48, k=2), GatedConfig(d_sae=48, k=2)])
def test_rows_that_do_not_compete_can_be_shared(sae):
    assert Trainer(config(sae=sae), planted(), CPU, Pair()).steps > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"MASTER_ADDR": ""},
        {"MASTER_PORT": "http"},
        {"MASTER_PORT": "99999"},
        {"WORLD_SIZE": ""},
        {"RANK": "3"},
    ],
    ids=str,
)
def test_variables_that_name_no_group_are_refused(monkeypatch, changes):
    """Otherwise the process waits for others that cannot come."""
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (given | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=next(iter(changes))):
        Group(CPU)
