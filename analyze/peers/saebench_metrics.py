"""SAEBench's core metrics of rows and latents, by its own definitions, from one pass over stored
rows.

They are those of `evals/core/main.py` of sae_bench 0.6.0, which is the same at commit 8042bb3 (May
2026). With e = x - x_hat, batches of B prompts, n_b rows that count in batch b, mean_b a batch's
mean, `mean` alone over all rows:

    explained_variance           1 - r / (s - (s / d)^2)   r, s: the mean over batches of mean_b |e|^2, mean_b |x|^2
    explained_variance_legacy    mean of 1 - |e|^2 / |x - mean_b x|^2
    mse                          mean of |e|^2 / n_b
    cossim                       mean of <x, x_hat> / (|x| |x_hat|)
    l2_norm_in, _out, l2_ratio   mean of |x|, |x_hat|, |x_hat| / |x|
    relative_reconstruction_bias the mean over batches of mean_b |x_hat|^2 / mean_b <x, x_hat>
    l0, l1                       mean of the number of active latents, of their sum
    feature_density              share of rows in which a latent fires
    consistent_activation_...    rows in which it fires / prompts in which it does: rows per prompt
    freq_over_1_percent          share of latents denser than that; normalized: their share of all densities' sum

explained_variance is not what it is called. Its divisor was to be E|x|^2 - |E x|^2. But the code
squares x before it takes the mean by dimension, and then the mean over dimensions too, so (E|x|^2 /
d)^2 is taken off: a scalar of other units, that has nothing to do with the mean row. Where E|x|^2
is far below d^2 the figure is nearly that about zero, too high for rows with a large mean; towards
d^2 the divisor falls to 0, and beyond it is negative: the figure exceeds 1. SAELens had the same
code (issue 659) and mended it (665), and so its mse, which falls with the size of the batch (711);
SAEBench did not. The figures of SAEBench's paper are explained_variance_legacy (SAEBench issue 76).

What is ours: rows are held-out ones by the run's policy (SAEBench leaves out BOS, EOS and padding).
A prompt is a packed row of the store, `context` tokens. B is such that a batch has 2,048 tokens, as
SAEBench's default of 16 prompts of 128 tokens has: mse is then on the scale of its published
results. Sums are float64.

Shapes: n rows, d d_model, F d_sae, B prompts of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyze.directions import nearest
from analyze.stats import Floats
from analyze.subject import Subject
from data.errors import StopRequest, StoreError
from data.journal import Progress
from train import dead
from train.kernels import Kept
from train.sae import SAE

DEFINITIONS = "sae_bench 0.6.0 (commit 8042bb3), evals/core"
BATCH_TOKENS = 16 * 128  # SAEBench's defaults: batch_size_prompts and context_size
_LATENTS = 1024  # whose weights are float64 at a time

Metrics = dict[str, dict[str, float]]  # by category and name


class Sums(NamedTuple):
    """Sums over a batch's rows; (batches,) each, all scalar figures follow from them."""

    rows: Floats
    squared_error: Floats
    squared: Floats
    squared_hat: Floats
    dot: Floats  # <x, x_hat>
    norm: Floats
    norm_hat: Floats
    ratio: Floats  # |x_hat| / |x|
    cosine: Floats
    legacy: Floats  # 1 - |e|^2 / |x - mean_b x|^2
    l0: Floats
    l1: Floats


@dataclass
class Latents:
    """What is counted of each latent."""

    rows: NDArray[np.int64]  # (F,) in which it fires
    prompts: NDArray[np.int64]  # (F,) in which it fires


class Measured(NamedTuple):
    """What one pass over the held-out rows found."""

    sums: Sums
    latents: Latents
    error: Floats  # (n,) |e|^2
    about_mean: Floats  # (n,) |x - mu|^2, mu the training rows' mean
    document: NDArray[np.uint32]  # (n,)
    tokens: int  # read, those that do not count too
    prompts: int  # B


# -- the pass --------------------------------------------------------------------------------------


def prompts_of_batch(unit_tokens: int, context: int) -> int:
    """B, by which a unit's prompts are divided: of BATCH_TOKENS if that is possible, else fewer, at
    least one.
    """
    return math.gcd(unit_tokens // context, max(1, BATCH_TOKENS // context))


@torch.inference_mode()
def measure(subject: Subject, limit: int) -> Measured:
    """The sums over `limit` held-out rows, or some more, in whole units.

    Raises:
        StoreError: no row passes the run's policy.
    """
    store, sae = subject.store, subject.sae
    prompts, progress = prompts_of_batch(store.unit_tokens, store.context), Progress()
    latents = Latents(*(np.zeros(sae.d_sae, np.int64) for _ in range(2)))
    sums, parts, tokens = list[list[float]](), list[tuple[NDArray[Any], ...]](), 0
    with StopRequest() as stop:
        for unit in subject.rows(limit):
            # In the order of the text the rows of one prompt lie together.
            rows = unit.text_order(unit.of_kinds(subject.policy.kinds))
            prompt = unit.local[rows] // store.context
            tokens += store.rows_of(unit.number)
            for first in range(0, store.unit_tokens // store.context, prompts):
                stop.check()
                of = slice(*np.searchsorted(prompt, [first, first + prompts]))
                if of.start == of.stop:
                    continue  # a mean of nothing
                raw = unit.rows[torch.from_numpy(rows[of]).to(subject.device)]
                kept, x = sae.encode(raw), raw.double()
                hat = sae.decode(kept).double()
                sums.append(_sums(x, hat, kept))
                _count(latents, kept, prompt[of] - first, prompts)
                figures = ((x - hat).square().sum(1), subject.about_mean(x))
                parts.append(
                    (*(figure.cpu().numpy() for figure in figures), unit.document[rows[of]])
                )
            progress.show(f"{tokens:,} tokens read")
    if not parts:
        raise StoreError(
            f"no held-out row of {store.name} passes the run's policy {subject.policy}"
        )
    error, about_mean, document = map(np.concatenate, zip(*parts, strict=True))
    return Measured(
        Sums._make(np.array(sums).T), latents, error, about_mean, document, tokens, prompts
    )


def _sums(x: Tensor, hat: Tensor, kept: Kept) -> list[float]:
    """The fields of `Sums` for one batch of (n, d) float64 rows."""
    error, about_batch = (x - hat).square().sum(1), (x - x.mean(0)).square().sum(1)
    squared, squared_hat, dot = x.square().sum(1), hat.square().sum(1), (x * hat).sum(1)
    norm, norm_hat = squared.sqrt(), squared_hat.sqrt()
    by_row = (
        error,
        squared,
        squared_hat,
        dot,
        norm,
        norm_hat,
        norm_hat / torch.where(norm < 1e-4, 1.0, norm),
        dot / (norm * norm_hat),
        1 - error / about_batch,
        kept.active().double(),
    )
    # Device sync: eleven numbers.
    return [
        len(x),
        *torch.stack([*(row.sum() for row in by_row), kept.values.double().sum()]).tolist(),
    ]


def _count(latents: Latents, kept: Kept, prompt: NDArray[np.int64], prompts: int) -> None:
    """Count a batch's rows, and its prompts, in which latents fire.

    Args:
        prompt: (n,) of each row, from 0.
        prompts: B.
    """
    d_sae, fires = len(latents.rows), kept.values > 0
    there = torch.zeros(prompts, d_sae, dtype=torch.bool, device=kept.values.device)
    there[torch.from_numpy(prompt).to(there.device)[kept.rows[fires]], kept.indices[fires]] = True
    latents.rows += dead.firings(kept, d_sae).cpu().numpy().astype(np.int64)
    latents.prompts += there.sum(0).cpu().numpy()


# -- figures ---------------------------------------------------------------------------------------


def divisor(sums: Sums, d_model: int) -> float:
    """What SAEBench's explained_variance divides by."""
    s = float((sums.squared / sums.rows).mean())
    return s - (s / d_model) ** 2


@np.errstate(divide="ignore", invalid="ignore")  # what is no number is written as such
def of_rows(sums: Sums, d_model: int) -> Metrics:
    """The categories that are about rows."""
    total = sums.rows.sum()

    def mean(summed: Floats) -> float:
        return float(summed.sum() / total)

    residual = (sums.squared_error / sums.rows).mean()
    return {
        "reconstruction_quality": {
            "explained_variance": float(1 - residual / np.float64(divisor(sums, d_model))),
            "explained_variance_legacy": mean(sums.legacy),
            "mse": mean(sums.squared_error / sums.rows),
            "cossim": mean(sums.cosine),
        },
        "shrinkage": {
            "l2_norm_in": mean(sums.norm),
            "l2_norm_out": mean(sums.norm_hat),
            "l2_ratio": mean(sums.ratio),
            "relative_reconstruction_bias": float((sums.squared_hat / sums.dot).mean()),
        },
        "sparsity": {"l0": mean(sums.l0), "l1": mean(sums.l1)},
    }


@np.errstate(invalid="ignore")  # 0 / 0: latents that are silent, or have no direction
def of_latents(sae: SAE, latents: Latents, rows: int) -> dict[str, Floats]:
    """What is said of every latent, by the names of SAEBench's CoreFeatureMetric; (F,) each.

    Args:
        rows: that count.
    """
    norms = [torch.linalg.vector_norm(sae.W_enc, dim=0), torch.linalg.vector_norm(sae.W_dec, dim=1)]
    blocks = [slice(at, at + _LATENTS) for at in range(0, sae.d_sae, _LATENTS)]
    dots = torch.cat(
        [(sae.W_enc[:, of].T.double() * sae.W_dec[of].double()).sum(1) for of in blocks]
    )
    largest = [nearest(one, one, 1, itself=False)[0][:, 0] for one in (sae.W_dec, sae.W_enc.T)]
    found = {
        "encoder_bias": sae.b_enc,
        "encoder_norm": norms[0],
        "encoder_decoder_cosine_sim": dots / (norms[0].double() * norms[1].double()),
        "max_decoder_cosine_sim": largest[0],
        "max_encoder_cosine_sim": largest[1],
    }
    return {
        "feature_density": latents.rows / rows,
        "consistent_activation_heuristic": latents.rows / latents.prompts,
        **{name: column.detach().double().cpu().numpy() for name, column in found.items()},
    }


def of_dictionary(found: Mapping[str, Floats]) -> dict[str, float]:
    """The category misc_metrics, from what is said of every latent."""
    density = found["feature_density"]
    total = density.sum()
    dense = {name: density > share for name, share in (("1", 0.01), ("10", 0.1))}
    return {
        **{f"freq_over_{name}_percent": float(mask.mean()) for name, mask in dense.items()},
        **{
            f"normalized_freq_over_{name}_percent": float(density[mask].sum() / total)
            if total
            else 0.0
            for name, mask in dense.items()
        },
        "average_max_encoder_cosine_sim": float(found["max_encoder_cosine_sim"].mean()),
        "average_max_decoder_cosine_sim": float(found["max_decoder_cosine_sim"].mean()),
        "frac_alive": float((density > 0).mean()),
    }
