"""SAEBench's core metrics of rows and latents, by its own definitions, in one pass over the store.

They are those of `evals/core/main.py` of sae_bench 0.6.0, which is the same at commit 8042bb3 (May
2026). With e = x - x_hat, batches of B prompts, n_b rows that count in batch b, mean_b a batch's
mean, `mean` alone over all rows:

    explained_variance           1 - r / (s - (s / d)^2)
                                 r, s: the mean over batches of mean_b |e|^2, mean_b |x|^2
    explained_variance_legacy    mean of 1 - |e|^2 / |x - mean_b x|^2
    mse                          mean of |e|^2 / n_b
    cossim                       mean of <x, x_hat> / (|x| |x_hat|)
    l2_norm_in, _out, l2_ratio   mean of |x|, |x_hat|, |x_hat| / |x|
    relative_reconstruction_bias the mean over batches of mean_b |x_hat|^2 / mean_b <x, x_hat>
    l0, l1                       mean of the number of active latents, of their sum
    feature_density              share of rows in which a latent fires
    consistent_activation_...    rows in which it fires / prompts in which it does: rows per prompt
    freq_over_1_percent          share of latents denser than that
    normalized_freq_...          their share of all densities' sum

explained_variance is not what its name says. Its divisor was to be E|x|^2 - |E x|^2. The code
squares x before it takes the mean by dimension, and then takes the mean over dimensions too, so
(E|x|^2 / d)^2 is subtracted: a scalar of other units, which has nothing to do with the mean row.
Where E|x|^2 is far below d^2 the figure is nearly that about zero: too high for rows with a large
mean. Towards d^2 the divisor falls to 0. Beyond d^2 it is negative, and the figure exceeds 1.
SAELens had the same code (issue 659) and mended it (665), and also its mse, which falls with the
size of the batch (711). SAEBench did not. The figures of SAEBench's paper are
explained_variance_legacy (SAEBench issue 76).

Ours are these choices. Rows are held-out ones by the run's policy (SAEBench leaves out BOS, EOS and
padding). A prompt is a packed row of the store, `context` tokens. B is such that a batch has 2,048
tokens, as SAEBench's default of 16 prompts of 128 tokens has: mse is then on the scale of its
published results. Sums are float64.

Shapes: n rows, d d_model, F d_sae, B prompts of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze.latents.encoding import taken
from residual_saes.analyze.latents.nearest import nearest_others, neighbours
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import StopRequest, StoreError
from residual_saes.data.journal import Progress
from residual_saes.data.rows.statistics import Tally
from residual_saes.train import dead
from residual_saes.train.kernels import Kept

DEFINITIONS = "sae_bench 0.6.0 (commit 8042bb3), evals/core"
BATCH_TOKENS = 16 * 128  # SAEBench's defaults: batch_size_prompts and context_size
BLOCK = 1024  # latents whose weights are float64 at a time

Metrics = dict[str, dict[str, float]]  # by category and name


class Sums(NamedTuple):
    """Sums over a batch's rows, (batches,) each; all figures of rows follow from them."""

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


class Latents:
    """In how many rows and prompts each latent fires."""

    def __init__(self, d_sae: int) -> None:
        self.rows = np.zeros(d_sae, np.int64)  # (F,)
        self.prompts = np.zeros(d_sae, np.int64)  # (F,)

    def count(self, kept: Kept, prompt: NDArray[np.int64], prompts: int) -> None:
        """Count a batch.

        Args:
            prompt: (n,) of each row, from 0.
            prompts: B.
        """
        d_sae = len(self.rows)
        device = kept.values.device
        fires = kept.values > 0
        in_prompt = torch.zeros(prompts, d_sae, dtype=torch.bool, device=device)
        of_pair = torch.from_numpy(prompt).to(device)[kept.rows[fires]]
        in_prompt[of_pair, kept.indices[fires]] = True
        self.rows += dead.firings(kept, d_sae).cpu().numpy().astype(np.int64)
        self.prompts += in_prompt.sum(0).cpu().numpy()


class Measured(NamedTuple):
    """What one pass over the held-out rows measures."""

    sums: Sums
    latents: Latents
    error: Floats  # (n,) |e|^2
    about_mean: Floats  # (n,) |x - mu|^2, mu the training rows' mean
    document: NDArray[np.uint32]  # (n,)
    left_out: dict[str, dict[str, float]]  # by the run's policy, see data/rows/statistics.py
    tokens: int  # read, those that do not count too
    prompts: int  # B


# -- the pass --------------------------------------------------------------------------------------


def prompts_of_batch(unit_tokens: int, context: int, batch_tokens: int = BATCH_TOKENS) -> int:
    """B, which divides a unit's prompts: of `batch_tokens` if possible, else fewer, at least 1."""
    return math.gcd(unit_tokens // context, max(1, batch_tokens // context))


@torch.inference_mode()
def measure(subject: Subject, limit: int, batch_tokens: int = BATCH_TOKENS) -> Measured:
    """The sums over `limit` held-out rows, or some more, in whole units.

    Raises:
        StoreError: no row passes the run's policy.
    """
    store = subject.store
    sae = subject.sae
    prompts = prompts_of_batch(store.unit_tokens, store.context, batch_tokens)
    latents = Latents(sae.d_sae)
    sums: list[list[float]] = []
    by_row: list[tuple[NDArray[Any], ...]] = []
    tally = Tally()
    tokens = 0
    progress = Progress()
    with StopRequest() as stop:
        for unit in subject.rows(limit):
            tally.add(unit.kind, np.square(unit.norm, dtype=np.float64))
            # In the order of the text the rows of one prompt lie together.
            rows = unit.text_order(unit.of_kinds(subject.policy.kinds))
            prompt = unit.local[rows] // store.context
            tokens += store.rows_of(unit.number)
            encoded = subject.encoded(unit)
            for first in range(0, store.unit_tokens // store.context, prompts):
                stop.check()
                batch = slice(*np.searchsorted(prompt, [first, first + prompts]))
                if batch.start == batch.stop:
                    continue  # a mean of nothing
                numbers = torch.from_numpy(rows[batch]).to(subject.device)
                kept = taken(encoded, numbers)
                x = unit.rows[numbers].double()
                hat = sae.decode(kept).double()
                sums.append(_sums(x, hat, kept))
                latents.count(kept, prompt[batch] - first, prompts)
                error = (x - hat).square().sum(1).cpu().numpy()
                about_mean = subject.about_mean(x).cpu().numpy()
                by_row.append((error, about_mean, unit.document[rows[batch]]))
                progress.show(f"{tokens:,} tokens read")
    if not by_row:
        raise StoreError(
            f"no held-out row of {store.name} passes the run's policy {subject.policy}"
        )
    error, about_mean, document = map(np.concatenate, zip(*by_row, strict=True))
    return Measured(
        sums=Sums._make(np.array(sums).T),
        latents=latents,
        error=error,
        about_mean=about_mean,
        document=document,
        left_out=tally.left_out(subject.policy),
        tokens=tokens,
        prompts=prompts,
    )


def _sums(x: Tensor, hat: Tensor, kept: Kept) -> list[float]:
    """The fields of `Sums` for one batch of (n, d) float64 rows."""
    error = (x - hat).square().sum(1)
    about_batch = (x - x.mean(0)).square().sum(1)
    squared = x.square().sum(1)
    squared_hat = hat.square().sum(1)
    dot = (x * hat).sum(1)
    norm = squared.sqrt()
    norm_hat = squared_hat.sqrt()
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
    sums = [figure.sum() for figure in by_row]
    l1 = kept.values.double().sum()
    # Device sync: eleven numbers.
    return [len(x), *torch.stack([*sums, l1]).tolist()]


# -- figures ---------------------------------------------------------------------------------------


def divisor(sums: Sums, d_model: int) -> float:
    """What SAEBench's explained_variance divides by."""
    s = float((sums.squared / sums.rows).mean())
    return s - (s / d_model) ** 2


@np.errstate(divide="ignore", invalid="ignore")  # NaN and infinity are written as -1
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


@np.errstate(invalid="ignore")  # 0 / 0: a latent that is silent, or has no direction
def of_latents(
    subject: Subject, latents: Latents, rows: int, block: int = BLOCK
) -> dict[str, Floats]:
    """Figures of every latent, by the names of SAEBench's CoreFeatureMetric; (F,) each.

    Args:
        rows: that count.
        block: latents whose weights are float64 at a time.
    """
    sae = subject.sae
    norm_enc = torch.linalg.vector_norm(sae.W_enc, dim=0)
    norm_dec = torch.linalg.vector_norm(sae.W_dec, dim=1)
    dots = []
    for start in range(0, sae.d_sae, block):
        span = slice(start, start + block)
        dots.append((sae.W_enc[:, span].T.double() * sae.W_dec[span].double()).sum(1))
    columns = {
        "encoder_bias": sae.b_enc,
        "encoder_norm": norm_enc,
        "encoder_decoder_cosine_sim": torch.cat(dots) / (norm_enc.double() * norm_dec.double()),
        "max_decoder_cosine_sim": neighbours(subject)[0][:, 0],
        "max_encoder_cosine_sim": _largest_cosine(sae.W_enc.T),
    }
    figures = {
        "feature_density": latents.rows / rows,
        "consistent_activation_heuristic": latents.rows / latents.prompts,
    }
    for name, column in columns.items():
        figures[name] = column.detach().double().cpu().numpy()
    return figures


def _largest_cosine(directions: Tensor) -> Tensor:
    """(F,) each direction's largest cosine with another one."""
    cosines, _ = nearest_others(directions, 1)
    return cosines[:, 0]


def of_dictionary(latents: Mapping[str, Floats]) -> dict[str, float]:
    """The category misc_metrics, from the figures of every latent."""
    density = latents["feature_density"]
    total = density.sum()
    frequent = {"1": density > 0.01, "10": density > 0.1}
    figures = {}
    for percent, mask in frequent.items():
        figures[f"freq_over_{percent}_percent"] = float(mask.mean())
    for percent, mask in frequent.items():
        share = float(density[mask].sum() / total) if total else 0.0
        figures[f"normalized_freq_over_{percent}_percent"] = share
    return {
        **figures,
        "average_max_encoder_cosine_sim": float(latents["max_encoder_cosine_sim"].mean()),
        "average_max_decoder_cosine_sim": float(latents["max_decoder_cosine_sim"].mean()),
        "frac_alive": float((density > 0).mean()),
    }
