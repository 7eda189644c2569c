"""Training as a whole: it finds planted directions, says what it does, and refuses what it must."""

import os
from dataclasses import replace

import pytest
import torch

from residual_saes.data import locks
from residual_saes.data.digests import FILE
from residual_saes.data.errors import MismatchError, NonFiniteError, SettingError, StoreError
from residual_saes.data.journal import read_metrics
from residual_saes.train.arm import Arm
from residual_saes.train.dead import dead_latents
from residual_saes.train.loop import train
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import SAEConfig
from residual_saes.train.sae_file import load
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.train import killing
from tests.train.killing import METRICS, run
from tests.train.planted import Planted, planted_stream


def test_recovers_planted_directions(tmp_path):
    reader = Planted(d=32, latents=48, active=3, batch=256, rows=256 * 600, seed=1)
    sae = SAEConfig(
        d_sae=96,
        k=3,
        aux_coef=1 / 32,
        k_aux=16,
        aux_norm="variance",
        dead_after=3000,
        resample=True,
    )
    config = TrainConfig(
        layer=0, batch=256, sae=sae, optim=OptimConfig(lr=0.01, lr_floor=0.001), log_every=100
    )
    final = train(Arm(config, planted_stream(reader), tmp_path), killing.CPU)
    found = load(tmp_path / "sae_final.pt")
    cosines = (reader.directions @ found.W_dec.T).amax(1)
    assert float((cosines > 0.95).float().mean()) >= 0.95
    assert float(cosines.mean()) > 0.99
    assert final["variance_explained"] > 0.97
    x = reader.draw(-1, 256).float()
    error = (x - found(x)).double()
    centred = x.double() - torch.from_numpy(reader.mean)
    assert 1 - float(error.square().sum() / centred.square().sum()) == pytest.approx(
        final["variance_explained"], abs=0.02
    )


def test_aux_revives_dead_latents():
    """Half of the latents start where they hardly fire; there are as many latents as planted
    directions.
    """
    dead = {}
    for coefficient in (0.0, 1 / 32):
        reader = Planted(d=16, latents=32, active=3, batch=128, rows=128 * 600)
        sae = SAEConfig(
            d_sae=32, k=3, aux_coef=coefficient, k_aux=16, aux_norm="variance", dead_after=2048
        )
        config = TrainConfig(
            layer=0, batch=128, sae=sae, optim=OptimConfig(lr=0.01, lr_floor=0.001)
        )
        trainer = Trainer(config, reader, killing.CPU)
        trainer.state.sae.b_enc[:16] = -0.8
        for _, batch in zip(range(trainer.steps), reader.batches(0), strict=False):
            trainer.step_(batch)
        dead[coefficient] = len(dead_latents(trainer.state.silent, 2048))
    assert dead[0.0] > 10
    assert dead[1 / 32] < 0.5 * dead[0.0]


def test_training_rows_have_mean_norm_sqrt_d():
    reader = killing.planted(d=9)
    trainer = Trainer(killing.config(), reader, killing.CPU)
    x = reader.draw(-1, 4096).float()
    assert float((x * trainer.scale).norm(dim=1).mean()) == pytest.approx(3, rel=0.01)
    torch.testing.assert_close(
        trainer.state.sae.b_dec, x.mean(0) * trainer.scale, rtol=0, atol=0.05
    )
    assert trainer.mean_variance == pytest.approx(
        float((x * trainer.scale).var(0).mean()), rel=0.05
    )


def test_final_evaluation_is_of_the_exported_file(tmp_path):
    """Fold and last projection come before it, not after."""
    final = run(tmp_path)
    found, reader = load(tmp_path / "sae_final.pt"), killing.planted()
    x = torch.cat([reader.draw(-1 - i, 256) for i in range(4)]).double()
    error = x - found(x.float()).double()
    assert final["mse"] == pytest.approx(float(error.square().mean()), rel=1e-5)
    centred = float((x - torch.from_numpy(reader.mean)).square().sum())
    assert final["variance_explained"] == pytest.approx(
        1 - float(error.square().sum()) / centred, rel=1e-5
    )
    assert final["rows"] == 1024
    assert float((found.W_dec.norm(dim=1) - 1).abs().max()) < 1e-6


def test_metrics_have_their_keys_and_no_clock(tmp_path):
    run(tmp_path)
    lines = read_metrics(tmp_path / METRICS)
    figures = ["mse", "variance_explained", "variance_explained_scalar", "l0", "coverage"]
    training = ["split", "step", "tokens", "loss", "aux_loss", *figures, "dead", "dead_share", "lr"]
    held_out = ["split", "step", "tokens", "rows", *figures, "dead", "dead_share"]
    assert {tuple(line) for line in lines} == {tuple(training), tuple(held_out)}
    assert [line["step"] for line in lines if line["split"] == "train"] == [
        1,
        3,
        6,
        9,
        12,
        15,
        18,
        20,
    ]
    assert all(line["tokens"] == line["step"] * killing.BATCH for line in lines)
    assert [line["rows"] for line in lines if line["split"] == "held_out"] == [256, 256, 1024]


def test_l0_is_the_true_one(tmp_path):
    """Kept latents whose value is not positive do not count."""
    lines = read_lines = run(tmp_path, sae=replace(killing.config().sae, k=24))
    assert 0 < lines["l0"] < 24, read_lines


def spoiled(number, row, value):
    def spoil(at, rows):
        if at == number:
            rows[row, 3] = value

    return killing.planted(spoil=spoil)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_batch_stops_before_the_step(value, tmp_path):
    with pytest.raises(NonFiniteError, match=r"batch 13 .*row 5 of 16"):
        run(tmp_path, spoiled(13, 5, value))
    assert not (tmp_path / "sae_final.pt").exists()
    run(tmp_path)  # the stream is mended: nothing was spoiled
    run(tmp_path / "other")
    assert killing.bits(tmp_path) == killing.bits(tmp_path / "other")


def test_diverged_run_names_the_batch_and_the_rate(tmp_path):
    with pytest.raises(NonFiniteError, match=r"(nan|inf) at batch \d+ .*optim\.lr="):
        run(tmp_path, optim=OptimConfig(lr=1e30, lr_floor=0.0))


def test_finished_run_is_left_alone(tmp_path, capsys):
    first = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run(tmp_path) == first
    assert "is finished" in capsys.readouterr().err
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    } == before


def test_killed_between_last_checkpoint_and_export(tmp_path):
    run(tmp_path)
    before = killing.bits(tmp_path)
    (tmp_path / "sae_final.pt").unlink()
    run(tmp_path)
    assert killing.bits(tmp_path) == before


def test_changed_setting_is_refused_with_both_values(tmp_path):
    run(tmp_path)
    before = killing.bits(tmp_path)
    with pytest.raises(MismatchError, match="seed") as refused:
        run(tmp_path, seed=7, sae=replace(killing.config().sae, aux_coef=0.25, scale_rows=False))
    changed = {"sae.aux_coef": (0.5, 0.25), "sae.scale_rows": (True, False)}
    assert refused.value.differences == {"seed": (0, 7), **changed}
    assert killing.bits(tmp_path) == before


def test_changed_store_is_refused_with_both_values(tmp_path):
    run(tmp_path)
    with pytest.raises(MismatchError, match=r"store\.identity .*planted-8-.*planted-9-"):
        run(tmp_path, killing.planted(d=9))


def test_checkpoint_interval_may_change(tmp_path):
    run(tmp_path / "a", checkpoint_every=3)
    run(tmp_path / "b", checkpoint_every=1000)
    assert killing.bits(tmp_path / "a") == killing.bits(tmp_path / "b")
    run(tmp_path / "a", checkpoint_every=5)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", seed=1)
    for path in (tmp_path / "a" / "checkpoint").iterdir():
        path.unlink()
    for path in (tmp_path / "b" / "checkpoint").iterdir():
        path.rename(tmp_path / "a" / "checkpoint" / path.name)
    (tmp_path / "a" / "sae_final.pt").unlink()
    with pytest.raises(StoreError, match="checkpoint"):
        run(tmp_path / "a")


def test_second_process_in_one_run_is_refused(tmp_path):
    with (
        locks.locked(tmp_path, "held"),
        pytest.raises(StoreError, match="run="),
    ):
        run(tmp_path)
    run(tmp_path)


def test_temporaries_of_a_dead_process_are_swept(tmp_path):
    os.mkdir(tmp_path / "checkpoint")
    leftover = tmp_path / "checkpoint" / ".step_0000000004.json.1234abcd.tmp"
    leftover.write_text("torn")
    run(tmp_path)
    assert not leftover.exists()


def test_spoiled_config_is_named(tmp_path):
    run(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("settings: [")
    with pytest.raises(StoreError, match=r"config\.yaml"):
        run(tmp_path, seed=5)
    (tmp_path / FILE).unlink()  # of an earlier version
    with pytest.raises(StoreError, match=r"config\.yaml"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch": 0}, "batch=0"),
        ({"log_every": 0}, "log_every=0"),
        ({"eval_every": -1}, "eval_every=-1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
        ({"tokens": 15}, "tokens=15 .*batch=16"),
    ],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(SettingError, match=named):
        killing.config(**wrong)


def test_default_length_is_one_pass():
    config = replace(killing.config(), tokens=None)
    assert config.steps(rows=1000) == 62
    assert replace(config, tokens=16 * 100).steps(rows=1000) == 100
    with pytest.raises(SettingError, match=r"batch=16 .*10 "):
        config.steps(rows=10)


def test_a_damaged_final_sae_is_written_again_from_the_checkpoint(tmp_path):
    run(tmp_path)
    final = tmp_path / "sae_final.pt"
    whole = final.read_bytes()
    final.write_bytes(whole[:100])
    run(tmp_path)
    assert final.read_bytes() == whole


def test_a_folder_with_other_things_is_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(StoreError, match=r"metrics\.jsonl"):
        run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_speeds_are_kept_apart_and_go_on(tmp_path):
    run(tmp_path)
    logged = [
        line["step"]
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if line["split"] == "train"
    ]
    timings = read_metrics(tmp_path / "timings.jsonl")
    assert [line["step"] for line in timings] == logged
    assert all(line["tokens_per_s"] > 0 for line in timings)
    with (tmp_path / "timings.jsonl").open("ab") as file:
        file.write(b'{"step": 9')  # a killed run's torn line
    (tmp_path / "sae_final.pt").unlink()
    run(tmp_path)
    assert read_metrics(tmp_path / "timings.jsonl") == timings
