"""Dictionaries that nobody trained: worthless ones, the truth itself, and another way to encode.

Shapes: n rows, N features, F latents, d = d_model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from residual_saes.analyze.studies.synth.planted import CHOICE, TRAIN, World
from residual_saes.analyze.studies.synth.scores import Code
from residual_saes.train.sae import SAE, SAEConfig, initial
from residual_saes.train.stream import Stream
from residual_saes.train.trainer import TrainConfig, Trainer

Encoder = Callable[[Tensor], Code]
ORACLE, RANDOM, UNTRAINED, PCA = "oracle", "random directions", "untrained", "principal axes"
_ROWS = 32_768  # from which the oracle is made
_BEYOND = 2**40  # number of a batch that no training reaches


def of_sae(sae: SAE) -> Encoder:
    """What an SAE makes of rows."""

    def encode(x: Tensor) -> Code:
        kept = sae.encode(x)
        f = torch.zeros(len(x), sae.d_sae)
        f[kept.rows, kept.indices] = kept.values.clamp_min(0)
        return Code(f, sae.W_dec, sae.b_dec)

    return encode


def pursuit(sae: SAE) -> Encoder:
    """Matching pursuit on an SAE's decoder: k times the latent that the rest projects on most.

    Mallat and Zhang (1993), with positive amounts. The encoder is not used.
    """

    def encode(x: Tensor) -> Code:
        rest = x - sae.b_dec
        f = torch.zeros(len(x), sae.d_sae)
        every = torch.arange(len(x))
        for _ in range(sae.k):
            amount, latent = (rest @ sae.W_dec.T).max(1)
            amount = amount.clamp_min(0)
            f[every, latent] += amount
            rest = rest - amount[:, None] * sae.W_dec[latent]
        return Code(f, sae.W_dec, sae.b_dec)

    return encode


def baselines(world: World, stream: Stream, config: TrainConfig) -> dict[str, Encoder]:
    """By name, each with config's k and d_sae.

    Args:
        config: of an arm with TopK.
    """
    mean = torch.from_numpy(stream.reader.mean).float()
    shape = SAEConfig(d_sae=config.sae.d_sae, k=config.sae.k, k_aux=config.sae.k_aux)
    return {
        ORACLE: oracle(world, config.sae.d_sae),
        UNTRAINED: of_sae(untrained(stream, config)),
        RANDOM: of_sae(initial(shape, mean, config.seed)),
        PCA: of_sae(principal(world, mean, config.sae.k)),
    }


def untrained(stream: Stream, config: TrainConfig) -> SAE:
    """The arm's SAE before its first step, on raw rows."""
    trainer = Trainer(config, stream.reader, torch.device("cpu"))
    trainer.begin_(stream.first(trainer.rows_to_begin))
    return trainer.state.sae.folded(trainer.columns.folding(), trainer.state.basis)


def principal(world: World, mean: Tensor, k: int) -> SAE:
    """Both directions of every principal axis of the rows."""
    x = world.draw(CHOICE, 0, 16 * world.d_model).x - mean
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.T.contiguous()
    both = torch.cat([axes, -axes])
    return SAE(both, both.clone(), torch.zeros(len(both)), mean, min(k, len(both)))


def oracle(world: World, d_sae: int) -> Encoder:
    """The true directions of the most frequent features, read as well as a latent can read them.

    A latent reads the linear estimate of its feature's amount of least squared error, and is active
    above the threshold of the largest F1. Both come from rows that are used for nothing else.
    """
    features = np.sort(np.argsort(-world.frequency, kind="stable")[:d_sae])
    batch = world.draw(TRAIN, _BEYOND, _ROWS)
    amounts = batch.amounts[:, features].double()
    mean, mean_amount = batch.x.double().mean(0), amounts.mean(0)
    x = batch.x.double() - mean
    # By the pseudo-inverse: without noise rows may lie in fewer dimensions.
    reads = torch.linalg.pinv(x.T @ x, hermitian=True) @ (x.T @ (amounts - mean_amount))
    value = x @ reads + mean_amount
    threshold = best_thresholds(value, amounts > 0)
    kept = torch.where(value > threshold, value, 0)
    gain = (kept * amounts).sum(0) / kept.square().sum(0).clamp_min(1e-9)

    def encode(x: Tensor) -> Code:
        value = (x.double() - mean) @ reads + mean_amount
        f = torch.where(value > threshold, value * gain, 0).clamp_min(0).float()
        return Code(f, world.directions[features], world.offset)

    return encode


def best_thresholds(value: Tensor, fires: Tensor) -> Tensor:
    """(N,) for each column of (n, N) the threshold at least 0 above which F1 is largest."""
    ordered, order = value.sort(dim=0, descending=True)
    right = fires.gather(0, order).double().cumsum(0)
    said = torch.arange(1, len(value) + 1).double()[:, None]
    f1 = 2 * right / (said + fires.sum(0))
    best = f1.argmax(0, keepdim=True)
    below = (best + 1).clamp_max(len(value) - 1)
    middle = (ordered.gather(0, best) + ordered.gather(0, below)) / 2
    return middle[0].clamp_min(0)
