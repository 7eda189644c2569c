"""What the arms found, in sentences, a table and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.studies.synth import plot
from residual_saes.analyze.studies.synth.baselines import ORACLE, PCA, RANDOM, UNTRAINED
from residual_saes.analyze.studies.synth.verdict import LEVEL

_COLUMNS = {  # of the table: figure, head and form
    "variance_explained": ("variance explained", ".3f"),
    "f1": ("F1", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "f1_by_decoder": ("F1 by decoder", ".3f"),
    "mcc": ("MCC", ".3f"),
    "absorption": ("absorption", ".1%"),
    "absorption_by_chance": ("by chance", ".1%"),
    "split": ("split", ".1%"),
    "dead": ("dead", ".1%"),
    "l0": ("L0", ".1f"),
}
_MEANINGS = (
    "F1, precision and recall are those of each feature's latent, matched one to one by F1 on "
    "other rows; F1 by decoder is of latents matched by |cosine|, and MCC the mean |cosine| of "
    "those pairs. Absorption is the share of a parent's occurrences that a descendant's latent "
    "takes, by chance what other features' latents take. Split features are told by two latents "
    "better than by one, by .03 of F1.",
    "pursuit is TopK's dictionary read by matching pursuit, without its encoder. gated has no k: "
    "study.l1 decides its L0.",
)
_SHOWN = 10  # pairs of arms in sentences; all are in the JSON


def rule(arms: int, seeds: int) -> list[str]:
    """What decides, before anything is trained."""
    return [
        f"the rule: {arms} arms on {seeds} worlds; two arms differ in a figure if the "
        f"difference's simultaneous {LEVEL:.0%} interval over worlds leaves out 0 (Tukey's range "
        "test); variance explained and F1 disagree on two arms if both differ and order them "
        "differently"
    ]


def outcome_of(figures: Mapping[str, Any]) -> Outcome:
    """All that the page says."""
    arms = figures["arms"]
    drawn = "means, with lines from the least to the most of the worlds; larger marks: larger k"
    explained = plot.against(figures, "variance_explained", "f1", "variance explained", "F1")
    absorbed = plot.against(figures, "l0", "absorption", "L0", "absorption")
    pictures = {
        "f1": Picture(f"F1 against variance explained: {drawn}", explained),
        "absorption": Picture(f"Absorption against latents a row: {drawn}", absorbed),
    }
    rows: list[tuple[str, ...]] = []
    for name in sorted(arms, key=lambda name: -arms[name]["f1"]["mean"]):
        cells = [name]
        for key, (_, form) in _COLUMNS.items():
            cells.append(_ranged(arms[name][key], form))
        rows.append(tuple(cells))
    header = ("arm", *next(zip(*_COLUMNS.values(), strict=True)))
    tables = [Table("Arms, most F1 first: mean (least to most of the worlds)", header, rows)]
    tables.append(_correlations(figures))
    if figures["disagreements"]:
        tables.append(_disagreements(figures))
    return Outcome(dict(figures), summary(figures), tables, pictures)


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The verdict first."""
    lines = [_verdict(figures), *_best(figures), _correlated(figures)]
    return [*lines, _beside(figures), _settings(figures), *_MEANINGS]


def _verdict(figures: Mapping[str, Any]) -> str:
    if figures["options"]["seeds"] < 2 or len(figures["compared"]) < 2:
        return (
            "Nothing is decided: intervals need two worlds (study.seeds=2) and two arms at least."
        )
    pairs = figures["disagreements"]
    halves = figures["half_widths"]
    told = (
        f"Arms differ where the unexplained variance differs by more than "
        f"{math.expm1(halves['log_unexplained']):.0%}, and F1 by more than {halves['f1']:.3f}: "
        f"simultaneous {LEVEL:.0%} intervals."
    )
    if not pairs:
        return (
            f"Variance explained and F1 disagree on none of {figures['pairs']} pairs of arms. "
            f"{told}"
        )
    first = pairs[0]
    same_k = sum(pair["same_k"] for pair in pairs)
    return (
        f"Variance explained and F1 disagree on {len(pairs)} of {figures['pairs']} pairs of arms, "
        f"of which {same_k} have the same k. Most clearly: {first['more']} explains "
        f"{first['variance_explained']:.3f} more than {first['less']}, and its F1 is "
        f"{-first['f1']:.3f} lower. {told}"
    )


def _best(figures: Mapping[str, Any]) -> list[str]:
    """What either figure would choose."""
    arms, trained = figures["arms"], figures["compared"]

    def most(key: str) -> Any:
        return max(trained, key=lambda name: arms[name][key]["mean"])

    explains, finds = most("variance_explained"), most("f1")
    alike = _not_told(figures, finds)
    lines = [
        f"Most F1: {finds}, {_ranged(arms[finds]['f1'], '.3f')}, with variance explained "
        f"{_ranged(arms[finds]['variance_explained'], '.3f')}."
    ]
    if alike and len(alike) < len(trained) - 1:
        lines[0] += f" Not told from it: {', '.join(alike)}."
    if explains != finds:
        lost = arms[finds]["f1"]["mean"] - arms[explains]["f1"]["mean"]
        lines.append(
            f"Most variance explained: {explains}, "
            f"{_ranged(arms[explains]['variance_explained'], '.3f')}. To choose it costs "
            f"{lost:.3f} of F1."
        )
    return lines


def _not_told(figures: Mapping[str, Any], best: str) -> list[str]:
    """The arms whose F1 cannot be told from the best one's."""
    arms = figures["arms"]
    least = arms[best]["f1"]["mean"] - figures["half_widths"]["f1"]
    return [n for n in figures["compared"] if n != best and arms[n]["f1"]["mean"] >= least]


def _correlated(figures: Mapping[str, Any]) -> str:
    said = []
    for group, found in figures["rank_correlations"]["f1"].items():
        of = "over all arms" if group == "all" else f"at {group}"
        said.append(f"{_ranged(found, '+.2f')} {of}")
    return f"Rank correlation of F1 with variance explained: {', '.join(said)}."


def _correlations(figures: Mapping[str, Any]) -> Table:
    """Of every figure that says something of the truth."""
    groups: list[str] = []
    rows: list[tuple[str, ...]] = []
    for key, found in figures["rank_correlations"].items():
        groups = ["all arms" if name == "all" else name for name in found]
        cells = [_COLUMNS[key][0]]
        for group in found.values():
            cells.append(_ranged(group, "+.2f"))
        rows.append(tuple(cells))
    return Table("Rank correlation with variance explained", ("", *groups), rows)


def _beside(figures: Mapping[str, Any]) -> str:
    """Worthless dictionaries, and the truth."""
    arms = figures["arms"]
    f1 = {name: _ranged(arms[name]["f1"], ".3f") for name in (ORACLE, UNTRAINED, RANDOM, PCA)}
    return (
        f"F1 of what nobody trained: a latent that is always active {figures['always_on']:.3f}, "
        f"{RANDOM} {f1[RANDOM]}, {PCA} {f1[PCA]}, the start of training {f1[UNTRAINED]}, the true "
        f"directions with the best linear reading and threshold {f1[ORACLE]}, which explain "
        f"{_ranged(arms[ORACLE]['variance_explained'], '.3f')}."
    )


def _settings(figures: Mapping[str, Any]) -> str:
    options = figures["options"]
    return (
        f"{options['n_features']} features in {options['d_model']} dimensions, "
        f"{figures['true_l0']:.1f} of them in a row, {options['hierarchy']:.0%} in trees; "
        f"{options['d_sae']} latents, {options['tokens']:,} rows. Brackets are the least and the "
        f"most of {options['seeds']} worlds, each with directions, frequencies and starts of its "
        "own."
    )


def _disagreements(figures: Mapping[str, Any]) -> Table:
    pairs = sorted(figures["disagreements"], key=lambda pair: not pair["same_k"])
    rows = []
    for pair in pairs[:_SHOWN]:
        numbers = f"+{pair['variance_explained']:.3f}", f"{pair['f1']:.3f}"
        rows.append((pair["more"], pair["less"], *numbers))
    shown = f", {_SHOWN} of {len(pairs)}" if len(pairs) > _SHOWN else ""
    header = ("explains more", "finds more", "variance explained", "F1")
    caption = f"Where they disagree{shown}: the same k first, then the clearest"
    return Table(caption, header, rows)


def _ranged(found: Mapping[str, Any], form: str) -> str:
    """A mean, with the least and the most of the worlds; a dash where there is nothing."""
    values: Sequence[float] = found["by_seed"]
    if math.isnan(found["mean"]):
        return "-"
    if len(values) < 2:
        return f"{found['mean']:{form}}"
    return f"{found['mean']:{form}} ({min(values):{form}} to {max(values):{form}})"
