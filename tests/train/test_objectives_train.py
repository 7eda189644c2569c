"""Every activation finds planted directions, keeps k latents a row, and comes back from its file as
it was trained.
"""

import numpy as np
import pytest
import torch

from residual_saes.data.errors import SettingError
from residual_saes.train.arm import Arm
from residual_saes.train.export import saelens
from residual_saes.train.export.format import About
from residual_saes.train.loop import train
from residual_saes.train.objective import find, names
from residual_saes.train.optim import OptimConfig
from residual_saes.train.ports import ports_of
from residual_saes.train.sae import SAEConfig
from residual_saes.train.sae_file import load
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.train import killing
from tests.train.planted import Planted, planted_stream

EVERY = [
    {"activation": "topk"},
    {"activation": "hierarchical", "nested": 2},
    {"activation": "batchtopk"},
    {"activation": "jumprelu"},
    {"activation": "matryoshka", "nested": 3},
    {"activation": "gated", "l1_coef": 0.7, "aux_coef": 0.0},
]

THRESHOLDED = EVERY[2:]


def sae_config(**settings):
    return find(settings["activation"]).settings(**settings)


@pytest.mark.parametrize("changes", EVERY[1:], ids=lambda changes: changes["activation"])
def test_recovers_planted_directions(changes, tmp_path):
    """At least 95 % of them with a cosine of 0.95, by twice as many latents.

    That TopK does is in test_loop.py.
    """
    reader = Planted(d=32, latents=48, active=3, batch=256, rows=256 * 600, seed=1)
    aux = {
        "aux_coef": 1 / 32,
        "k_aux": 16,
        "aux_norm": "variance",
        "dead_after": 3000,
        "resample": True,
    }
    sae = sae_config(**{"d_sae": 96, "k": 3, **aux, **changes})
    config = TrainConfig(
        layer=0, batch=256, sae=sae, optim=OptimConfig(lr=0.01, lr_floor=0.001), log_every=100
    )
    final = train(Arm(config, planted_stream(reader), tmp_path), killing.CPU)
    found = load(tmp_path / "sae_final.pt")
    cosines = (reader.directions @ found.W_dec.T).amax(1)
    assert float((cosines >= 0.95).float().mean()) >= 0.95
    assert final["variance_explained"] > 0.94
    # On rows that training never saw, by the exported file alone.
    x = reader.draw(-1, 2048)
    kept = found.encode(x)
    # Gated has no target for L0: it follows l1_coef.
    rel = 0.1 if changes["activation"] == "gated" else 0.05
    assert float(kept.active().float().mean()) == pytest.approx(3, rel=rel)
    error = (x.float() - found(x)).double().square().sum()
    assert 1 - float(error / (x.double() - torch.from_numpy(reader.mean)).square().sum()) > 0.94


@pytest.mark.parametrize("changes", THRESHOLDED, ids=lambda changes: changes["activation"])
def test_the_threshold_is_in_the_file_and_in_the_checkpoint(changes, tmp_path):
    small = killing.config().sae
    sae = sae_config(d_sae=small.d_sae, k=small.k, dead_after=small.dead_after, **changes)
    killing.run(tmp_path / "whole", sae=sae)
    with pytest.raises(KeyboardInterrupt):
        killing.run(tmp_path / "twice", stopping_reader(), sae=sae)
    killing.run(tmp_path / "twice", sae=sae)
    assert killing.bits(tmp_path / "twice") == killing.bits(tmp_path / "whole")
    assert torch.load(tmp_path / "whole" / "sae_final.pt", weights_only=True)[
        "threshold"
    ].shape == (small.d_sae,)


def stopping_reader():
    def spoil(number, rows):
        if number == 13:
            raise KeyboardInterrupt

    return killing.planted(spoil=spoil)


@pytest.mark.parametrize("changes", THRESHOLDED, ids=lambda changes: changes["activation"])
def test_the_threshold_starts_where_the_first_batch_keeps_k(changes):
    reader = killing.planted()
    sae = sae_config(d_sae=48, k=2, **changes)
    trainer = Trainer(killing.config(sae=sae), reader, killing.CPU)
    sae = trainer.state.sae
    x = reader.draw(0, killing.BATCH).float() * trainer.scale
    with torch.no_grad():
        trainer.objective.begin_(sae, x - sae.b_dec)
    kept = sae.encode(x)  # all that is above the smallest of them
    assert len(kept.values) == 2 * killing.BATCH - 1


def test_gated_needs_its_own_settings():
    with pytest.raises(SettingError, match="GatedConfig"):
        find("gated")(SAEConfig(activation="gated"))


def test_every_objective_is_tried():
    assert sorted(changes["activation"] for changes in EVERY) == names()


@pytest.mark.parametrize(
    ("activation", "wrong", "named"),
    [
        ("jumprelu", {"l0_coef": -1.0}, "sae.l0_coef"),
        ("jumprelu", {"bandwidth": 0.0}, "sae.bandwidth"),
        ("matryoshka", {"nested": 0}, "sae.nested"),
        ("matryoshka", {"nested": 20}, "sae.nested"),
        ("hierarchical", {"nested": True}, "sae.nested"),
        ("hierarchical", {"nested": 4}, "sae.k"),
        ("gated", {"l1_coef": -1.0}, "sae.l1_coef"),
        ("gated", {"aux_coef": 0.1}, "sae.aux_coef"),
        ("relu", {}, "sae.activation"),
        ("auxk", {}, "sae.activation"),
    ],
)
def test_settings_of_an_objective_are_refused_by_name(activation, wrong, named):
    def configured():
        config = find(activation).settings(activation=activation, d_sae=64, k=4, **wrong)
        return Trainer(killing.config(sae=config), killing.planted(), killing.CPU)

    with pytest.raises(SettingError, match=named):
        configured()


def test_gated_goes_to_other_libraries_as_thresholds(tmp_path):
    killing.run(tmp_path / "run", sae=sae_config(d_sae=48, k=2, **EVERY[-1]))
    sae = load(tmp_path / "run" / "sae_final.pt")
    about = About("nobody/none", ports_of("sae", [0], ["resid_post"], None), 32, "made up")
    for file, content in saelens.write(sae, about).items():
        (tmp_path / file).write_bytes(content)
    again = saelens.read(tmp_path)
    x = killing.planted().draw(-1, 100).float()
    torch.testing.assert_close(again(x), sae(x))
    assert sae.encode(x).active().sum() > 0


def test_resampled_latents_of_gated_start_anew():
    sae = sae_config(d_sae=48, k=2, dead_after=killing.BATCH, resample=True, **EVERY[-1])
    trainer = Trainer(killing.config(sae=sae), killing.planted(), killing.CPU)
    state = trainer.state
    state.sae.r_mag.fill_(0.5)
    state.sae.b_gate.copy_(torch.arange(48.0))
    latents = torch.tensor([3, 40])
    trainer.objective.restart_(state.sae, state.adam, latents)
    assert state.sae.r_mag[latents].tolist() == [0, 0]
    assert state.sae.b_gate[latents].tolist() == [23.5, 23.5]
    assert float(state.sae.r_mag.sum()) == 0.5 * 46


def test_jumprelu_is_pulled_towards_its_l0():
    """From a threshold far too low and one far too high."""
    reader = Planted(d=16, latents=32, active=3, batch=128, rows=128 * 400)
    sae = SAEConfig(activation="jumprelu", d_sae=32, k=3, dead_after=10_000)
    config = TrainConfig(layer=0, batch=128, sae=sae, optim=OptimConfig(lr=0.01, lr_floor=0.01))
    for factor in (0.3, 1.5):
        trainer, l0 = Trainer(config, reader, killing.CPU), []
        with torch.no_grad():
            for number, batch in zip(range(300), reader.batches(0), strict=False):
                trainer.step_(batch)
                if number == 0:
                    trainer.state.sae.threshold.mul_(factor)
                l0.append(
                    float(
                        trainer.state.sae.encode(batch.float() * trainer.scale)
                        .active()
                        .float()
                        .mean()
                    )
                )
        assert abs(l0[1] - 3) > 1
        assert np.mean(l0[-20:]) == pytest.approx(3, rel=0.1)
