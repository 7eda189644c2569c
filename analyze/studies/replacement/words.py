"""A replaced model in sentences, tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from residual_saes.analyze.drawing import Line, bands
from residual_saes.analyze.losses import ALL, TRAINED
from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.stats import formatted, resampled
from residual_saes.analyze.studies.replacement.spliced import IDENTITY, LINEAR, TRANSCODERS
from residual_saes.data.neutral import neutral

_COLUMNS = {  # of the table: figure, head and form
    "ce": ("CE (nats)", ".4f"),
    "difference": ("more than the model", "+.4f"),
    "loss_recovered": ("loss recovered", ".2%"),
    "kl": ("KL (nats)", ".4f"),
}


def outcome_of(figures: Mapping[str, Any]) -> Outcome:
    """All that the page says."""
    layers = _by_layer(figures)
    tables = [_all_layers(figures)]
    pictures = {}
    if len(layers) > 1:
        tables.append(_each_layer(layers))
        caption = "Cross entropy more than the model's, by the layers that are replaced"
        pictures["replacement"] = Picture(caption, _picture(layers))
    return Outcome(dict(figures), summary(figures), tables, pictures)


def transcoders(runs: Sequence[Mapping[str, Any]]) -> Table:
    """The runs of the transcoders."""
    rows = []
    for run in runs:
        skip = "yes" if run["skip"] else "no"
        rows.append((str(run["layer"]), neutral(str(run["run"])), f"{run['d_sae']:,}", skip))
    return Table("Transcoders", ("layer", "run", "latents", "skip"), rows)


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The verdict first."""
    verdict = figures["verdict"]
    own = find(figures, TRANSCODERS)
    replaced = len(figures["runs"])
    holds = [name for name, is_so in verdict["conditions"].items() if is_so]
    broken = [name for name, is_so in verdict["conditions"].items() if not is_so]
    lines = [f"The replaced model {'passes' if verdict['passes'] else 'does not pass'}."]
    for said, names in (("It holds that", holds), ("It does not hold that", broken)):
        if names:
            lines[0] += f" {said} {'; '.join(names)}."
    lines.append(
        f"With {replaced} of {figures['model_layers']} MLPs of {neutral(str(figures['model']))} "
        f"replaced by transcoders at {TRAINED}, the model loses "
        f"{formatted(own['difference'], '.4f')} nats per token: CE {formatted(own['ce'], '.4f')} "
        f"where the model itself has {formatted(figures['clean']['ce'], '.4f')}, KL "
        f"{formatted(own['kl'], '.4f')}, loss recovered "
        f"{formatted(own['loss_recovered'], '.2%')} of what mean ablation costs. At {ALL} it loses "
        f"{formatted(find(figures, TRANSCODERS, ALL)['difference'], '.4f')}."
    )
    if other := find(figures, LINEAR):
        lines[-1] += f" Linear maps cost {formatted(other['difference'], '.4f')}."
    moved = find(figures, IDENTITY)["largest_difference"]
    lines.append(
        "With the errors added back no token's loss changes, exactly."
        if moved == 0
        else "With the errors added back, which must change nothing, a token's loss moves by up to "
        f"{moved:.1e} nats: no figure here is better than that."
    )
    lines.append(
        f"{figures['tokens']:,} held-out tokens of {figures['documents']:,} documents. "
        f"{resampled(figures['documents'], 'document')} Differences are paired."
    )
    return lines


def find(figures: Mapping[str, Any], name: str, where: str = TRAINED) -> dict[str, Any]:
    """The figures of a way with all layers; empty if it was not measured."""
    every = [run["layer"] for run in figures["runs"]]
    for row in figures["rows"]:
        if (row["name"], row["where"], list(row["layers"])) == (name, where, every):
            return dict(row)
    return {}


def _all_layers(figures: Mapping[str, Any]) -> Table:
    """Every way with all layers."""
    every = [run["layer"] for run in figures["runs"]]
    header = ("MLPs replaced by", "where", *(head for head, _ in _COLUMNS.values()))
    rows = [("the model itself", "", *_cells(figures["clean"]))]
    for row in figures["rows"]:
        if list(row["layers"]) == every:
            rows.append((row["name"], row["where"], *_cells(row)))
    layers = ", ".join(map(str, every))
    return Table(f"MLPs of layers {layers} replaced at once, nats per token", header, rows)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    cells = []
    for key, (_, form) in _COLUMNS.items():
        cells.append(formatted(row[key], form) if key in row else "")
    return tuple(cells)


def _by_layer(figures: Mapping[str, Any]) -> dict[int, tuple[dict[str, Any], dict[str, Any]]]:
    """By layer the figures of its transcoder alone, and of all up to it."""
    every = [run["layer"] for run in figures["runs"]]
    by_layers = {}
    for row in figures["rows"]:
        if row["name"] == TRANSCODERS and row["where"] == TRAINED:
            by_layers[tuple(row["layers"])] = row
    found = {}
    for count, layer in enumerate(every, 1):
        found[layer] = (by_layers[layer,], by_layers[tuple(every[:count])])
    return found


def _each_layer(layers: Mapping[int, tuple[dict[str, Any], dict[str, Any]]]) -> Table:
    header = ("layer", "alone: CE more", "alone: KL", "up to it: CE more", "up to it: KL")
    rows: list[tuple[str, ...]] = []
    for layer, both in layers.items():
        cells = [str(layer)]
        for row in both:
            cells += [formatted(row["difference"], "+.4f"), formatted(row["kl"], ".4f")]
        rows.append(tuple(cells))
    return Table("Layer by layer, nats per token", header, rows)


def _picture(layers: Mapping[int, tuple[dict[str, Any], dict[str, Any]]]) -> str:
    lines = {}
    for number, name in enumerate(("alone", "all up to it")):
        costs = [both[number]["difference"] for both in layers.values()]
        values = [cost["value"] for cost in costs]
        lines[name] = Line(list(layers), values, [cost["interval"] for cost in costs])
    return bands(lines, "layer", "CE more than the model's, nats")
