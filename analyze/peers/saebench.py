"""SAEBench's "core" results of a run, in the file that SAEBench's own plots read, from stored rows
in one pass.

Every field is by SAEBench's own definition (saebench_metrics.py), so that it compares with other
results, and `eval_result_unstructured` holds what is to be quoted: the variance explained centred
per dimension, with its interval.

CE and KL are study=splice's at all positions, if that was done: of every token behind a BOS in its
own document. SAEBench also lets the documents of a prompt see each other, and leaves out what BOS
itself predicts. As SAEBench has it, -1 is a figure that was not computed or is no number.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analyze.outcome import Outcome, Table, dumped
from analyze.peers import saebench_metrics
from analyze.peers.saebench_metrics import DEFINITIONS, Measured, Metrics
from analyze.results import FOLDER as STUDIES
from analyze.results import current, made
from analyze.stats import Floats, figure, formatted, variance_explained
from analyze.studies import splice
from analyze.study import Definition, Study
from analyze.subject import Subject
from data import durable
from data.errors import SettingError
from data.journal import tell
from data.settings import build
from train.export.formats import About, about, saelens_config

FOLDER = "core"  # SAEBench's plots tell the kind of a result by its path
SUFFIX = "_eval_results.json"  # by which they find it
SAE_ID = "custom_sae"  # its name for what is in no release of SAELens
NOT_COMPUTED = -1.0
_DIGITS = 10  # of the latents' figures; SAEBench's DEFAULT_FLOAT_PRECISION


@dataclass(frozen=True)
class Options:
    """How much is read."""

    rows: int = 4_000_000  # held-out rows at most, in whole units

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SettingError(f"study.rows={self.rows} must be at least 1")


class Spliced(NamedTuple):
    """The figures of study=splice at all positions."""

    tokens: int  # replaced
    clean: Mapping[str, Any]
    sae: Mapping[str, Any]
    zero: Mapping[str, Any]


# -- of the language model -------------------------------------------------------------------------


def spliced(subject: Subject) -> Spliced | None:
    """What study=splice has found of the run's present SAE; None if it was not done."""
    result = current(subject.run, subject.digest).get("splice")
    if result is None:
        return None
    outcome = result.outcome
    row = {(one["name"], one["where"]): one for one in outcome.figures["rows"]}
    rows = row[splice.CLEAN, ""], row["sae", splice.ALL], row["zero", splice.ALL]
    return Spliced(outcome.figures["replaced"][splice.ALL], *rows)


@np.errstate(divide="ignore", invalid="ignore")
def of_model(found: Spliced | None) -> Metrics:
    """The two categories that are about the language model."""
    if found is None:
        kl_sae = kl_zero = clean = sae = zero = np.float64(np.nan)
    else:
        kl_sae, kl_zero = (np.float64(one["kl"]["value"]) for one in (found.sae, found.zero))
        clean, sae, zero = (
            np.float64(one["ce"]["value"]) for one in (found.clean, found.sae, found.zero)
        )
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


def _number(value: float) -> float:
    """As SAEBench writes what is no number. It leaves infinity, which no JSON has."""
    return value if math.isfinite(value) else NOT_COMPUTED


def _details(found: Mapping[str, Floats]) -> list[dict[str, float]]:
    """A dict per latent."""
    columns = [
        [round(_number(value), _DIGITS) for value in column.tolist()] for column in found.values()
    ]
    return [
        {"index": at, **dict(zip(found, row, strict=True))}
        for at, row in enumerate(zip(*columns, strict=True))
    ]


def _sae_config(subject: Subject, known: About) -> dict[str, Any]:
    """The configuration as SAELens has it, of which SAEBench's plots read architecture, d_sae and
    training_tokens.
    """
    trained = subject.config["settings"].get("tokens")
    return saelens_config(subject.sae, known) | (
        {} if trained is None else {"training_tokens": trained}
    )


def _eval_config(
    subject: Subject, known: About, found: Measured, model: Spliced | None
) -> dict[str, Any]:
    """SAEBench's CoreEvalConfig, with what was done here."""
    context = subject.store.context
    return {
        "model_name": known.model,
        "llm_dtype": str(subject.store.manifest["model"]["dtype"]),
        "batch_size_prompts": found.prompts,
        "n_eval_reconstruction_batches": 0
        if model is None
        else -(-model.tokens // (found.prompts * context)),
        "n_eval_sparsity_variance_batches": len(found.sums.rows),
        "dataset": known.text,
        "context_size": context,
        "compute_kl": model is not None,
        "compute_ce_loss": model is not None,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
        "exclude_special_tokens_from_reconstruction": False,
        "verbose": False,
    }


def _unstructured(subject: Subject, found: Measured, model: Spliced | None) -> dict[str, Any]:
    """What SAEBench has no field for, with the definitions' names."""
    centred = "1 - sum |x - x_hat|^2 / sum |x - mu|^2, mu the training rows' mean; 95 % interval over documents"
    losses = "study=splice at all positions, tokens behind a BOS in their own document; 95 % intervals over documents"
    value, interval = variance_explained(found.document, found.error, found.about_mean)
    return {
        "definitions": {
            "eval_result_metrics": DEFINITIONS,
            "explained_variance": "1 - r / (s - (s / d)^2), r = E|x - x_hat|^2, s = E|x|^2: not centred",
            "explained_variance_legacy": "mean over rows of ratios, about the mean of each batch",
            "mse": "E|x - x_hat|^2 divided by the rows of a batch; see mse_per_element",
            "variance_explained_centred": centred,
            "losses": losses,
        },
        "variance_explained_centred": figure(value, interval),
        "variance": float(found.about_mean.mean()),
        "explained_variance_divisor": saebench_metrics.divisor(found.sums, subject.sae.d_model),
        "mse_per_element": float(found.error.mean() / subject.sae.d_model),
        "rows": len(found.error),
        "documents": len(np.unique(found.document)),
        "policy": vars(subject.policy),
        "losses": None
        if model is None
        else {"sae": model.sae, "zero": model.zero, "clean": model.clean},
    }


def file_of(subject: Subject) -> Path:
    """The results file below the study's folder, by the name that SAEBench gives an SAE that is the
    run's.
    """
    return Path(FOLDER, f"{subject.run.resolve().name}_{SAE_ID}{SUFFIX}")


def _write(path: Path, results: Mapping[str, Any]) -> None:
    for old in made(path.parent).glob(f"*{SUFFIX}"):
        old.unlink()  # of the run under another name: SAEBench would plot both
    durable.write(path, [dumped(results).encode()])


# -- the study -------------------------------------------------------------------------------------


def inputs(study: Study) -> Mapping[str, Any]:
    """What the file depends on beside the settings, for `Study.perform`."""
    losses = study.subject.run / STUDIES / "splice" / "splice.json"
    return {
        "splice": durable.digest_file(losses).xxh3_128 if losses.is_file() else None,
        "definitions": DEFINITIONS,
        "release": study.subject.run.resolve().name,
    }


def saebench(study: Study) -> Outcome:
    """Write the results file.

    Raises:
        StoreError: no held-out row passes the run's policy.
    """
    options, subject = build(Options, "study", study.options), study.subject
    known, model = about(subject.run, subject.config), spliced(subject)
    found = saebench_metrics.measure(subject, options.rows)
    tell(f"each latent's largest cosine with another one, of {subject.sae.d_sae:,}")
    features = saebench_metrics.of_latents(subject.sae, found.latents, len(found.error))
    raw: Metrics = {
        **of_model(model),
        **saebench_metrics.of_rows(found.sums, subject.sae.d_model),
        "token_stats": {
            "total_tokens_eval_reconstruction": 0 if model is None else model.tokens,
            "total_tokens_eval_sparsity_variance": found.tokens,
        },
        "misc_metrics": saebench_metrics.of_dictionary(features),
    }
    metrics = {
        kind: {name: _number(value) for name, value in group.items()} for kind, group in raw.items()
    }
    depends = dumped({**study.identity, **inputs(study), "options": vars(options)})
    results = {
        "eval_type_id": "core",
        "eval_config": _eval_config(subject, known, found, model),
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_URL, depends)),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics,
        "eval_result_details": _details(features),
        "sae_bench_commit_hash": "Unknown",  # as SAEBench writes: none has run
        "sae_lens_id": SAE_ID,
        "sae_lens_release_id": subject.run.resolve().name,
        "sae_lens_version": "Unknown",
        "sae_cfg_dict": _sae_config(subject, known),
        "eval_result_unstructured": _unstructured(subject, found, model),
    }
    _write(study.folder / file_of(subject), results)
    figures = {key: results[key] for key in ("eval_config", "eval_id", "eval_result_unstructured")}
    figures |= {"metrics": metrics, "file": file_of(subject)}
    left = [str(file_of(subject))]
    return Outcome(
        figures, _summary(figures, losses=model is not None), [_table(metrics)], files=left
    )


def _summary(figures: Mapping[str, Any], *, losses: bool) -> list[str]:
    metrics, ours = figures["metrics"], figures["eval_result_unstructured"]
    quality, config = metrics["reconstruction_quality"], figures["eval_config"]
    return [
        f"{formatted(ours['variance_explained_centred'], '.4f')} of the variance is explained, centred per dimension, which "
        f"is to be quoted; SAEBench's explained_variance of the same rows is {quality['explained_variance']:.4f}, "
        f"since it divides by {ours['explained_variance_divisor']:.4g} where their variance is {ours['variance']:.4g}, "
        "and its explained_variance_legacy, which the figures of its paper are, is "
        f"{quality['explained_variance_legacy']:.4f}.",
        f"{figures['file']} has every field of SAEBench's core results by SAEBench's definitions, on {ours['rows']:,} "
        f"held-out rows of {ours['documents']:,} documents, {config['n_eval_sparsity_variance_batches']:,} batches "
        f"of {config['batch_size_prompts']} prompts of {config['context_size']} tokens; -1 is what has no value.",
        f"SAEBench divides its mse by the rows of a batch; per element it is {ours['mse_per_element']:.4g}.",
        "CE and KL are study=splice's at all positions."
        if losses
        else "CE and KL are -1: do study=splice first, then this again.",
    ]


def _table(metrics: Metrics) -> Table:
    rows: Sequence[tuple[str, ...]] = [
        (kind, name, f"{value:,}" if isinstance(value, int) else f"{value:.6g}")
        for kind, group in metrics.items()
        for name, value in group.items()
    ]
    return Table("SAEBench's core metrics, by its names", ("category", "metric", "value"), rows)


DEFINITION = Definition(saebench, options=Options, inputs=inputs, order=95)
