"""What right and wrong answers differ by, as figures, lists, sentences, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyze.outcome import Picture, Table
from analyze.stats import Floats, benjamini_hochberg, percentiles, permutation_p
from analyze.studies.contrast.effects import Design, Halves, Tested, family_wise_p
from analyze.studies.contrast.plot import over_layers

TOP = (
    10  # the reference's "top-10 |d|" of a layer; and features of either sign that are written out
)
_LIKELY = 0.05  # share of resamplings that have their peak at a layer, for it to be named


class Layer(NamedTuple):
    """What was found at one layer."""

    raw: Tested
    adjusted: Tested | None
    drawn: Floats  # (B,) top |d| of resampled questions
    halves: Halves
    caa: Floats  # (d,)


class Features(NamedTuple):
    """What was found of the c features that fire in enough answers, (c,) each; None where there is
    none.
    """

    ids: NDArray[np.int64]
    fired: NDArray[np.int64]  # answers
    means: tuple[Floats, Floats] | None = None  # over right answers, over wrong ones
    raw: tuple[Tested, Floats] | None = None  # with p values
    adjusted: tuple[Tested, Floats] | None = None
    halves: Halves | None = None


class Findings(NamedTuple):
    """Everything, of the n answers that were compared."""

    design: Design
    question: NDArray[np.str_]  # (n,) ids
    covariates: dict[str, Floats]  # (n,) each
    layers: list[Layer]
    features: Features


# -- figures ---------------------------------------------------------------------------------------


def figures(found: Findings) -> dict[str, Any]:
    """Everything, as plain JSON."""
    raw = _joint([layer.raw for layer in found.layers])
    adjusted = [layer.adjusted for layer in found.layers if layer.adjusted is not None]
    return {
        **_counts(found),
        "questions": np.unique(found.question),
        "raw": raw,
        "adjusted": _joint(adjusted) if adjusted else None,
        "peak_rank": _peak_rank(
            np.array([layer.drawn for layer in found.layers]), raw["peak"]["layer"]
        ),
        "halves": [layer.halves._asdict() for layer in found.layers],
        "covariates": {
            name: _covariate(values, found.design) for name, values in found.covariates.items()
        },
        "features": {
            "tested": len(found.features.ids),
            "raw": _of_features(found.features.raw),
            "adjusted": _of_features(found.features.adjusted),
            "halves": found.features.halves and found.features.halves._asdict(),
        },
    }


def _counts(found: Findings) -> dict[str, Any]:
    correct = found.design.correct
    return {
        "answers": len(correct),
        "right": int(correct.sum()),
        "within_questions": found.design.paired,
    }


def _joint(found: Sequence[Tested]) -> dict[str, Any]:
    """Of the layers together: each one's, and the peak against the maximum over all of them."""
    top, null = np.array([one.top for one in found]), np.array([one.null_top for one in found])
    null_max = np.max([one.null_max for one in found], axis=0)
    p = family_wise_p(np.abs([one.d for one in found]), null_max)
    peak = int(np.argmax(top))
    best = np.argsort(-np.abs(found[peak].d), kind="stable")[:TOP]
    return {
        "top": top,
        "null_median": np.median(null, axis=1),
        "null_95": np.quantile(null, 0.95, axis=1),
        "p_of_layer": [
            permutation_p(one, of_layer) for one, of_layer in zip(top, null, strict=True)
        ],
        "peak": {
            "layer": peak,
            **_against(top[peak], null.max(0)),
            "dimensions": [
                {"dimension": at, "d": found[peak].d[at], "p_family": p[peak, at]} for at in best
            ],
        },
        "max_null_95": float(np.quantile(null_max, 0.95)),
        "dimensions_below_5_percent": (p <= 0.05).sum(1),
    }


def _against(top: float, null: Floats) -> dict[str, float]:
    return {
        "top": top,
        "null_median": float(np.median(null)),
        "null_95": float(np.quantile(null, 0.95)),
        "p": permutation_p(top, null),
    }


def _peak_rank(drawn: Floats, peak: int) -> dict[str, Any]:
    """How sure it is that the peak is the peak, from (layers, B) tops of resampled questions."""
    whole = drawn[:, ~np.isnan(drawn).any(axis=0)]
    ranks = 1.0 + (whole > whole[peak]).sum(0)
    shares = np.bincount(np.argmax(whole, axis=0), minlength=len(whole)) / max(whole.shape[1], 1)
    return {"rank_interval": percentiles(ranks), "share_of_peaks": shares, "draws": whole.shape[1]}


def _covariate(values: Floats, design: Design) -> dict[str, float]:
    effect = design.raw(values[:, None])[:, 0]
    right, wrong = values[design.correct], values[~design.correct]
    p = permutation_p(abs(effect[0]), np.abs(effect[1:]))
    return {
        "right": float(right.mean()),
        "wrong": float(wrong.mean()),
        "d": float(effect[0]),
        "p": p,
    }


def _of_features(found: tuple[Tested, Floats] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    tested, p = found
    below = int((benjamini_hochberg(p) <= 0.05).sum())
    return {**_against(tested.top, tested.null_top), "below_5_percent_fdr": below}


def of_features(found: Findings) -> dict[str, Any]:
    """Columns of figures of every feature that was tested; none if none was."""
    features = found.features
    if features.raw is None or features.means is None:
        return {}
    table = {"feature": features.ids, "fired": features.fired, **_columns("", features.raw)}
    table |= {"mean_right": features.means[0], "mean_wrong": features.means[1]}
    return table | (_columns("_adjusted", features.adjusted) if features.adjusted else {})


def lists(found: Findings) -> dict[str, Any]:
    """The features that fire most for right answers and for wrong ones, by d; each with its own
    figures.
    """
    known = {**_counts(found), "tested": len(found.features.ids), "helpful": [], "harmful": []}
    if not (table := of_features(found)):
        return known
    d = table["d"]

    def ends(sign: int) -> list[dict[str, Any]]:
        best = np.argsort(-sign * d, kind="stable")[:TOP]
        return [
            {name: values[at] for name, values in table.items()} for at in best if sign * d[at] > 0
        ]

    return {**known, "helpful": ends(1), "harmful": ends(-1)}


def _columns(suffix: str, found: tuple[Tested, Floats]) -> dict[str, Any]:
    tested, p = found
    return {f"d{suffix}": tested.d, f"p{suffix}": p, f"q{suffix}": benjamini_hochberg(p)}


# -- words -----------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> list[str]:
    """Sentences on `figures`."""
    wrong, how = (
        found["answers"] - found["right"],
        ", compared within questions" * found["within_questions"],
    )
    return [
        _verdict("The", found["raw"]),
        _verdict(f"At equal {', '.join(found['covariates'])} the", found["adjusted"])
        if found["adjusted"]
        else "What the answers differ by beside their labels leaves nothing of these, so nothing is adjusted for it.",
        _stability(found),
        _of_covariates(found["covariates"]),
        _feature_verdict(found["features"]),
        f"Compared were {found['right']} right and {wrong} wrong answers{how}.",
    ]


def _verdict(which: str, joint: dict[str, Any]) -> str:
    peak = joint["peak"]
    word = "exceeds" if peak["top"] > peak["null_95"] else "does not exceed"
    return (
        f"{which} top-10 |d| of the layers peaks at layer {peak['layer']} with {peak['top']:.3f}, which {word} 95 % of "
        f"what shuffled labels give at their best layer, {peak['null_95']:.3f} (median {peak['null_median']:.3f}, "
        f"p = {peak['p']:.2g})."
    )


def _stability(found: dict[str, Any]) -> str:
    peak, rank = found["raw"]["peak"]["layer"], found["peak_rank"]
    halves, (low, high) = found["halves"][peak], rank["rank_interval"]
    likely = [layer for layer, share in enumerate(rank["share_of_peaks"]) if share >= _LIKELY]
    together = sum(rank["share_of_peaks"][layer] for layer in likely)
    return (
        f"Of ten dimensions of layer {peak} chosen on half of the questions, the other half chooses "
        f"{halves['shared']:.0%} (shuffled labels {halves['null_shared']:.0%}), and their d in it is "
        f"{halves['carried']:.2f} (shuffled {halves['null_carried']:.2f}, 95 % below {halves['null_carried_95']:.2f}). "
        f"With the questions resampled, layer {peak} ranks {low:.0f} to {high:.0f} of {len(found['halves'])} (95 %), "
        f"and in {together:.0%} the peak is at {', '.join(map(str, likely))}."
    )


def _of_covariates(covariates: dict[str, Any]) -> str:
    said = (
        f"{name} {one['right']:.3g} of right, {one['wrong']:.3g} of wrong ones, d = {one['d']:.2f}, p = {one['p']:.2g}"
        for name, one in covariates.items()
    )
    return f"What else the answers differ by, on average: {'; '.join(said) or 'nothing that is looked at'}."


def _feature_verdict(features: dict[str, Any]) -> str:
    raw, adjusted, halves = features["raw"], features["adjusted"], features["halves"]
    if raw is None:
        return "No SAE feature fires in enough answers to be tested."
    word = "exceeds" if raw["top"] > raw["null_95"] else "does not exceed"
    also = f", {adjusted['below_5_percent_fdr']} when adjusted" if adjusted else ""
    return (
        f"{raw['below_5_percent_fdr']} of {features['tested']} SAE features differ at a false discovery rate of 5 %"
        f"{also}. Their top-10 |d|, {raw['top']:.3f}, {word} 95 % of shuffled labels, {raw['null_95']:.3f} (median "
        f"{raw['null_median']:.3f}, p = {raw['p']:.2g}); of ten chosen on half of the questions the other half chooses "
        f"{halves['shared']:.0%} (shuffled {halves['null_shared']:.0%}), and their d in it is {halves['carried']:.2f} "
        f"(shuffled {halves['null_carried']:.2f}, 95 % below {halves['null_carried_95']:.2f})."
    )


def tables(found: dict[str, Any]) -> list[Table]:
    """One row per layer."""
    kinds = [("", found["raw"]), ("adjusted ", found["adjusted"])][: 2 if found["adjusted"] else 1]
    names = {
        "top": "top-10 |d|",
        "null_median": "null median",
        "null_95": "null 95 %",
        "p_of_layer": "p",
    }
    header = [f"{kind}{name}" for kind, _ in kinds for name in names.values()]
    rows = [
        (
            str(layer),
            *(f"{joint[key][layer]:.3f}" for _, joint in kinds for key in names),
            f"{halves['carried']:.2f}",
            f"{found['peak_rank']['share_of_peaks'][layer]:.1%}",
        )
        for layer, halves in enumerate(found["halves"])
    ]
    caption = "Right against wrong by layer; p is of the layer by itself"
    return [Table(caption, ("layer", *header, "d in the other half", "peak of resampled"), rows)]


def pictures(found: Findings) -> dict[str, Picture]:
    """d over layers, raw and adjusted."""
    drawn = {
        "contrast": _picture("Right against wrong answers", [layer.raw for layer in found.layers])
    }
    if adjusted := [layer.adjusted for layer in found.layers if layer.adjusted is not None]:
        drawn["contrast_adjusted"] = _picture(
            f"The same at equal {', '.join(found.covariates)}", adjusted
        )
    return drawn


def _picture(caption: str, found: Sequence[Tested]) -> Picture:
    top, null = np.array([one.top for one in found]), np.array([one.null_top for one in found])
    return Picture(caption, over_layers(top, null, "mean of the ten largest |d|"))
