"""A run that was killed ends with the bits of one that was not: weights, optimizer, counters and
metrics.
"""

import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from residual_saes.data.errors import Interrupted
from residual_saes.data.journal import read_metrics
from residual_saes.train import checkpoint
from residual_saes.train.trainer import Trainer
from tests.faults import kills
from tests.faults.child import in_child, outcome
from tests.train import killing
from tests.train.killing import CHECKPOINTS, METRICS, bits, run

IN_DEFAULT_SUITE = 8  # failpoints, spread over the run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The bits of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert outcome(in_child(lambda: run(folder))) == 0
    return bits(folder)


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory):
    """How many moments there are just before and after a call that makes something last."""
    folder = tmp_path_factory.mktemp("counted") / "run"
    return kills.moments(lambda: run(folder))


def test_undisturbed_runs_repeat(undisturbed, tmp_path):
    run(tmp_path / "run")
    assert bits(tmp_path / "run") == undisturbed


def test_the_small_run_uses_all_of_the_state(undisturbed, tmp_path):
    """Or equality would prove little: latents die and come back, AuxK works, both kinds of metrics
    are there.
    """
    run(tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / METRICS)
    training = [line for line in lines if line["split"] == "train"]
    assert max(line["dead"] for line in training) > min(line["dead"] for line in training[2:]) >= 0
    assert any(line["aux_loss"] > 0 for line in training)
    assert [line["step"] for line in lines if line["split"] == "held_out"] == [7, 14, 20]


def assert_survives(at, folder, undisturbed):
    assert outcome(in_child(kills.armed(at, lambda: run(folder)))) == -signal.SIGKILL
    run(folder)
    assert bits(folder) == undisturbed, f"failpoint {at}"


def test_killed_at_failpoints(failpoints, undisturbed, tmp_path):
    assert failpoints > 60
    for i in range(IN_DEFAULT_SUITE):
        at = (2 * i + 1) * failpoints // (2 * IN_DEFAULT_SUITE)
        assert_survives(at, tmp_path / f"run_{at}", undisturbed)


def kill_until_finished(folder, delays, body):
    """Start again and again in one folder, each time killed after the next delay; how many kills
    there were.
    """
    for number, delay in enumerate(delays):
        if kills.kill_after(delay, body) == 0:
            return number
    assert outcome(in_child(body)) == 0
    return len(delays)


def test_killed_at_random_moments(undisturbed, tmp_path):
    began = time.monotonic()
    run(tmp_path / "timed")
    span, draw, folder = time.monotonic() - began, random.Random(0), tmp_path / "run"
    delays = [draw.uniform(0, 0.7 * span) for _ in range(4)]
    assert kill_until_finished(folder, delays, lambda: run(folder)) >= 1
    assert bits(folder) == undisturbed


@pytest.mark.long
def test_killed_at_every_failpoint(failpoints, undisturbed, tmp_path):
    for at in range(failpoints):
        assert_survives(at, tmp_path / f"run_{at}", undisturbed)


@pytest.mark.long
def test_killed_at_many_random_moments(undisturbed, tmp_path):
    draw, killed, number = random.Random(1), 0, 0
    while killed < 100:
        folder = tmp_path / f"run_{number}"
        delays = [draw.uniform(0, 0.3) for _ in range(4)]
        killed += kill_until_finished(folder, delays, lambda f=folder: run(f))
        assert bits(folder) == undisturbed
        number += 1


def stop_at(number, signum=signal.SIGTERM):
    """A reader in whose batch `number` a signal arrives."""
    return killing.planted(
        spoil=lambda at, _: os.kill(os.getpid(), signum) if at == number else None
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step_it_finds(signum, undisturbed, tmp_path, capsys):
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, stop_at(9, signum))
    assert stopped.value.exit_code == 128 + signum
    saved, _ = checkpoint.latest(tmp_path / CHECKPOINTS)
    assert saved.step == 10
    run(tmp_path)
    assert "\ngoes on  at step 10 of 20\n" in capsys.readouterr().err
    assert bits(tmp_path) == undisturbed


def test_signals_where_something_is_due(undisturbed, tmp_path):
    """An evaluation, a checkpoint, both kinds of lines, the end, and nothing."""
    signal_at((0, 6, 7, 11, 13, 19), undisturbed, tmp_path)


@pytest.mark.long
def test_signal_at_every_step(undisturbed, tmp_path):
    signal_at(range(killing.STEPS), undisturbed, tmp_path)


def signal_at(batches, undisturbed, tmp_path):
    for number in batches:
        folder = tmp_path / f"run_{number}"
        try:
            run(folder, stop_at(number))
        except Interrupted:
            run(folder)
        assert bits(folder) == undisturbed, number


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after step 10, and its checkpoint."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert outcome(in_child(lambda: run(folder, stop_at(9)))) == 1
    saved, _ = checkpoint.latest(folder / CHECKPOINTS)
    return folder, saved


STATE = list(Trainer(killing.config(), killing.planted(), killing.CPU).state.tensors())


def assert_item_counts(item, changed, stopped, undisturbed, folder):
    shutil.copytree(stopped[0], folder)
    shutil.rmtree(folder / CHECKPOINTS)
    (folder / CHECKPOINTS).mkdir()
    checkpoint.save(folder / CHECKPOINTS, changed)
    run(folder)
    assert bits(folder) != undisturbed, f"{item} is not needed"


@pytest.mark.parametrize("item", STATE)
def test_no_tensor_of_the_state_can_be_left_out(item, stopped, undisturbed, tmp_path):
    """Put back to its value at the start, each one alone must change the result."""
    fresh = Trainer(killing.config(), killing.planted(), killing.CPU).state.tensors()
    changed = replace(stopped[1], tensors={**stopped[1].tensors, item: fresh[item]})
    assert_item_counts(item, changed, stopped, undisturbed, tmp_path / "run")


@pytest.mark.parametrize("item", ["step", "metrics_bytes"])
def test_no_number_of_the_state_can_be_left_out(item, stopped, undisturbed, tmp_path):
    changed = replace(stopped[1], **{item: 0})
    if item == "metrics_bytes":
        changed = replace(changed, metrics_digest="")  # or it would be refused
    assert_item_counts(item, changed, stopped, undisturbed, tmp_path / "run")


def test_the_whole_state_is_enough(stopped, undisturbed, tmp_path):
    """The ablation's own control: the same way round, with nothing left out."""
    with pytest.raises(AssertionError, match="nothing is not needed"):
        assert_item_counts("nothing", stopped[1], stopped, undisturbed, tmp_path / "run")


def test_damaged_checkpoint_costs_only_time(undisturbed, tmp_path, capsys):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_at(9))
    newest = max((tmp_path / CHECKPOINTS).glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    run(tmp_path)
    err = capsys.readouterr().err
    assert "step_0000000010 is damaged and passed over" in err
    assert "\ngoes on  at step 8 of 20\n" in err
    assert bits(tmp_path) == undisturbed


def test_threads_that_changed_are_told(stopped, tmp_path, capsys):
    shutil.copytree(stopped[0], tmp_path / "run")
    torch.set_num_threads(2)
    run(tmp_path / "run")
    assert "cpu_threads was 1 and is now 2" in capsys.readouterr().err
