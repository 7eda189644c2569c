"""A sweep in sentences and tables, and both as Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from residual_saes.analyze.stats import bracketed, counted, resampled
from residual_saes.analyze.studies.sweep.arms import labels, short
from residual_saes.analyze.studies.sweep.plot import formatted
from residual_saes.data.markdown import escaped, table_lines
from residual_saes.data.neutral import neutral
from residual_saes.data.rows.split import Policy
from residual_saes.data.rows.statistics import told

_ANOTHER = "another seed of it"
_FEW_SEEDS = 6  # degrees of freedom; with 6, t is 2.4 where it is 2 with many


def markdown(figures: dict[str, Any], escape: Callable[[str], str] = escaped) -> list[str]:
    """The sentences and tables as lines of Markdown.

    Args:
        escape: what is done to every sentence and cell.
    """
    lines = ["# Sweep", "", *map(escape, overview(figures))]
    for layer in figures["layers"]:
        heads, rows = table(figures, layer)
        sentences = verdict(layer, name_in(layer))
        lines += ["", f"## {heading(layer)}", "", *map(escape, sentences), ""]
        lines += table_lines(heads, rows, escape)
        if steps := next_step(layer):
            lines += ["", escape(f"To go on with {name_in(layer)(layer['choice'])}:"), ""]
            lines += [f"    {step}" for step in steps]
    if rest := left_out(figures):
        lines += ["", *map(escape, rest)]
    return lines


def heading(layer: dict[str, Any]) -> str:
    """What the arms write."""
    return str(layer.get("where", f"Layer {layer['layer']}"))


def name_in(layer: dict[str, Any]) -> Callable[[str], str]:
    """From an arm's name to the name that people see; see `labels`."""
    label = labels([arm["name"] for arm in layer["arms"]])
    return lambda name: neutral(label[name])


# -- sentences -------------------------------------------------------------------------------------


def overview(figures: dict[str, Any]) -> list[str]:
    """What was compared."""
    arms = [arm for layer in figures["layers"] for arm in layer["arms"]]
    finished = sum(arm["finished"] for arm in arms)
    model = f" on {neutral(figures['model'])}" if figures["model"] else ""
    store = f" from {neutral(figures['store'])}" if figures["store"] else ""
    return [f"{len(arms)} arms{model}{store}: {finished} finished, {len(arms) - finished} not."]


def verdict(layer: dict[str, Any], name_of: Callable[[str], str]) -> list[str]:
    """The best arm of a layer, those that cannot be told from it, and what that rests on."""
    if not layer["best"]:
        return ["No arm is finished, so none is compared."]
    figures_of = {arm["name"]: arm for arm in layer["arms"]}
    best = figures_of[layer["best"]]
    name = name_of(layer["best"])
    explained = f"variance explained {_with_interval(best, 'variance_explained')}"
    compared = [arm for arm in layer["arms"] if arm["behind_best"] is not None]
    if len(compared) == 1:
        lines = [f"Only one arm is finished: {name}, {explained}."]
    else:
        mean = _mean_of_seeds(best)
        lines = []
        if layer["not_distinguishable"]:
            lines.append(
                f"Take {name_of(layer['choice'])}. Which arm explains most is not certain."
            )
        first = f"; {_first(best)} of resamples" if layer["documents"] > 1 else ""
        lines.append(f"Best: {name}, {explained}{mean}{first}.")
        lines.append(_alike(layer, figures_of, name_of))
        if layer["not_distinguishable"]:
            lines.append(_choice(layer, figures_of, name_of))
    if len({arm["settings"].get("sae.kind") for arm in compared}) > 1:
        lines.append(
            "The arms are of several kinds: they write the same rows, and do not read the same."
        )
    lines.append(f"{_basis(layer)}. {resampled(layer['documents'], 'document')}")
    if len(compared) > 1:
        lines.append(
            "Differences have simultaneous intervals: that one arm of several looks best is "
            f"allowed for. {_seeds(layer, compared)}"
        )
    return lines


def next_step(layer: dict[str, Any]) -> list[str]:
    """The commands that use the arm to be taken.

    None if no arm is finished, or if the path has signs that mean something to a shell or a page.
    """
    chosen = [arm["run"] for arm in layer["arms"] if arm["name"] == layer["choice"]]
    if not chosen or not re.fullmatch(r"[\w ,=./-]+", chosen[0]):
        return []
    run = f"run={shlex.quote(chosen[0])}"
    return [
        f"python -m analyze study=all {run}",
        f"python -m train.export {run} to=saelens",
        f"python -m train.publish {run} repo=OWNER/NAME",
    ]


def _mean_of_seeds(arm: dict[str, Any]) -> str:
    """What the arm's setting explains on average, if it was trained with several seeds."""
    if arm["seeds"] == 1:
        return ""
    return f" (its setting with {arm['seeds']} seeds: {arm['setting_mean']:.4f} on average)"


def _seeds(layer: dict[str, Any], compared: Sequence[dict[str, Any]]) -> str:
    """What the intervals say of other training seeds."""
    if layer["seed_spread"] is None:
        return (
            "They hold what other text would change, not what another training seed would: "
            "train the arms with several seeds for that."
        )
    words = (
        "Settings are compared by the mean of their seeds, with the variation over seeds and over "
        f"documents. Arms that differ in the seed alone are up to {layer['seed_spread']:.5f} apart."
    )
    if layer["seed_freedom"] < _FEW_SEEDS:
        words += (
            f" The variation over seeds is known from {layer['seed_freedom']} seeds more than "
            "settings: so few make the intervals wide."
        )
    if any(arm["seeds"] == 1 for arm in compared):
        words += " A setting with a single seed is taken to vary as the others do."
    return words


def _choice(
    layer: dict[str, Any], figures_of: dict[str, dict[str, Any]], name_of: Callable[[str], str]
) -> str:
    """Which of the arms that cannot be told apart to take, and why."""
    names = [layer["best"], *layer["not_distinguishable"]]
    choice = figures_of[layer["choice"]]
    dead = choice["dead_share"]
    if not _has_interval(layer, figures_of):
        return (
            f"Of these {len(names)} take {name_of(layer['choice'])}: it explains most of the text "
            "measured. Harvest more documents to know whether it does of other text."
        )
    fewest = [arm for arm in map(figures_of.get, names) if arm and arm["dead_share"] == dead]
    sizes = {(arm["settings"].get("sae.d_sae"), arm["settings"].get("sae.k")) for arm in fewest}
    if len(fewest) == 1:
        why = "has the fewest dead latents"
    elif len(sizes) > 1:
        why = "is the smallest of those with the fewest dead latents"
    else:
        why = "comes first of those with the fewest dead latents"
    share = "not recorded" if dead is None else f"{dead:.1%}"
    return (
        f"Of these {len(names)} take {name_of(layer['choice'])}: it {why} ({share}), and the text "
        "measured does not say which explains more."
    )


def _has_interval(layer: dict[str, Any], figures_of: dict[str, dict[str, Any]]) -> bool:
    """Whether the text gives intervals of the differences of arms that are not told apart."""
    names = layer["not_distinguishable"]
    return any(figures_of[name]["behind_best_95"] is not None for name in names)


def _first(arm: dict[str, Any]) -> str:
    """In how many resamples of the documents an arm explains most."""
    return f"first in {arm['first_share']:.0%}"


def _alike(
    layer: dict[str, Any], figures_of: dict[str, dict[str, Any]], name_of: Callable[[str], str]
) -> str:
    """The arms that cannot be told from the best."""
    if not layer["not_distinguishable"]:
        return "Every other arm is distinguishable from it: no interval of a difference includes 0."
    arms = []
    has_interval = _has_interval(layer, figures_of)
    for name in layer["not_distinguishable"]:
        arm = figures_of[name]
        share = _ANOTHER if _is_another(arm) else _first(arm) if layer["documents"] > 1 else ""
        arms.append(f"{name_of(name)} ({share})" if share else name_of(name))
    why = (
        "the interval of the difference includes 0" if has_interval else "there is too little text"
    )
    return f"Not distinguishable from the best, {why}: {'; '.join(arms)}."


def _basis(layer: dict[str, Any]) -> str:
    """The rows that a layer's arms are measured on."""
    rules = ("drop_bos", "drop_outliers", "drop_tokens")
    policy = Policy.of({rule: layer[rule] for rule in rules if rule in layer})
    basis = (
        f"Measured on {layer['rows']:,} held-out rows of "
        f"{counted(layer['documents'], 'document')}, left out: {told(policy, layer['left_out'])}"
    )
    if not layer["one_policy"]:
        basis += ", those that every arm's policy keeps (the arms were trained with different ones)"
    return basis


def left_out(figures: dict[str, Any]) -> list[str]:
    """A line for each arm that takes no part."""
    lines = []
    for layer in figures["layers"]:
        for arm in layer["arms"]:
            if not arm["finished"]:
                lines.append(
                    f"Not finished, left out of the comparison: {neutral(arm['name'])} "
                    f"(step {arm['step']:,} of {arm['steps']:,})."
                )
    for name, error in figures["damaged"].items():
        lines.append(f"Damaged: {neutral(name)}: {neutral(error)}")
    return lines


# -- the table -------------------------------------------------------------------------------------


def table(figures: dict[str, Any], layer: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads, and a row of text for each arm."""
    keys = _columns(figures, layer)
    names = short(keys)
    name_of = name_in(layer)
    heads = ["arm", *(names[key] for key in keys), "variance explained", "behind the best", "first"]
    heads += ["mse", "dead", "coverage", "L0", "tokens", "tokens/s", "finished"]
    rows = []
    for arm in layer["arms"]:
        behind = "best" if arm["name"] == layer["best"] else _behind(arm)
        step = f"step {arm['step']:,} of {arm['steps']:,}"
        rows.append(
            [
                name_of(arm["name"]),
                *(formatted(arm["settings"][key]) for key in keys),
                _with_interval(arm, "variance_explained"),
                behind,
                _number(arm["first_share"], ".0%"),
                _number(arm["mse"], ".4g"),
                _number(arm["dead_share"], ".1%"),
                _number(arm["coverage"], ".1%"),
                _number(arm["l0"], ".1f"),
                f"{arm['tokens']:,}" if arm["tokens"] else "-",
                _number(arm["tokens_per_s"], ",.0f"),
                "yes" if arm["finished"] else step,
            ]
        )
    return heads, rows


def _columns(figures: dict[str, Any], layer: dict[str, Any]) -> list[str]:
    """The settings that get a column: those that differ in this layer, the learning rate first."""
    keys = []
    for key in figures["settings"]:
        values = {formatted(arm["settings"][key]) for arm in layer["arms"]}
        if key not in ("layer", "tokens") and len(values) > 1:
            keys.append(key)
    return sorted(keys, key=lambda key: key != "optim.lr")


def _is_another(arm: dict[str, Any]) -> bool:
    """Whether an arm other than the best is of the best setting."""
    return (arm["seeds"] or 1) > 1 and arm["behind_best"] == 0


def _behind(arm: dict[str, Any]) -> str:
    """How far behind the best an arm's setting is."""
    return _ANOTHER if _is_another(arm) else _with_interval(arm, "behind_best", 5)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_interval(arm: dict[str, Any], key: str, digits: int = 4) -> str:
    value = _number(arm[key], f".{digits}f")
    interval = arm[f"{key}_95"]
    if arm["behind_best"] is None:  # not compared
        return value
    return f"{value} {bracketed(interval, f'.{digits}f')}"
