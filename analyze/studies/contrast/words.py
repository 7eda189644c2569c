"""What the study `contrast` says: its verdicts, its table and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.studies.contrast.effects import Tested
from residual_saes.analyze.studies.contrast.findings import Findings
from residual_saes.analyze.studies.contrast.plot import over_layers

_LIKELY = 0.05  # share of resamplings that have their peak at a layer, for it to be named


def summary(figures: dict[str, Any]) -> list[str]:
    """Sentences on `findings.figures`."""
    right = figures["right"]
    wrong = figures["answers"] - right
    how = ", compared within questions" if figures["within_questions"] else ""
    adjusted = (
        "What the answers differ by beside their labels leaves nothing of these, so nothing is "
        "adjusted for it."
    )
    if figures["adjusted"]:
        adjusted = _verdict(f"At equal {', '.join(figures['covariates'])} the", figures["adjusted"])
    return [
        _verdict("The", figures["raw"]),
        adjusted,
        _stability(figures),
        _chosen(figures["chosen"]),
        _of_covariates(figures["covariates"]),
        _feature_verdict(figures["features"]),
        f"Compared were {right} right and {wrong} wrong answers{how}.",
    ]


def _verdict(which: str, joint: dict[str, Any]) -> str:
    peak = joint["peak"]
    return (
        f"{which} top-10 |d| of the layers peaks at layer {peak['layer']} with {peak['top']:.3f} "
        f"by Welch's test ({joint['top_d'][peak['layer']]:.3f} by Hedges'), which "
        f"{_exceeds(peak)} 95% of what shuffled labels give at their best layer, "
        f"{peak['null_95']:.3f} (median {peak['null_median']:.3f}, p = {peak['p']:.2g})."
    )


def _exceeds(against: dict[str, Any]) -> str:
    return "exceeds" if against["top"] > against["null_95"] else "does not exceed"


def _stability(figures: dict[str, Any]) -> str:
    peak = figures["raw"]["peak"]["layer"]
    halves = figures["halves"][peak]
    low, high = figures["peak_rank"]["rank_interval"]
    shares = figures["peak_rank"]["share_of_peaks"]
    likely = [layer for layer, share in enumerate(shares) if share >= _LIKELY]
    together = sum(shares[layer] for layer in likely)
    return (
        f"Of ten dimensions of layer {peak} chosen on half of the questions, the other half "
        f"chooses {halves['shared']:.0%} (shuffled labels {halves['null_shared']:.0%}), and their "
        f"d in it is {_carried(halves)}. With the questions resampled, layer {peak} ranks "
        f"{low:.0f} to {high:.0f} of {len(figures['halves'])} (95%), and in {together:.0%} the "
        f"peak is at {', '.join(map(str, likely))}."
    )


def _chosen(chosen: dict[str, Any]) -> str:
    """What the questions that choose chose, as the others see it."""
    judged = chosen["judged_by"]
    columns = {
        f"dimensions of layer {chosen['peak_layer']}": (chosen["dimensions"], "dimensions_carried"),
        "helpful features": (chosen["helpful"], "helpful_carried"),
        "harmful features": (chosen["harmful"], "harmful_carried"),
    }
    parts = []
    for name, (rows, key) in columns.items():
        where_chosen = np.mean([abs(row["d_where_chosen"]) for row in rows]) if rows else 0.0
        held = chosen[key]
        found = "too few answers say what they are there"
        if held:
            found = (
                f"{held['d']:.2f} (shuffled 95% below {held['null_95']:.2f}, p = {held['p']:.2g})"
            )
        if rows:
            parts.append(f"{len(rows)} {name} {where_chosen:.2f}, in the others {found}")
    listed = "; ".join(parts) or "nothing"
    return (
        f"{len(chosen['ids'])} questions chose what is listed by name, and the other "
        f"{len(judged['ids'])} give its figures. Mean |d| where it was chosen, and mean d in that "
        f"direction in the others: {listed}."
    )


def _carried(halves: dict[str, float]) -> str:
    return (
        f"{halves['carried']:.2f} (shuffled {halves['null_carried']:.2f}, 95% below "
        f"{halves['null_carried_95']:.2f})"
    )


def _of_covariates(covariates: dict[str, Any]) -> str:
    parts = []
    for name, covariate in covariates.items():
        parts.append(
            f"{name} {covariate['right']:.3g} of right, {covariate['wrong']:.3g} of wrong ones, "
            f"d = {covariate['d']:.2f}, p = {covariate['p']:.2g}"
        )
    differences = "; ".join(parts) or "nothing that is looked at"
    return f"What else the answers differ by, on average: {differences}."


def _feature_verdict(features: dict[str, Any]) -> str:
    raw = features["raw"]
    adjusted = features["adjusted"]
    halves = features["halves"]
    if raw is None:
        return "No SAE feature fires in enough answers to be tested."
    also = f", {adjusted['below_5_percent_fdr']} when adjusted" if adjusted else ""
    return (
        f"{raw['below_5_percent_fdr']} of {features['tested']} SAE features differ at a false "
        f"discovery rate of 5%{also}. Their top-10 |d|, {raw['top']:.3f}, {_exceeds(raw)} 95% of "
        f"shuffled labels, {raw['null_95']:.3f} (median {raw['null_median']:.3f}, p = "
        f"{raw['p']:.2g}); of ten chosen on half of the questions the other half chooses "
        f"{halves['shared']:.0%} (shuffled {halves['null_shared']:.0%}), and their d in it is "
        f"{_carried(halves)}."
    )


_CHOSEN = {"d_where_chosen": ".2f", "d": ".2f", "p": ".2g", "q": ".2g"}
_COLUMNS = {
    "top": "top-10 |d|",
    "null_median": "null median",
    "null_95": "null 95%",
    "p_of_layer": "p",
}


def tables(figures: dict[str, Any]) -> list[Table]:
    """One row per layer, and what was chosen."""
    joints = {"": figures["raw"]}
    if figures["adjusted"]:
        joints["adjusted "] = figures["adjusted"]
    header = ["layer"]
    for kind in joints:
        header += [f"{kind}{name}" for name in _COLUMNS.values()]
    rows = []
    for layer, halves in enumerate(figures["halves"]):
        cells = [str(layer)]
        for joint in joints.values():
            cells += [f"{joint[key][layer]:.3f}" for key in _COLUMNS]
        peaks = figures["peak_rank"]["share_of_peaks"][layer]
        rows.append((*cells, f"{halves['carried']:.2f}", f"{peaks:.1%}"))
    header += ["d in the other half", "peak of resampled"]
    caption = "Right against wrong by layer; p is of the layer by itself"
    return [Table(caption, tuple(header), rows), _chosen_table(figures["chosen"])]


def _chosen_table(chosen: dict[str, Any]) -> Table:
    rows = []
    for kind, name in (("dimensions", "dimension"), ("helpful", "feature"), ("harmful", "feature")):
        for row in chosen[kind]:
            cells = [_number(row[key], form) for key, form in _CHOSEN.items()]
            rows.append((kind, str(row[name]), *cells))
    caption = f"Chosen by {len(chosen['ids'])} questions; d, p and q are of the others"
    return Table(caption, ("", "", "d where chosen", "d", "p", "q"), rows)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def pictures(findings: Findings) -> dict[str, Picture]:
    """d over layers, raw and adjusted."""
    raw = [layer.raw for layer in findings.layers]
    drawn = {"contrast": _picture("Right against wrong answers", raw)}
    adjusted = [layer.adjusted for layer in findings.layers if layer.adjusted is not None]
    if adjusted:
        caption = f"The same at equal {', '.join(findings.covariates)}"
        drawn["contrast_adjusted"] = _picture(caption, adjusted)
    return drawn


def _picture(caption: str, layers: Sequence[Tested]) -> Picture:
    top = np.array([layer.top for layer in layers])
    null = np.array([layer.null_top for layer in layers])
    return Picture(caption, over_layers(top, null, "mean of the ten largest |d|"))
