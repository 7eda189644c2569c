"""Training that starts from rows, in their principal axes, and starts dead latents again."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from residual_saes.data.errors import Interrupted, SettingError
from residual_saes.data.rows.follower import FollowsNobody
from residual_saes.train import checkpoint, dead, start
from residual_saes.train.arm import Arm
from residual_saes.train.checkpoint import Checkpoint
from residual_saes.train.evaluate import evaluate
from residual_saes.train.loop import train, train_together
from residual_saes.train.optim import Adam, OptimConfig
from residual_saes.train.sae import SAE, SAEConfig, initial
from residual_saes.train.sae_file import load
from residual_saes.train.stream import first_rows
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.faults import kills
from tests.faults.child import in_child, outcome
from tests.train import killing
from tests.train.killing import (
    BATCH,
    CHECKPOINTS,
    CPU,
    STEPS,
    bits,
    config,
    planted,
)
from tests.train.planted import Planted, planted_stream
from tests.train.reference import dense_activations, random_sae
from tests.train.test_parallel import Pair, together

PATIENCE = 3  # times dead_after that resampling waits
DEAD_AFTER, LAST = 3, 4 * STEPS // 5  # in steps
PLAIN = replace(config().sae, dead_after=DEAD_AFTER * BATCH // PATIENCE)
RECIPE = {"init": "rows", "rotate": True, "resample": True}
BETTER = {"decay": "linear", "beta1": 0.5, "beta2": 0.99}
WHOLE = {
    "sae": replace(PLAIN, **RECIPE),
    "optim": OptimConfig(lr="auto", lr_floor=0.002, project_every=3, **BETTER),
}


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_an_unknown_start_is_named():
    with pytest.raises(SettingError, match=r"sae\.init='kmeans'"):
        SAEConfig(init="kmeans")


# -- rows, axes, directions ------------------------------------------------------------------------


def test_first_rows_are_read_once_for_all_arms():
    reader, read = planted(), []
    reader.spoil = lambda number, _: read.append(number)
    stream = planted_stream(reader)
    rows = stream.first(40)
    assert torch.equal(rows, torch.cat([reader.draw(n, BATCH) for n in range(3)])[:40])
    assert torch.equal(stream.first(20), rows[:20])
    assert read == [0, 1, 2]
    assert len(stream.first(50)) == 50


@pytest.mark.parametrize("spread", [0.0, 3.0, np.inf])
def test_axes_are_orthogonal_and_diagonalise_the_covariance(spread):
    """Also where they are thousands of times as long as one another, or have no length at all."""
    lengths = 10 ** -torch.linspace(0, 1, 6).mul(spread).nan_to_num(0.0)
    rows = normal(500, 6) * lengths @ torch.linalg.qr(normal(6, 6, seed=2)).Q
    axes = start.principal_axes(rows)
    assert axes.dtype == rows.dtype
    torch.testing.assert_close(axes.T @ axes, torch.eye(6), rtol=0, atol=1e-5)
    turned = (rows @ axes).double()
    covariance = turned.T @ turned / 500
    assert float((covariance - covariance.diag().diag()).abs().max()) < 1e-6
    wanted = np.linalg.svd(rows.numpy(), compute_uv=False) ** 2 / 500
    assert covariance.diag().sort(descending=True).values.numpy() == pytest.approx(
        wanted, rel=1e-2, abs=1e-6
    )


def from_rows(centred, d_sae=8, whiten=False):
    """(an SAE in float64 before, the same after)."""
    before = initial(SAEConfig(d_sae=d_sae, k=2), torch.zeros(6), 0)
    before, after = (
        SAE.of(**{name: t.double().clone() for name, t in before.tensors().items()}, k=2)
        for _ in "ab"
    )
    after.b_enc.zero_()
    start.from_rows_(after, centred, centred, whiten)
    return before, after


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("count", [5, 20])
def test_directions_are_unit_rows_and_the_encoder_has_their_best_scale(count, whiten):
    """Fewer rows than latents leave the others random; a row of 0 has no direction. One axis is
    noise.
    """
    centred = normal(count, 6).double() * torch.tensor([9, 3, 3, 1, 1, 1e-3])
    centred[2] = 0
    before, after = from_rows(centred, whiten=whiten)
    rows = centred[[n for n in range(count) if n != 2]][:8]
    # half: by the root of each axis's standard deviation, but noise as if it had 1/1000 of the
    # variance
    if whiten:
        variances = centred.square().mean(0)
        variances[5] = variances.mean() / 1000
        rows = rows / variances.sqrt().sqrt()
    torch.testing.assert_close(after.W_dec[: len(rows)], normalize(rows, dim=1))
    torch.testing.assert_close(after.W_dec[len(rows) :], before.W_dec[len(rows) :])
    tied = {"W_enc": after.W_dec.T, "b_enc": after.b_enc, "b_dec": after.b_dec}
    x_hat = dense_activations(tied, centred, 2) @ after.W_dec
    best = torch.linalg.lstsq(x_hat.reshape(-1, 1), centred.reshape(-1, 1)).solution
    assert abs(float(best) - 1) > 0.05, "or 1 would do"
    torch.testing.assert_close(after.W_enc, after.W_dec.T * best)
    assert after.W_enc.T.is_contiguous() and after.b_dec.eq(0).all()


def test_rows_without_directions_leave_the_start_as_it_was():
    before, after = from_rows(torch.zeros(20, 6).double())
    torch.testing.assert_close(after.W_dec, before.W_dec)
    torch.testing.assert_close(after.W_enc, before.W_dec.T)


@pytest.mark.parametrize(
    ("sae", "changes", "rows"),
    [
        (RECIPE, {}, 80),  # ten for each of 8 dimensions
        ({"rotate": True}, {}, 80),
        ({"init": "rows"}, {}, 80),
        ({"init": "rows", "d_sae": 128}, {}, 128),
        ({"resample": True}, {}, 0),
        ({"init": "kaiming"}, {"tokens": 20_000}, 16_384),
        (RECIPE, {"tokens": 3 * BATCH + 5}, 3 * BATCH),  # no more than the run will see
    ],
)
def test_rows_to_begin(sae, changes, rows):
    trainer = Trainer(config(sae=replace(PLAIN, **sae), **changes), planted(), CPU)
    assert trainer.rows_to_begin == rows


def begun(reader, **sae):
    trainer = Trainer(config(sae=replace(PLAIN, **sae), log_every=1), reader, CPU)
    trainer.begin_(first_rows(reader, trainer.rows_to_begin))
    return trainer


def test_a_rotated_start_is_half_whitened_in_the_rows_axes():
    reader = planted()
    plain, rotated = begun(reader, init="rows"), begun(reader, init="rows", rotate=True)
    basis, scale = rotated.state.basis, rotated.scale
    rows = (
        torch.cat([reader.draw(n, BATCH) for n in range(5)]).float() * scale
        - plain.columns.mean.float()
    )
    torch.testing.assert_close(plain.state.sae.W_dec, normalize(rows, dim=1)[:48])
    turned = (rows @ basis).double()
    covariance = turned.T @ turned
    assert float((covariance - covariance.diag().diag()).abs().max() / covariance.max()) < 1e-5
    assert float((basis - torch.eye(8)).abs().max()) > 0.5
    whitened = turned / turned.square().mean(0).sqrt().sqrt()
    torch.testing.assert_close(
        rotated.state.sae.W_dec, normalize(whitened, dim=1)[:48].float(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(basis @ rotated.state.sae.b_dec, plain.state.sae.b_dec)


def test_arms_that_see_a_batch_alike_share_it_and_keep_their_bits():
    """And those with another basis or scale do not."""
    reader = planted()
    alike = [begun(reader, init="rows", rotate=True, k=k) for k in (2, 3)]
    others = [
        begun(reader, init="rows", rotate=True, d_sae=128),  # needs more rows to begin
        begun(reader, init="rows", rotate=True, scale_rows=False),
        begun(reader, init="rows"),
    ]
    alone = [begun(reader, init="rows", rotate=True, k=k) for k in (2, 3)]
    for number in range(3):
        batch, shared = reader.draw(number, BATCH), {}
        for trainer in [*alike, *others]:
            trainer.step_(batch, shared)
        assert len(shared) == 4
        for trainer in alone:
            trainer.step_(batch)
    for beside, by_itself in zip(alike, alone, strict=True):
        for name, tensor in by_itself.state.tensors().items():
            assert torch.equal(beside.state.tensors()[name], tensor), name


def test_a_basis_that_is_restored_is_the_one_that_batches_are_turned_by():
    reader = planted()
    trainer = begun(reader, init="rows", rotate=True)
    other = Trainer(trainer.config, reader, CPU)
    batch = reader.draw(0, BATCH)
    assert torch.equal(*other.view.of(batch))  # not turned yet
    saved = {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}
    other.restore(Checkpoint(0, 0, "", saved))
    assert torch.equal(other.view.of(batch)[1], trainer.view.of(batch)[1])
    assert other.view.key == trainer.view.key


# -- starting dead latents again -------------------------------------------------------------------


def test_resampled_latents_follow_errors_and_take_steps_like_any_latent():
    """And no other latent is touched. One of the drawn rows has no error."""
    sae = random_sae(5, 7, 2, dtype=torch.float32)
    adam = Adam(sae.parameters(), OptimConfig())
    for seed in range(3):
        drawn = {name: normal(*t.shape, seed=seed) for name, t in sae.parameters().items()}
        adam.step_(drawn, 0.01)
    state = {**sae.parameters(), **adam.tensors()}
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    error = normal(4, 5)
    error[3] = 0
    latents, draw = [6, 1, 4], [2, 0, 3]
    dead.resample_(sae, adam, torch.tensor(latents), error, torch.tensor(draw))
    names = ("encoder", "W_dec", "b_enc")
    typical = {name: wanted[f"{name}.exp_avg_sq"].mean(0) for name in names}
    along = (wanted["encoder"] * wanted["W_dec"]).sum(1).mean()
    for latent, row in zip(latents, draw, strict=True):
        wanted["W_dec"][latent] = error[row] / error[row].norm() if row != 3 else 0.0
        wanted["encoder"][latent] = wanted["W_dec"][latent] * along
        wanted["b_enc"][latent] = 0.0
        for name in names:
            wanted[f"{name}.exp_avg"][latent] = 0.0
            wanted[f"{name}.exp_avg_sq"][latent] = typical[name]
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-7, msg=name)
    assert sae.encoder.is_contiguous()


@pytest.fixture
def restarts(monkeypatch):
    """(latents, rows) of each resampling."""
    found, real = [], dead.resample_

    def resample_(sae, adam, latents, error, draw, read):
        found.append((latents.tolist(), draw.tolist()))
        real(sae, adam, latents, error, draw, read)

    monkeypatch.setattr(dead, "resample_", resample_)
    return found


def test_who_is_restarted_and_when(restarts, monkeypatch):
    """Who has neither fired nor been restarted for so long, in the first 80 %; and `silent` knows
    nothing of it.
    """
    reader, firings, real = planted(), [], dead.firings
    monkeypatch.setattr(dead, "firings", lambda *args: firings.append(real(*args)) or firings[-1])
    trainer, fired, restarted = begun(reader, **RECIPE), np.zeros(48, int), np.zeros(48, int)
    times, still_silent = np.zeros(48, int), 0
    for step in range(1, STEPS + 1):
        restarts.clear()
        firings.clear()
        with torch.no_grad():
            trainer.step_(reader.draw(step - 1, BATCH))
        fired[firings[0].numpy() > 0] = step  # the step's own; the others are of its record
        wanted = (
            np.flatnonzero(step - np.maximum(fired, restarted) >= DEAD_AFTER) if step < LAST else []
        )
        assert [latents for latents, _ in restarts] == ([list(wanted)] if len(wanted) else []), step
        restarted[wanted] = step
        times[wanted] += 1
        assert trainer.state.silent.tolist() == ((step - fired) * BATCH).tolist()
        assert trainer.state.restarted.tolist() == ((step - restarted) * BATCH).tolist()
        still_silent += int((step - fired[wanted] >= DEAD_AFTER).sum())
    assert times.max() > 1 and times.min() == 0, "some more than once, some never"
    assert still_silent == times.sum(), "a restart is no firing"
    assert (step - fired >= DEAD_AFTER).any(), "there would have been some in the last 20 %"


def test_draws_are_a_pure_function_of_seed_and_step(restarts):
    def drawn(seed, step, count):
        trainer = Trainer(config(seed=seed, sae=WHOLE["sae"]), planted(), CPU)
        trainer.state.step = step
        trainer.state.silent[:count] = trainer.state.restarted[:] = 10**6
        trainer.resample_(normal(BATCH, 8), normal(BATCH, 8), BATCH)
        return restarts[-1][1]

    first = drawn(0, 5, 8)
    torch.manual_seed(77)
    assert drawn(0, 5, 8) == first
    assert drawn(1, 5, 8) != first and drawn(0, 6, 8) != first
    assert len(set(first)) == 8, "of different rows, as long as there are any"
    many = drawn(0, 5, 40)
    assert sorted(set(many)) == list(range(BATCH)) and {many.count(row) for row in many} == {2, 3}


# -- resuming, sweeping, waiting, sharing ----------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    killing.run(folder, **WHOLE)
    return bits(folder)


def stopping(at):
    return planted(
        spoil=lambda number, _: os.kill(os.getpid(), signal.SIGTERM) if number == at else None
    )


@pytest.mark.parametrize("at", [0, 3, 9, 15, 18])
def test_stopped_and_gone_on(at, undisturbed, tmp_path):
    """Also while the rows to begin with are read, which is before there is any checkpoint."""
    with pytest.raises(Interrupted):
        killing.run(tmp_path, stopping(at), **WHOLE)
    killing.run(tmp_path, **WHOLE)
    assert bits(tmp_path) == undisturbed


def test_killed_around_what_it_writes(undisturbed, tmp_path):
    for at in (5, 24, 43, 62, 81):
        folder = tmp_path / str(at)
        child = in_child(kills.armed(at, lambda folder=folder: killing.run(folder, **WHOLE)))
        assert outcome(child) == -signal.SIGKILL
        killing.run(folder, **WHOLE)
        assert bits(folder) == undisturbed, at


def test_beside_others_it_is_what_it_is_alone(undisturbed, tmp_path):
    stream = planted_stream(planted())
    others = {"plain": {}, "rotate": {"sae": replace(PLAIN, rotate=True)}, "whole": WHOLE}
    train_together(
        [Arm(config(**changes), stream, tmp_path / name) for name, changes in others.items()], CPU
    )
    assert bits(tmp_path / "whole") == undisturbed
    assert bits(tmp_path / "rotate") != bits(tmp_path / "plain")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert outcome(in_child(lambda: killing.run(folder, stopping(9), **WHOLE))) == 1
    return folder, checkpoint.latest(folder / CHECKPOINTS)[0]


FRESH = Trainer(config(**WHOLE), planted(), CPU).state.tensors()


@pytest.mark.parametrize("item", [*FRESH, None])
def test_no_tensor_of_the_state_can_be_left_out(item, stopped, undisturbed, tmp_path):
    """Put back to its value at the start, each alone must change what is learned; None of them must
    not.
    """
    assert {"basis", "restarted"} < FRESH.keys()
    folder, saved = stopped
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)
    (tmp_path / "run" / CHECKPOINTS).mkdir()
    tensors = {**saved.tensors, item: FRESH[item]} if item else saved.tensors
    checkpoint.save(tmp_path / "run" / CHECKPOINTS, replace(saved, tensors=tensors))
    killing.run(tmp_path / "run", **WHOLE)
    same = (tmp_path / "run" / "sae_final.pt").read_bytes() == undisturbed["sae_final.pt"]
    assert same == (item is None)


class Followed(FollowsNobody):
    """A harvest that writes down what is asked of it, and may be stopped while it is waited for."""

    def __init__(self, log, stop=False):
        self.log, self.stop = log, stop

    def begin(self, batch, fallback=0):
        self.log.append(("begin", batch))

    def wait(self, batch, stop):
        self.log.append(("wait", batch))
        if self.stop:
            self.stop = False  # a second signal would act at once
            os.kill(os.getpid(), signal.SIGTERM)


def follow(folder, stop=False, **changes):
    log = []
    reader = planted(spoil=lambda number, _: log.append(("read", number)))
    try:
        train(Arm(config(**changes), planted_stream(reader), folder, Followed(log, stop)), CPU)
    except Interrupted:
        log.append("stopped")
    return log


def test_rows_to_begin_with_are_waited_for(undisturbed, tmp_path):
    """80 rows are batches 0 to 4 of 16; a run that goes on needs none of them, one of 3 batches has
    no more.
    """
    assert follow(tmp_path / "run", stop=True, **WHOLE) == [("begin", 0), ("wait", 4), "stopped"]
    log = follow(tmp_path / "run", **WHOLE)
    assert log[:9] == [
        ("begin", 0),
        ("wait", 4),
        *(("read", n) for n in range(5)),
        ("wait", 0),
        ("read", 0),
    ]
    assert bits(tmp_path / "run") == undisturbed
    (tmp_path / "run" / "sae_final.pt").unlink()
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)
    assert outcome(in_child(lambda: killing.run(tmp_path / "half", stopping(9), **WHOLE))) == 1
    assert follow(tmp_path / "half", **WHOLE)[1:3] == [("wait", 10), ("read", 10)]
    assert follow(tmp_path / "short", **WHOLE, tokens=3 * BATCH)[1] == ("wait", 2)
    assert follow(tmp_path / "plain")[1:3] == [("wait", 0), ("read", 0)]


def test_two_processes_begin_as_one(tmp_path):
    changes = {**WHOLE, "sae": replace(WHOLE["sae"], resample=False), "tokens": 10 * BATCH}
    killing.run(tmp_path / "one", **changes)
    assert together(tmp_path / "two", **changes) == [0, 0]
    one, two = (load(tmp_path / name / "sae_final.pt").tensors() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_cannot_resample():
    with pytest.raises(SettingError, match=r"sae\.resample"):
        Trainer(config(**WHOLE), planted(), CPU, Pair())


# -- what it is good for ---------------------------------------------------------------------------


STRETCH = torch.linalg.qr(normal(32, 32, seed=5)).Q @ torch.tensor([5.0] * 4 + [1.0] * 28).diag()
STRETCH = STRETCH @ torch.linalg.qr(normal(32, 32, seed=6)).Q


class Stretched(Planted):
    """Planted rows whose space is five times as long along four axes, which are nobody's own."""

    def draw(self, number, n):
        return (super().draw(number, n).float() @ STRETCH).bfloat16()


def trained(reader, directions, steps, changes, **optim):
    """(mean cosine of directions with the nearest found ones, share of variance not explained)."""
    sae = SAEConfig(
        d_sae=64, k=3, aux_coef=1 / 32, k_aux=16, aux_norm="variance", dead_after=5000, **changes
    )
    rates = OptimConfig(lr_floor=0.001, **optim)
    run = TrainConfig(layer=0, batch=256, tokens=256 * steps, sae=sae, optim=rates, log_every=steps)
    trainer = Trainer(run, reader, CPU)
    with torch.no_grad():
        if trainer.rows_to_begin:
            trainer.begin_(first_rows(reader, trainer.rows_to_begin))
        for _, batch in zip(range(steps), reader.batches(0), strict=False):
            trainer.step_(batch)
        evaluation = trainer.evaluation()
        evaluate([evaluation], [reader.draw(-1, 2048)])
    found = trainer.state.sae.folded(trainer.scale, trainer.state.basis).W_dec
    nearest = (normalize(directions, dim=1) @ found.T).amax(1)
    return float(nearest.mean()), 1 - evaluation.figures()["variance_explained"]


@pytest.mark.parametrize("seed", [3, 4])
def test_the_whole_recipe_finds_planted_directions_sooner(seed):
    """Not of seed 0, whose planted directions are the very ones that an SAE of seed 0 starts
    with.
    """
    reader = Planted(d=32, latents=48, active=3, batch=256, seed=seed)
    default, lost = trained(reader, reader.directions, 150, {}, lr=0.01)
    better, still_lost = trained(reader, reader.directions, 150, RECIPE, lr=0.01, **BETTER)
    assert better > 0.97 > default
    assert still_lost < 0.6 * lost


def test_rotating_helps_where_axes_are_unequal():
    reader = Stretched(d=32, latents=48, active=3, batch=256, seed=2, noise=0.001)
    plain, rotated = (
        trained(reader, reader.directions @ STRETCH, 200, {"rotate": rotate}, lr=0.02, **BETTER)
        for rotate in (False, True)
    )
    assert rotated[0] > plain[0] + 0.01
    assert rotated[1] < plain[1]
