"""What right and wrong answers differ by, as figures and lists.

Shapes: n answers, d d_model, c columns, L permutations of the labels, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.stats import Floats, benjamini_hochberg, percentiles, permutation_p
from residual_saes.analyze.studies.contrast.choice import TOP, Choice
from residual_saes.analyze.studies.contrast.effects import (
    Design,
    Halves,
    Tested,
    family_wise_p,
    largest,
)


class Layer(NamedTuple):
    """What was found at one layer."""

    raw: Tested
    adjusted: Tested | None
    drawn: Floats  # (B,) top |d| of resampled questions
    halves: Halves


class Ranked(NamedTuple):
    """Effects of features with p values by ranks."""

    tested: Tested
    p: Floats  # (c,)


class Features(NamedTuple):
    """What was found of the c features that fire in enough answers; None if no feature does."""

    ids: NDArray[np.int64]  # (c,)
    fired: NDArray[np.int64]  # (c,) answers
    means: tuple[Floats, Floats] | None = None  # (c,) over right answers, over wrong ones
    raw: Ranked | None = None
    adjusted: Ranked | None = None
    halves: Halves | None = None


class Findings(NamedTuple):
    """Everything, of the n answers that were compared."""

    design: Design
    question: NDArray[np.str_]  # (n,) ids
    covariates: dict[str, Floats]  # (n,) each
    layers: list[Layer]
    features: Features
    choice: Choice


# -- figures ---------------------------------------------------------------------------------------


def figures(findings: Findings) -> dict[str, Any]:
    """Everything, as plain JSON."""
    raw = _joint([layer.raw for layer in findings.layers])
    adjusted = [layer.adjusted for layer in findings.layers if layer.adjusted is not None]
    drawn = np.array([layer.drawn for layer in findings.layers])
    covariates = {}
    for name, values in findings.covariates.items():
        covariates[name] = _covariate(values, findings.design)
    features = findings.features
    return {
        "answers": len(findings.design.correct),
        "right": int(findings.design.correct.sum()),
        "within_questions": findings.design.paired,
        "questions": np.unique(findings.question),
        "raw": raw,
        "adjusted": _joint(adjusted) if adjusted else None,
        "peak_rank": _peak_rank(drawn, raw["peak"]["layer"]),
        "halves": [layer.halves._asdict() for layer in findings.layers],
        "covariates": covariates,
        "features": {
            "tested": len(features.ids),
            "raw": _ranked_figures(features.raw),
            "adjusted": _ranked_figures(features.adjusted),
            "halves": features.halves and features.halves._asdict(),
        },
    }


def _joint(layers: Sequence[Tested]) -> dict[str, Any]:
    """Each layer's figures, and the peak against the maximum over all layers."""
    top = np.array([layer.top for layer in layers])
    null = np.array([layer.null_top for layer in layers])
    null_max = np.max([layer.null_max for layer in layers], axis=0)
    p = family_wise_p(np.abs([layer.sizes for layer in layers]), null_max)
    peak = int(np.argmax(top))
    return {
        "top": top,
        "top_d": [largest(np.abs(layer.d)[None], TOP).mean() for layer in layers],
        "null_median": np.median(null, axis=1),
        "null_95": np.quantile(null, 0.95, axis=1),
        "p_of_layer": [permutation_p(*pair) for pair in zip(top, null, strict=True)],
        "peak": {"layer": peak, **_against(top[peak], null.max(0))},
        "max_null_95": float(np.quantile(null_max, 0.95)),
        "dimensions_below_5_percent": (p <= 0.05).sum(1),
    }


def _against(top: float, null: Floats) -> dict[str, float]:
    """A top |d| beside its null (L,)."""
    return {
        "top": top,
        "null_median": float(np.median(null)),
        "null_95": float(np.quantile(null, 0.95)),
        "p": permutation_p(top, null),
    }


def _peak_rank(drawn: Floats, peak: int) -> dict[str, Any]:
    """How sure it is that the peak is the peak.

    Args:
        drawn: (layers, B) top |d| of resampled questions.
    """
    whole = drawn[:, ~np.isnan(drawn).any(axis=0)]
    draws = whole.shape[1]
    ranks = 1.0 + (whole > whole[peak]).sum(0)
    shares = np.bincount(np.argmax(whole, axis=0), minlength=len(whole)) / max(draws, 1)
    return {"rank_interval": percentiles(ranks), "share_of_peaks": shares, "draws": draws}


def _covariate(values: Floats, design: Design) -> dict[str, float]:
    d, sizes = design.raw.both(values[:, None])
    return {
        "right": float(values[design.correct].mean()),
        "wrong": float(values[~design.correct].mean()),
        "d": float(d[0, 0]),
        "p": permutation_p(abs(sizes[0, 0]), np.abs(sizes[1:, 0])),
    }


def _ranked_figures(ranked: Ranked | None) -> dict[str, Any] | None:
    if ranked is None:
        return None
    discovered = int((benjamini_hochberg(ranked.p) <= 0.05).sum())
    against = _against(ranked.tested.top, ranked.tested.null_top)
    return {**against, "below_5_percent_fdr": discovered}


# -- features one by one ---------------------------------------------------------------------------


def feature_table(findings: Findings) -> dict[str, Any]:
    """Columns (c,) of figures of every feature that was tested; none if none was."""
    features = findings.features
    if features.raw is None or features.means is None:
        return {}
    right, wrong = features.means
    table = {"feature": features.ids, "fired": features.fired, **_ranked_columns(features.raw)}
    table |= {"mean_right": right, "mean_wrong": wrong}
    if features.adjusted:
        table |= _ranked_columns(features.adjusted, "_adjusted")
    return table


def _ranked_columns(ranked: Ranked, suffix: str = "") -> dict[str, Any]:
    return {
        f"d{suffix}": ranked.tested.d,
        f"p{suffix}": ranked.p,
        f"q{suffix}": benjamini_hochberg(ranked.p),
    }
