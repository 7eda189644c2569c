"""`sae=topk_32k optim=adam` against the step of the reference's script, written plainly.

Source: caiovicentino/mechreward scripts/train_sae_qwen35.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from residual_saes.data.settings import build
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import SAEConfig, initial
from residual_saes.train.stream import first_rows
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.train.killing import CPU
from tests.train.planted import Planted

D, D_SAE, K, K_AUX, BATCH, STEPS, TOTAL = 16, 64, 4, 8, 64, 20, 60
DEAD_STEPS, WARM_UP, LR, FLOOR = 3, 5, 2e-3, 6e-4
SILENT = 12  # latents whose pre-activations are far below 0
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def recipe(group: str, kind: type, **changes: object):
    """The configuration of `sae=topk_32k`, but for `changes`."""
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        settings = dict(compose("train", ["sae=topk_32k"])[group])
    settings.pop("name", None)
    return replace(build(kind, group, settings), **changes)


def config() -> TrainConfig:
    """The recipe in small."""
    sae = recipe("sae", SAEConfig, d_sae=D_SAE, k=K, k_aux=K_AUX, dead_after=DEAD_STEPS * BATCH)
    optim = recipe("optim", OptimConfig, lr=LR, lr_floor=FLOOR, warmup_steps=WARM_UP)
    return TrainConfig(
        layer=0, batch=BATCH, tokens=TOTAL * BATCH, log_every=1, sae=sae, optim=optim
    )


class Plain:
    """The script's step on parameters of its own: dense products, autograd, torch's optimizer."""

    def __init__(self, tensors: dict[str, Tensor], sample: Tensor) -> None:
        """Begin with these weights and the geometric median of `sample` as b_dec."""
        self.p = {name: tensors[name].clone().requires_grad_() for name in NAMES}
        centre = sample.median(dim=0).values
        for _ in range(5):
            nearness = 1 / (sample - centre).norm(dim=1).clamp_min(1e-8)
            centre = (nearness @ sample) / nearness.sum()
        self.p["b_dec"].data = centre
        self.adam = torch.optim.Adam([self.p[name] for name in NAMES], lr=LR)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, self.share_of_rate)
        self.last = torch.zeros(D_SAE)
        self.step = 0
        self.norms: list[float] = []  # of the gradients, before they are clipped
        self.below = 0  # activations below 0 in AuxK

    @staticmethod
    def share_of_rate(step: int) -> float:
        if step < WARM_UP:
            return step / WARM_UP
        done = torch.tensor((step - WARM_UP) / (TOTAL - WARM_UP))
        return FLOOR / LR + (1 - FLOOR / LR) * 0.5 * (1 + float(torch.cos(torch.pi * done)))

    def step_(self, x: Tensor) -> None:
        p = self.p
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        values, indices = pre.topk(K)
        f = torch.zeros_like(pre).scatter(1, indices, values).relu()
        x_hat = f @ p["W_dec"] + p["b_dec"]
        self.last[(f > 0).any(0)] = self.step
        dead = self.step - self.last > DEAD_STEPS
        loss = mse_loss(x_hat, x)
        if dead.any():
            hidden = pre.masked_fill(~dead, torch.finfo(pre.dtype).min)
            values, indices = hidden.topk(min(K_AUX, int(dead.sum())))
            self.below += int((values < 0).sum())
            e_hat = torch.zeros_like(pre).scatter(1, indices, values) @ p["W_dec"]
            loss = loss + 0.125 * mse_loss(e_hat, (x - x_hat).detach())
        self.adam.zero_grad()
        loss.backward()
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(p.values(), 1.0)))
        self.adam.step()
        self.schedule.step()
        if self.step % 10 == 0:
            p["W_dec"].data = normalize(p["W_dec"].data, dim=1)
        self.step += 1


def test_weights_equal_the_scripts_after_20_steps():
    reader = Planted(d=D, latents=32, batch=BATCH)
    with torch.no_grad():
        trainer = Trainer(config(), reader, CPU)
        first = first_rows(reader, trainer.rows_to_begin)
        plain = Plain(trainer.state.sae.tensors(), first.float())
        trainer.begin_(first)
        trainer.state.sae.b_enc[:SILENT] = plain.p["b_enc"].data[:SILENT] = -3.0
    aux = 0.0
    for number in range(STEPS):
        batch = reader.draw(number, BATCH) * (1 + 3 * (number % 2))  # every other one is clipped
        with torch.no_grad():
            aux += trainer.step_(batch)["aux_loss"]
        plain.step_(batch.float())
        for name, tensor in trainer.state.sae.tensors().items():
            torch.testing.assert_close(tensor, plain.p[name].data, rtol=0, atol=1e-5)
    assert aux > 0 and plain.below > 0
    assert max(plain.norms) > 1 > min(plain.norms)


def test_the_encoder_begins_short_and_the_decoder_with_its_directions():
    sae = initial(recipe("sae", SAEConfig, d_sae=4096), torch.zeros(2560), seed=0)
    norms = sae.W_enc.norm(dim=0)
    assert float(norms.mean()) == pytest.approx(math.sqrt(2560 / (3 * 4096)), rel=1e-3)
    assert float(sae.W_enc.abs().max()) == pytest.approx(1 / 64, rel=1e-4)
    torch.testing.assert_close(sae.W_dec, normalize(sae.encoder, dim=1))


@pytest.mark.parametrize(
    ("kind", "later"),
    [(SAEConfig, {"scale_rows": False, "bound_dead": True}), (OptimConfig, {"eps": 1e-8})],
)
def test_settings_that_came_later_are_recorded_only_where_they_differ(kind, later):
    """So that a run of before them is the same run, and goes on."""
    assert {name: getattr(kind(), name) for name in kind.LATER} == kind.LATER
    old, new = kind().recorded(), replace(kind(), **later).recorded()
    assert not later.keys() & old.keys()
    assert new == {**old, **later}


def test_every_dictionary_brings_its_optimizer():
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        chosen = {
            name: compose("train", [f"sae={name}"]).optim.first_step
            for name in ("topk_32k", "scaled_32k", "batchtopk_32k", "rows_32k", "tiny_transcoder")
        }
        named = compose("train", ["sae=batchtopk_32k", "optim=adam"]).optim.first_step
    assert chosen.pop("topk_32k") == 0 and set(chosen.values()) == {1} and named == 0
