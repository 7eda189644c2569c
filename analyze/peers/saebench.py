"""SAEBench's "core" results of a run, in the file that SAEBench's own plots read.

Rows come from the store, in one pass. Every field follows SAEBench's own definition
(saebench_metrics.py), so it compares with other results. `eval_result_unstructured` holds the
figure to quote: the variance explained centred per dimension, with its interval.

Only the benchmark `core` is filled. TPP and SCR, which see what ablated latents do to classifiers,
are not computed: "Are SAE benchmarks reliable?" (arXiv 2605.18229) finds that they should not be
used. What sparse probing asks is study=probes.

CE and KL are study=splice's at all positions, if that was done: of every token behind a BOS in its
own document. SAEBench also lets the documents of a prompt see each other, and leaves out what BOS
itself predicts. As in SAEBench, -1 is a figure that was not computed or is NaN.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from residual_saes.analyze import refusals
from residual_saes.analyze.losses import ALL, CLEAN
from residual_saes.analyze.memory import Needed, of_pass, of_sae
from residual_saes.analyze.outcome import Outcome, Table, dumped
from residual_saes.analyze.peers import saebench_metrics
from residual_saes.analyze.peers.saebench_metrics import DEFINITIONS, Measured, Metrics
from residual_saes.analyze.results import current, made
from residual_saes.analyze.stats import Floats, figure, formatted, resampled, variance_explained
from residual_saes.analyze.study import Definition, Study, at_least
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.rows.split import Policy
from residual_saes.data.rows.statistics import told
from residual_saes.data.settings import build
from residual_saes.train.export import saelens
from residual_saes.train.export.format import About, about

FOLDER = "core"  # SAEBench's plots read the kind of a result from its path
SUFFIX = "_eval_results.json"  # by which the plots find it
SAE_ID = "custom_sae"  # SAEBench's name for an SAE that is in no release of SAELens
NOT_COMPUTED = -1.0
_DIGITS = 10  # of the latents' figures; SAEBench's DEFAULT_FLOAT_PRECISION


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/saebench.yaml."""

    rows: int = 4_000_000  # held-out rows at most, in whole units

    def __post_init__(self) -> None:
        at_least("study.rows", self.rows, 1)


class Spliced(NamedTuple):
    """The figures of study=splice at all positions."""

    tokens: int  # replaced
    clean: Mapping[str, Any]
    sae: Mapping[str, Any]
    zero: Mapping[str, Any]


# -- of the language model -------------------------------------------------------------------------


def spliced(subject: Subject) -> Spliced | None:
    """What study=splice found of the run's present SAE; None if it was not done."""
    result = current(subject.run, subject.digest, "splice").get("splice")
    if result is None:
        return None
    figures = result.outcome.figures
    rows = {(row["name"], row["where"]): row for row in figures["rows"]}
    return Spliced(
        tokens=figures["replaced"][ALL],
        clean=rows[CLEAN, ""],
        sae=rows["sae", ALL],
        zero=rows["zero", ALL],
    )


@np.errstate(divide="ignore", invalid="ignore")
def of_model(losses: Spliced | None) -> Metrics:
    """The two categories that are about the language model."""

    def value(name: str, kind: str) -> np.float64:
        return np.float64(getattr(losses, name)[kind]["value"] if losses else np.nan)

    kl_sae = value("sae", "kl")
    kl_zero = value("zero", "kl")
    clean = value("clean", "ce")
    sae = value("sae", "ce")
    zero = value("zero", "ce")
    return {
        "model_behavior_preservation": {
            "kl_div_score": float((kl_zero - kl_sae) / kl_zero),
            "kl_div_with_ablation": float(kl_zero),
            "kl_div_with_sae": float(kl_sae),
        },
        "model_performance_preservation": {
            "ce_loss_score": float((zero - sae) / (zero - clean)),
            "ce_loss_with_ablation": float(zero),
            "ce_loss_with_sae": float(sae),
            "ce_loss_without_sae": float(clean),
        },
    }


# -- the file --------------------------------------------------------------------------------------


def _finite(value: float) -> float:
    """NaN as SAEBench writes it. SAEBench leaves infinity, which no JSON has."""
    return value if math.isfinite(value) else NOT_COMPUTED


def _details(latents: Mapping[str, Floats]) -> list[dict[str, float]]:
    """A dict per latent."""
    columns = {}
    for name, column in latents.items():
        columns[name] = [round(_finite(value), _DIGITS) for value in column.tolist()]
    details = []
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        details.append({"index": index, **dict(zip(columns, row, strict=True))})
    return details


def _sae_config(subject: Subject, known: About) -> dict[str, Any]:
    """SAELens' configuration; SAEBench's plots read architecture, d_sae and training_tokens."""
    config = saelens.config_of(subject.sae, known)
    tokens = subject.config["settings"].get("tokens")
    if tokens is not None:
        config["training_tokens"] = tokens
    return config


def _eval_config(
    subject: Subject, known: About, measured: Measured, losses: Spliced | None
) -> dict[str, Any]:
    """SAEBench's CoreEvalConfig, with what was done here."""
    context = subject.store.context
    batch_tokens = measured.prompts * context
    return {
        "model_name": known.model,
        "llm_dtype": str(subject.store.manifest["model"]["dtype"]),
        "batch_size_prompts": measured.prompts,
        "n_eval_reconstruction_batches": -(-losses.tokens // batch_tokens) if losses else 0,
        "n_eval_sparsity_variance_batches": len(measured.sums.rows),
        "dataset": known.text,
        "context_size": context,
        "compute_kl": losses is not None,
        "compute_ce_loss": losses is not None,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": False,
        "verbose": False,
    }


def _unstructured(subject: Subject, measured: Measured, losses: Spliced | None) -> dict[str, Any]:
    """What SAEBench has no field for, with the definitions' names."""
    definitions = {
        "eval_result_metrics": DEFINITIONS,
        "explained_variance": "1 - r / (s - (s / d)^2), r = E|x - x_hat|^2, s = E|x|^2: "
        "not centred",
        "explained_variance_legacy": "mean over rows of ratios, about the mean of each batch",
        "mse": "E|x - x_hat|^2 divided by the rows of a batch; see mse_per_element",
        "variance_explained_centred": "1 - sum |x - x_hat|^2 / sum |x - mu|^2, "
        "mu the training rows' mean; 95% interval over documents",
        "losses": "study=splice at all positions, tokens behind a BOS in their own document; "
        "95% intervals over documents",
    }
    value, interval = variance_explained(measured.document, measured.error, measured.about_mean)
    by_name = losses and {"sae": losses.sae, "zero": losses.zero, "clean": losses.clean}
    d_model = subject.sae.d_model
    return {
        "definitions": definitions,
        "variance_explained_centred": figure(value, interval),
        "variance": float(measured.about_mean.mean()),
        "explained_variance_divisor": saebench_metrics.divisor(measured.sums, d_model),
        "mse_per_element": float(measured.error.mean() / d_model),
        "rows": len(measured.error),
        "documents": len(np.unique(measured.document)),
        "policy": subject.policy.recorded(),
        "left_out": measured.left_out,
        "losses": by_name,
    }


def file_of(subject: Subject) -> Path:
    """The results file below the study's folder, named as SAEBench names a run's SAE."""
    return Path(FOLDER, f"{subject.run.resolve().name}_{SAE_ID}{SUFFIX}")


# -- the study -------------------------------------------------------------------------------------


def inputs(study: Study) -> Mapping[str, Any]:
    """What the file depends on beside the settings."""
    subject = study.subject
    losses = current(subject.run, subject.digest, "splice").get("splice")
    return {
        "splice": losses.digests.files["splice.json"].xxh3_128 if losses else None,
        "definitions": DEFINITIONS,
        "release": study.subject.run.resolve().name,
    }


def saebench(
    study: Study,
    batch_tokens: int = saebench_metrics.BATCH_TOKENS,
    block: int = saebench_metrics.BLOCK,
) -> Outcome:
    """Write the results file.

    Args:
        batch_tokens: of a batch.
        block: latents whose weights are float64 at a time.

    Raises:
        StoreError: no held-out row passes the run's policy.
    """
    options = build(Options, "study", study.options)
    subject = study.subject
    losses = spliced(subject)
    measured = saebench_metrics.measure(subject, options.rows, batch_tokens)
    rows = len(measured.error)
    latents = saebench_metrics.of_latents(subject, measured.latents, rows, block)
    exact: Metrics = {
        **of_model(losses),
        **saebench_metrics.of_rows(measured.sums, subject.sae.d_model),
        "token_stats": {
            "total_tokens_eval_reconstruction": losses.tokens if losses else 0,
            "total_tokens_eval_sparsity_variance": measured.tokens,
        },
        "misc_metrics": saebench_metrics.of_dictionary(latents),
    }
    metrics = {}
    for category, group in exact.items():
        metrics[category] = {name: _finite(value) for name, value in group.items()}
    known = about(subject.run, subject.config)
    depends = dumped({**study.identity, **inputs(study), "options": vars(options)})
    results = {
        "eval_type_id": "core",
        "eval_config": _eval_config(subject, known, measured, losses),
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, depends)),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": _details(latents),
        "sae_bench_commit_hash": "Unknown",  # as SAEBench writes where it does not know
        "sae_lens_id": SAE_ID,
        "sae_lens_release_id": subject.run.resolve().name,
        "sae_lens_version": "Unknown",
        "sae_cfg_dict": _sae_config(subject, known),
        "eval_result_unstructured": _unstructured(subject, measured, losses),
    }
    file = file_of(subject)
    path = study.folder / file
    made(path.parent)
    durable.write(path, [dumped(results).encode()])
    figures = {key: results[key] for key in ("eval_config", "eval_id", "eval_result_unstructured")}
    figures |= {"metrics": metrics, "file": file}
    lines = _summary(figures, subject.policy, losses=losses is not None)
    return Outcome(figures, lines, [_table(metrics)])


def _summary(figures: Mapping[str, Any], policy: Policy, *, losses: bool) -> list[str]:
    ours = figures["eval_result_unstructured"]
    quality = figures["metrics"]["reconstruction_quality"]
    config = figures["eval_config"]
    return [
        f"{formatted(ours['variance_explained_centred'], '.4f')} of the variance is explained, "
        "centred per dimension, which is to be quoted; SAEBench's explained_variance of the same "
        f"rows is {quality['explained_variance']:.4f}, since it divides by "
        f"{ours['explained_variance_divisor']:.4g} where their variance is "
        f"{ours['variance']:.4g}, and its explained_variance_legacy, which the figures of its "
        f"paper are, is {quality['explained_variance_legacy']:.4f}.",
        f"{figures['file']} has every field of SAEBench's core results by SAEBench's definitions, "
        f"on {ours['rows']:,} held-out rows of {ours['documents']:,} documents, left out: "
        f"{told(policy, ours['left_out'])}; "
        f"{config['n_eval_sparsity_variance_batches']:,} batches of "
        f"{config['batch_size_prompts']} prompts of {config['context_size']} tokens; "
        f"-1 is what has no value. {resampled(ours['documents'], 'document')}",
        "Of SAEBench's benchmarks the file has core alone. Its TPP and SCR are not computed: they "
        "should not be used (arXiv 2605.18229). study=probes is what its sparse probing asks.",
        "SAEBench divides its mse by the rows of a batch; per element it is "
        f"{ours['mse_per_element']:.4g}.",
        "CE and KL are study=splice's at all positions."
        if losses
        else "CE and KL are -1: do study=splice first, then this again.",
    ]


def _table(metrics: Metrics) -> Table:
    rows = []
    for category, group in metrics.items():
        for name, value in group.items():
            text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
            rows.append((category, name, text))
    return Table("SAEBench's core metrics, by its names", ("category", "metric", "value"), rows)


def memory(study: Study) -> Needed:
    """Beside a pass eight float64 copies of a batch, its latents by prompt, and each latent's
    nearest: two copies of the encoder.
    """
    subject = study.subject
    limit = build(Options, "study", study.options).rows
    of_batch = 8 * 8 * saebench_metrics.BATCH_TOKENS * subject.sae.d_model
    weights = 2 * of_sae(subject)
    return Needed(max(of_pass(subject, limit) + of_batch, weights), "study.rows")


DEFINITION = Definition(
    saebench,
    version=2,
    options=Options,
    refuses=refusals.all_but_saes,
    inputs=inputs,
    memory=memory,
    order=95,
)
