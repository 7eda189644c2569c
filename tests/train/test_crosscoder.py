"""Crosscoders: shared directions and those of one layer are told apart, and each target has its
figures.
"""

import os
import signal

import pytest
import torch
import yaml
from torch.nn.functional import normalize

from residual_saes.data.errors import Interrupted
from residual_saes.train import objective
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import Scales
from residual_saes.train.sae_file import load
from residual_saes.train.trainer import TrainConfig
from tests.train import killing
from tests.train.planted import PlantedLayers, planted_stream
from tests.train.reference import random_sae

AUX = {"aux_coef": 1 / 32, "k_aux": 16, "aux_norm": "variance", "resample": True}
LAYERS = {"layer": (21, 27)}


def sae_config(activation="batchtopk", **settings):
    given = {**AUX, "kind": "crosscoder", **settings}
    return objective.find(activation).settings(activation=activation, **given)


def trained(folder, k, **planted):
    """(reader, held-out record, decoder in scaled space, how often each latent fires)."""
    reader = PlantedLayers(batch=256, rows=256 * 150, **planted)
    sae = sae_config(d_sae=48, k=k, dead_after=2000)
    rates = OptimConfig(lr=0.02, lr_floor=0.002)
    config = TrainConfig(batch=256, sae=sae, optim=rates, log_every=100, **LAYERS)
    final = train(Arm(config, planted_stream(reader), folder), killing.CPU)
    found = load(folder / "sae_final.pt")
    scales = yaml.safe_load((folder / "config.yaml").read_text())["scales"]
    by_column = torch.tensor(list(scales.values())).repeat_interleave(24)
    kept = found.encode(reader.draw(-9, 4096))
    fired = torch.zeros(48).index_add(0, kept.indices, torch.ones_like(kept.values))
    return reader, final, by_column, found.W_dec * by_column, fired / 4096


def second_share(decoder):
    """(F,) the second layer's part of each latent's decoder norms."""
    norms = decoder.unflatten(1, (2, -1)).norm(dim=2)
    return norms[:, 1] / norms.sum(1)


def test_tells_shared_directions_from_one_layers_own(tmp_path):
    """Though rows of the second layer are five times as long."""
    reader, final, scales, decoder, _ = trained(tmp_path, 3)
    cosines = normalize(reader.directions * scales, dim=1) @ normalize(decoder, dim=1).T
    assert float((cosines.amax(1) > 0.9).float().mean()) >= 0.95
    share = second_share(decoder)[cosines.argmax(1)]
    kinds = torch.where(share < 0.2, 1, torch.where(share > 0.8, 2, 0))
    assert float((kinds == reader.kinds).float().mean()) >= 0.95
    assert final["targets"].keys() == {"21", "27"}
    assert all(figures["variance_explained"] > 0.9 for figures in final["targets"].values())


def test_shares_nothing_where_rows_are_of_different_tokens(tmp_path):
    _, final, _, decoder, fires = trained(tmp_path, 4, apart=True)
    share = second_share(decoder)[fires > 0.005]
    assert len(share) >= 24
    assert float(((share > 0.2) & (share < 0.8)).float().mean()) < 0.05
    assert final["variance_explained"] > 0.9


# -- what is recorded and written ------------------------------------------------------------------


def small(**changes):
    settings = {"d_sae": 48, "k": 2, "k_aux": 8, "dead_after": killing.BATCH}
    return {**LAYERS, "sae": sae_config(**{**settings, **changes})}


def reader(**changes):
    return PlantedLayers(**{"d": 8, "latents": 12, "rows": 1000, "batch": killing.BATCH, **changes})


SETTINGS = {
    "batchtopk": {},
    "rows": {"init": "rows"},
    "rotated": {"rotate": True, "init": "rows"},
    "kaiming": {"init": "kaiming"},
    "topk": {"activation": "topk"},
    "matryoshka": {"activation": "matryoshka", "nested": 3},
    "hierarchical": {"activation": "hierarchical", "nested": 2},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated", "aux_coef": 0.0},
    "raw": {"scale_rows": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_file_does_on_raw_rows_what_the_record_says(name, tmp_path):
    drawn = reader()
    final = killing.run(tmp_path, drawn, **small(**SETTINGS[name]))
    found = load(tmp_path / "sae_final.pt")
    rows = torch.cat([drawn.draw(-1 - i, 256) for i in range(4)]).double()
    errors = (rows - found(rows.float()).double()).split(8, 1)
    about = (rows - torch.from_numpy(drawn.mean)).split(8, 1)
    scales = yaml.safe_load((tmp_path / "config.yaml").read_text())["scales"]
    assert scales.keys() == {"21", "27"} == final["targets"].keys()
    error = square = 0
    for figures, scale, e, own in zip(
        final["targets"].values(), scales.values(), errors, about, strict=True
    ):
        ratio = float(e.square().sum() / own.square().sum())
        assert figures["variance_explained"] == pytest.approx(1 - ratio, abs=1e-4)
        assert figures["mse"] == pytest.approx(float(e.square().mean()), rel=1e-3)
        error += scale**2 * float(e.square().sum())
        square += scale**2 * float(own.square().sum())
    assert final["variance_explained"] == pytest.approx(1 - error / square, abs=1e-4)
    # Its rows have norm 1 where each target's columns are multiplied by its scale / g.
    g = torch.tensor(list(scales.values())).log().mean().exp()
    by_column = torch.tensor(list(scales.values())).repeat_interleave(8)
    torch.testing.assert_close((found.W_dec * by_column / g).norm(dim=1), torch.ones(48))


def test_every_activation_is_tried():
    assert {SETTINGS[name].get("activation", "batchtopk") for name in SETTINGS} == {
        *objective.names()
    }


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_fold_changes_no_output(threshold):
    sae = random_sae(12, 64, 4, threshold=threshold)
    x = torch.randn(50, 12, dtype=torch.float64)
    scales = torch.tensor([0.3] * 5 + [4.0] * 7, dtype=torch.float64)
    wanted = sae(x * scales) / scales
    folded = sae.folded(Scales(scales, scales))
    torch.testing.assert_close(folded(x), wanted, rtol=1e-12, atol=1e-12)
    kept, raw = sae.encode(x * scales), folded.encode(x)
    assert torch.equal(kept.indices, raw.indices)
    torch.testing.assert_close(raw.values * float(scales.log().mean().exp()), kept.values)
    back = folded.folded(Scales(1 / scales, 1 / scales))
    for name, tensor in sae.tensors().items():
        torch.testing.assert_close(back.tensors()[name], tensor, msg=name)


@pytest.mark.parametrize("name", ["batchtopk", "rotated"])
def test_a_signal_costs_no_bit(name, tmp_path):
    def spoil(number, rows):
        if number == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    changes = small(**SETTINGS[name])
    killing.run(tmp_path / "whole", reader(), **changes)
    with pytest.raises(Interrupted):
        killing.run(tmp_path / "twice", reader(spoil=spoil), **changes)
    killing.run(tmp_path / "twice", reader(), **changes)
    assert killing.bits(tmp_path / "twice") == killing.bits(tmp_path / "whole")


def test_the_run_records_what_it_reads(tmp_path):
    killing.run(tmp_path, reader(), **small())
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())["settings"]
    assert settings["layer"] == [21, 27]
    assert settings["sae"]["kind"] == "crosscoder"
    assert "site" not in settings
    killing.run(tmp_path, reader(), **small())  # the same settings go on
