"""Arms that are trained together are, to the bit, the arms that are trained alone; and the store is
read once.
"""

import os
import random
import signal
import time
from dataclasses import replace

import pytest

from residual_saes.data.errors import Interrupted, MismatchError, NonFiniteError, SettingError
from residual_saes.data.journal import read_metrics
from residual_saes.train import sweep
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train, train_together
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae_file import load
from residual_saes.train.sweep import arm_bytes, passes, train_sweep
from residual_saes.train.trainer import Trainer
from tests.faults.child import in_child, outcome
from tests.faults.kills import kill_after
from tests.train.killing import BATCH, CPU, STEPS, bits, config, planted
from tests.train.planted import planted_stream

SMALL = config().sae
ARMS = {
    "base": {},
    "lr": {"optim": OptimConfig(lr=0.005, lr_floor=0.001)},
    "aux": {"sae": replace(SMALL, aux_coef=0.0)},
    "k": {"sae": replace(SMALL, k=3)},
    "d_sae": {"sae": replace(SMALL, d_sae=32)},
    "seed": {"seed": 5},
    "jumprelu": {"sae": replace(SMALL, activation="jumprelu")},
    "shorter": {"tokens": 12 * BATCH, "eval_every": 5},
}


def arms(folder, stream, names=tuple(ARMS)):
    return [Arm(config(**ARMS[name]), stream, folder / name) for name in names]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The bits of every arm, each trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for arm in arms(folder, planted_stream(planted())):
        train(arm, CPU)
    return {name: bits(folder / name) for name in ARMS}


def test_together_is_alone(alone, tmp_path):
    reader = planted()
    read = []
    reader.spoil = lambda number, _: read.append(number)
    outcomes = train_together(arms(tmp_path, planted_stream(reader)), CPU)
    assert {name: bits(tmp_path / name) for name in ARMS} == alone
    assert read == list(range(STEPS)), "one read for all arms"
    assert len({tuple(found.values()) for found in alone.values()}) == len(ARMS), (
        "the arms are different"
    )
    assert outcomes[0] == read_metrics(tmp_path / "base" / "metrics.jsonl")[-1]


def test_held_out_rows_are_read_once_for_all(tmp_path):
    stream, reads = planted_stream(planted()), []
    held_out = stream.held_out
    counted = replace(stream, held_out=lambda: reads.append(1) or held_out())
    train_together(arms(tmp_path, counted, ["base", "lr", "k"]), CPU)
    assert len(reads) == 3, "at steps 7, 14 and 20, not three times each"


def test_layers_go_side_by_side(tmp_path):
    """Each on its own rows, in one pass."""
    streams = {layer: planted_stream(planted(seed=layer)) for layer in (0, 1)}
    for layer, stream in streams.items():
        train(Arm(config(layer=layer), stream, tmp_path / f"alone_{layer}"), CPU)
    both = [
        Arm(config(layer=layer), stream, tmp_path / f"both_{layer}")
        for layer, stream in streams.items()
    ]
    train_together(both, CPU)
    for layer in streams:
        assert bits(tmp_path / f"both_{layer}") == bits(tmp_path / f"alone_{layer}")


def stopping(at):
    return planted(
        spoil=lambda number, _: os.kill(os.getpid(), signal.SIGTERM) if number == at else None
    )


def test_arms_may_be_at_different_steps(alone, tmp_path, capsys):
    """One is finished, one was stopped at step 10, one is new."""
    finished, stopped, _ = three = arms(tmp_path, planted_stream(planted()), ["base", "lr", "k"])
    train(finished, CPU)
    with pytest.raises(Interrupted):
        train(replace(stopped, stream=planted_stream(stopping(9))), CPU)
    capsys.readouterr()
    train_together(three, CPU)
    said = capsys.readouterr().err
    assert "base is finished" in said and "lr goes on at step 10 of 20" in said
    for name in ("base", "lr", "k"):
        assert bits(tmp_path / name) == alone[name], name


def test_a_stop_saves_every_arm_and_each_may_go_on_alone(alone, tmp_path):
    names = ["base", "jumprelu", "shorter"]
    with pytest.raises(Interrupted) as stopped:
        train_together(arms(tmp_path, planted_stream(stopping(9)), names), CPU)
    assert stopped.value.exit_code == 143
    for arm in arms(tmp_path, planted_stream(planted()), names):
        assert (arm.folder / "checkpoint" / "step_0000000010.json").exists()
        train(arm, CPU)
        assert bits(arm.folder) == alone[arm.folder.name]


@pytest.fixture(scope="module")
def span(tmp_path_factory):
    """Seconds that all arms take together."""
    folder, began = tmp_path_factory.mktemp("timed"), time.monotonic()
    assert (
        outcome(in_child(lambda: train_together(arms(folder, planted_stream(planted())), CPU))) == 0
    )
    return time.monotonic() - began


def assert_survives_kills(alone, folder, draw, kills, span):
    body = lambda: train_together(arms(folder, planted_stream(planted())), CPU)  # noqa: E731
    done = 0
    for _ in range(kills):
        if kill_after(draw.uniform(0, 0.5 * span), body) == 0:
            break
        done += 1
    assert outcome(in_child(body)) == 0
    for name in ARMS:
        assert bits(folder / name) == alone[name], name
    return done


def test_killed_together(alone, span, tmp_path):
    assert assert_survives_kills(alone, tmp_path, random.Random(0), 4, span) >= 1


@pytest.mark.long
def test_killed_together_many_times(alone, span, tmp_path):
    draw, kills, number = random.Random(1), 0, 0
    while kills < 100:
        kills += assert_survives_kills(alone, tmp_path / str(number), draw, 6, span)
        number += 1


def test_an_arm_that_diverges_leaves_the_others_alone(alone, tmp_path, capsys):
    stream = planted_stream(planted())
    wild = Arm(config(optim=OptimConfig(lr=1e30, lr_floor=0.0)), stream, tmp_path / "wild")
    base, failed, k = train_together(
        [*arms(tmp_path, stream, ["base"]), wild, *arms(tmp_path, stream, ["k"])], CPU
    )
    assert isinstance(failed, NonFiniteError) and "lower optim.lr=" in str(failed)
    assert "wild: the loss is" in capsys.readouterr().err
    assert base["step"] == k["step"] == STEPS
    for name in ("base", "k"):
        assert bits(tmp_path / name) == alone[name]
    assert not (tmp_path / "wild" / "sae_final.pt").exists()


def test_an_arm_that_is_refused_leaves_the_others_alone(alone, tmp_path):
    stream = planted_stream(planted())
    train(Arm(config(), stream, tmp_path / "lr"), CPU)
    base, refused = train_together(arms(tmp_path, stream, ["base", "lr"]), CPU)
    assert isinstance(refused, MismatchError)
    assert base["step"] == STEPS and bits(tmp_path / "base") == alone["base"]


def test_a_damaged_final_file_is_mended_in_a_sweep_too(alone, tmp_path):
    both = arms(tmp_path, planted_stream(planted()), ["base", "k"])
    train_together(both, CPU)
    (tmp_path / "k" / "sae_final.pt").write_bytes(b"torn")
    train_together(both, CPU)
    assert bits(tmp_path / "k") == alone["k"]


# -- passes ----------------------------------------------------------------------------------------


def test_as_many_arms_as_fit_go_into_one_pass(tmp_path):
    four = arms(tmp_path, planted_stream(planted()), ["base", "lr", "aux", "k"])
    one, step = arm_bytes(four[0]), max(map(sweep.step_bytes, four))
    assert passes(four, None) == [[0, 1, 2, 3]]
    assert passes(four, int((2 * one + step) / 0.9) + 9) == [[0, 1], [2, 3]]
    assert passes(four, int((3 * one + step) / 0.9) + 9) == [[0, 1, 2], [3]]
    assert passes(four, 1) == [[0], [1], [2], [3]], "one is tried however little there seems to be"


def test_arms_that_take_other_batches_share_no_read(tmp_path):
    stream = planted_stream(planted())
    changed = [{}, {"batch": 8, "tokens": 160}, {"seed": 3}, {"data_seed": 1}, {"layer": 1}]
    five = [Arm(config(**changes), stream, tmp_path / str(n)) for n, changes in enumerate(changed)]
    assert passes(five, None) == [[0, 2, 4], [1], [3]]
    assert sweep.announcement(five, passes(five, None)) == (
        "5 in 3 passes of 3 + 1 + 1: "
        "arms that differ in store, batch, data_seed or policy share no read"
    )


def test_arms_of_one_directory_are_refused(tmp_path):
    (arm,) = arms(tmp_path, planted_stream(planted()), ["base"])
    with pytest.raises(SettingError, match="run="):
        train_sweep([arm, replace(arm, config=config(seed=1))], CPU)


def test_state_is_counted_right(tmp_path):
    (arm,) = arms(tmp_path, planted_stream(planted()), ["base"])
    tensors = Trainer(arm.config, arm.stream.reader, CPU).state.tensors().values()
    assert arm_bytes(arm) == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=0.01)


def test_passes_are_announced_and_all_are_trained(alone, tmp_path, capsys, monkeypatch):
    four = arms(tmp_path, planted_stream(planted()), ["base", "lr", "aux", "k"])
    room = int((2 * arm_bytes(four[0]) + sweep.step_bytes(four[3])) / 0.9) + 9
    monkeypatch.setattr(sweep.devices, "free_bytes", lambda device: room)
    train_sweep(four, CPU)
    assert (
        "\narms    4 in 2 passes of 2 + 2: not all fit into memory at once\n"
        in capsys.readouterr().err
    )
    for name in ("base", "lr", "aux", "k"):
        assert bits(tmp_path / name) == alone[name]
        assert load(tmp_path / name / "sae_final.pt").d_sae == 48
