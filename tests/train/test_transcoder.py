"""Transcoders: a planted MLP is found, the file does on raw rows what was trained, and a run that
stopped ends in the same bits.
"""

import os
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from torch.nn.functional import normalize

from residual_saes.data.errors import Interrupted, MismatchError, SettingError
from residual_saes.train import dead, objective, start
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train
from residual_saes.train.optim import Adam, OptimConfig
from residual_saes.train.sae import SAEConfig, Scales, initial
from residual_saes.train.sae_file import load
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.faults import kills
from tests.faults.child import in_child, outcome
from tests.train import killing
from tests.train.planted import Drawn, PlantedMLP, planted_stream
from tests.train.reference import random_sae
from tests.train.test_parallel import together

EVERY = {
    "topk": {},
    "batchtopk": {},
    "jumprelu": {},
    "matryoshka": {"nested": 3},
    "hierarchical": {"nested": 2},
    "gated": {"l1_coef": 0.3, "aux_coef": 0.0},
}
AUX = {"aux_coef": 1 / 32, "k_aux": 16, "aux_norm": "variance", "resample": True}


def sae_config(activation="topk", **settings):
    """A transcoder's settings, started by the map unless something else is said."""
    given = {**AUX, "init": "map", "kind": "transcoder", **EVERY[activation], **settings}
    return objective.find(activation).settings(activation=activation, **given)


# -- what it is good for ---------------------------------------------------------------------------


def trained(folder, activation, steps, **planted):
    """(held-out record, share of the planted neurons that are found)."""
    reader = PlantedMLP(batch=256, rows=256 * steps, **planted)
    sae = sae_config(activation, d_sae=48, k=3, dead_after=2000, skip="linear" in planted)
    rates = OptimConfig(lr=0.02, lr_floor=0.002)
    config = TrainConfig(layer=0, site="mlp_in", batch=256, sae=sae, optim=rates, log_every=100)
    final = train(Arm(config, planted_stream(reader), folder), killing.CPU)
    found = load(folder / "sae_final.pt")
    read = reader.reads @ normalize(found.W_enc, dim=0)
    written = reader.writes @ normalize(found.W_dec, dim=1).T
    both = torch.minimum(read, written).amax(1)  # by one and the same latent
    return final, float((both > 0.9).float().mean())


def test_finds_what_the_neurons_read_and_write(tmp_path):
    """And nothing where each row is beside another token's."""
    final, share = trained(tmp_path / "mlp", "topk", 260)
    assert share >= 0.95
    assert final["variance_explained"] > 0.85
    final, share = trained(tmp_path / "apart", "topk", 40, apart=True)
    assert share == 0
    assert abs(final["variance_explained"]) < 0.05


@pytest.mark.long
@pytest.mark.parametrize("linear", [{}, {"linear": 0.3}], ids=["", "skip"])
@pytest.mark.parametrize("activation", EVERY)
def test_every_activation_finds_the_neurons(activation, linear, tmp_path):
    final, share = trained(tmp_path, activation, 600, **linear)
    assert share >= 0.95
    assert final["variance_explained"] > 0.9


def test_every_activation_is_tried():
    assert sorted(EVERY) == objective.names()


# -- what is recorded and written ------------------------------------------------------------------


def small(**changes):
    """The small run of tests.train.killing as a transcoder that uses all of the state."""
    settings = {"d_sae": 48, "k": 2, "k_aux": 8, "dead_after": killing.BATCH, "skip": True}
    return {"site": "mlp_in", "layer": 5, "sae": sae_config(**{**settings, **changes})}


def reader(**changes):
    sizes = {"d": 8, "d_out": 6, "neurons": 12, "bias": 0.5, "linear": 0.5}
    return PlantedMLP(**{**sizes, "rows": 1000, "batch": killing.BATCH, **changes})


def raw_error(sae, drawn: Drawn):
    """(squared error, squares about the mean) of the held-out rows, on raw rows in float64."""
    rows = torch.cat([drawn.draw(-1 - i, 256) for i in range(4)]).double()
    x, y = rows.split(drawn.widths, 1)
    x = x.to(sae.encoder.dtype)
    about = y - torch.from_numpy(drawn.mean)[drawn.widths[0] :]
    return (y - sae(x).double()).square().sum(), about.square().sum()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", EVERY)
def test_the_file_does_on_raw_rows_what_the_record_says(activation, skip, tmp_path):
    drawn = reader(linear=0.5 if skip else 0.0)
    final = killing.run(tmp_path, drawn, **small(activation=activation, skip=skip))
    found = load(tmp_path / "sae_final.pt")
    assert (found.d_model, found.d_out, found.W_skip is not None) == (8, 6, skip)
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(48))
    torch.testing.assert_close(
        found.b_in.double(), torch.from_numpy(drawn.mean)[:8], rtol=1e-6, atol=1e-6
    )
    error, about = raw_error(found, drawn)
    assert final["mse"] == pytest.approx(float(error / (1024 * 6)), rel=1e-4)
    assert final["variance_explained"] == pytest.approx(float(1 - error / about), abs=1e-4)
    assert "targets" not in final


def test_the_skip_takes_the_affine_part(tmp_path):
    """Which one latent a row cannot give."""
    explained = {}
    for skip in (False, True):
        drawn = PlantedMLP(batch=64, rows=64 * 80, linear=1.0)
        sae = sae_config(d_sae=64, k=1, dead_after=3000, skip=skip)
        rates = OptimConfig(lr=0.01, lr_floor=0.001)
        config = TrainConfig(layer=0, site="mlp_in", batch=64, sae=sae, optim=rates)
        arm = Arm(config, planted_stream(drawn), tmp_path / str(skip))
        explained[skip] = train(arm, killing.CPU)["variance_explained"]
    assert explained[True] > 0.9 > 0.6 > explained[False]


@pytest.mark.parametrize("threshold", [None, 1.0])
@pytest.mark.parametrize("scales", [Scales(3.0, 0.2), Scales(0.5, 0.5)])
def test_fold_changes_no_output(scales, threshold):
    sae = random_sae(12, 64, 4, threshold=threshold, d_out=7, skip=True)
    sae.project_()
    x = torch.randn(50, 12, dtype=torch.float64)
    wanted = sae(x * scales.read) / scales.written
    folded = sae.folded(scales)
    torch.testing.assert_close(folded(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.W_dec, sae.W_dec, rtol=0, atol=0)
    again = folded.folded(Scales(1 / scales.read, 1 / scales.written))
    for name, tensor in sae.tensors().items():
        torch.testing.assert_close(again.tensors()[name], tensor, msg=name)


def test_the_run_records_what_it_reads(tmp_path):
    drawn = reader()
    killing.run(tmp_path, drawn, **small())
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    settings = config["settings"]
    assert (settings["layer"], settings["site"]) == (5, "mlp_in")
    assert (settings["sae"]["kind"], settings["sae"]["skip"]) == ("transcoder", True)
    assert "stores" not in settings and "target" not in settings["sae"] and "scale" not in config
    assert config["scales"] == {
        "mlp_in_5": pytest.approx(8**0.5 / drawn.mean_norms[0]),
        "mlp_out_5": pytest.approx(6**0.5 / drawn.mean_norms[1]),
    }
    for changes in ({"site": "resid_mid"}, {"layer": 6}):
        with pytest.raises(MismatchError, match=next(iter(changes))):
            killing.run(tmp_path, drawn, **{**small(), **changes})


# -- starts and restarts ---------------------------------------------------------------------------


def test_starts_from_pairs_of_rows():
    """A row of 0 on either side has no direction."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=draw) * torch.linspace(1, 4, 9).unsqueeze(1)
    y = torch.randn(9, 4, generator=draw) * torch.linspace(4, 1, 9).unsqueeze(1)
    x[2], y[4] = 0, 0
    config = SAEConfig(d_sae=16, k=2, kind="transcoder", init="rows")
    before = initial(config, torch.zeros(4), 0, torch.zeros(5))
    after = initial(config, torch.zeros(4), 0, torch.zeros(5))
    start.from_rows_(after, x, y, whiten=False)
    kept = [0, 1, 3, 5, 6, 7, 8]
    torch.testing.assert_close(after.W_dec[:7], normalize(y[kept], dim=1))
    torch.testing.assert_close(normalize(after.encoder, dim=1)[:7], normalize(x[kept], dim=1))
    torch.testing.assert_close(after.W_dec[7:], before.W_dec[7:])
    torch.testing.assert_close(normalize(after.encoder, dim=1)[7:], before.encoder[7:])
    y_hat = after(x)
    assert float((y * y_hat).sum() / y_hat.square().sum()) == pytest.approx(1, rel=1e-5)


def test_starts_by_the_map_that_rows_have():
    """Of y = x A each latent reads A of what it writes, also where a column of x is always 0."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=draw)
    x[:, 4] = 0
    A = torch.randn(5, 4, generator=draw)
    sae = initial(SAEConfig(d_sae=16, k=2, kind="transcoder"), torch.zeros(4), 0, torch.zeros(5))
    directions = sae.W_dec.clone()
    start.by_map_(sae, x, x @ A)
    A[4] = 0
    assert torch.equal(sae.W_dec, directions)
    torch.testing.assert_close(
        normalize(sae.encoder, dim=1), normalize(directions @ A.T, dim=1), rtol=1e-4, atol=1e-5
    )
    y_hat = sae(x)
    assert float((x @ A * y_hat).sum() / y_hat.square().sum()) == pytest.approx(1, rel=1e-5)
    with pytest.raises(SettingError, match=r"sae\.init=map"):
        SAEConfig(init="map")


def test_starts_apart_without_rows():
    """Encoder and decoder are of different hook points, so they have nothing in common."""
    config = SAEConfig(d_sae=500, k=2, kind="transcoder", skip=True)
    b_in, b_dec = torch.arange(12.0), torch.arange(12.0) - 3
    sae = initial(config, b_dec, 0, b_in)
    assert abs(float((sae.encoder * sae.W_dec).sum(1).mean())) < 0.05
    torch.testing.assert_close(sae.encoder.norm(dim=1), torch.ones(500))
    assert torch.equal(sae.b_in, b_in) and torch.equal(sae.b_dec, b_dec)
    assert not sae.W_skip.any()


def test_restarted_latents_read_the_row_whose_error_they_write():
    sae = random_sae(5, 7, 2, dtype=torch.float32, d_out=4)
    adam = Adam(
        {name: sae.parameters()[name] for name in objective.Objective.learned}, OptimConfig()
    )
    before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    length = sae.encoder.norm(dim=1).mean()
    error, read = torch.randn(9, 4), torch.randn(9, 5)
    latents, draw = torch.tensor([6, 1]), torch.tensor([2, 8])
    dead.resample_(sae, adam, latents, error, draw, read)
    torch.testing.assert_close(sae.W_dec[latents], normalize(error[draw], dim=1))
    torch.testing.assert_close(sae.encoder[latents], normalize(read[draw], dim=1) * length)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(sae.W_dec[others], before["W_dec"][others])
    assert not sae.b_enc[latents].any()


def test_restarts_are_given_the_centred_rows(monkeypatch):
    given = []
    monkeypatch.setattr(dead, "resample_", lambda *arguments: given.append(arguments[-1]))
    drawn = reader()
    trainer = Trainer(killing.config(**small(init="random")), drawn, killing.CPU)
    with torch.no_grad():
        for number in range(6):
            given.clear()
            trainer.step_(drawn.draw(number, killing.BATCH))
    x, _ = trainer.columns.split(trainer.columns.scaled(drawn.draw(5, killing.BATCH)))
    torch.testing.assert_close(given[0], x - trainer.state.sae.b_in)


def test_rotate_is_refused():
    with pytest.raises(SettingError, match=r"sae\.rotate"):
        SAEConfig(kind="transcoder", rotate=True)


# -- stopping and going on -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert outcome(in_child(lambda: killing.run(folder, reader(), **small()))) == 0
    return killing.bits(folder)


@pytest.mark.parametrize("step", [1, 9])
def test_a_signal_costs_no_bit(step, undisturbed, tmp_path):
    def spoil(number, rows):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        killing.run(tmp_path, reader(spoil=spoil), **small())
    killing.run(tmp_path, reader(), **small())
    assert killing.bits(tmp_path) == undisturbed


def test_kills_cost_no_bit(undisturbed, tmp_path):
    count = kills.moments(lambda: killing.run(tmp_path / "counted", reader(), **small()))
    for number in range(3):
        at, folder = (2 * number + 1) * count // 6, tmp_path / str(number)

        def body(folder=folder):
            killing.run(folder, reader(), **small())

        assert outcome(in_child(kills.armed(at, body))) == -signal.SIGKILL
        body()
        assert killing.bits(folder) == undisturbed, at


def test_the_checkpoint_has_what_only_a_transcoder_has():
    trainer = Trainer(killing.config(**small()), reader(), killing.CPU)
    own = {"b_in", "W_skip", "W_skip.exp_avg", "W_skip.exp_avg_sq", "W_skip.step"}
    assert own < trainer.state.tensors().keys()


def test_two_processes_make_the_steps_of_one(tmp_path):
    changes = small(resample=False)
    killing.run(tmp_path / "one", reader(), **changes)
    assert together(tmp_path / "two", [reader(), reader()], **changes) == [0, 0]
    one, two = (load(tmp_path / name / "sae_final.pt").tensors() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_the_plain_run_records_nothing_new():
    recorded = replace(killing.config()).recorded()
    assert not {"site", "stores"} & recorded.keys()
    assert not {"kind", "target", "skip"} & recorded["sae"].keys()
