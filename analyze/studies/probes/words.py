"""Probes in sentences and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from residual_saes.analyze.outcome import Table
from residual_saes.analyze.stats import formatted, resampled
from residual_saes.analyze.studies.probes.fitting import (
    DENSE,
    DIMENSIONS,
    LATENTS,
    LENGTH,
    MEANS,
    RANDOM,
    Probing,
)

_NAMED = {DENSE: "dense probe", MEANS: "difference of means", LENGTH: "length"}
_FIRST = 3  # latents of a class that are named


def summary(figures: Mapping[str, Any]) -> list[str]:
    """The verdict with its rule, then what it rests on."""
    own = {record["probe"]: record for record in figures["sites"][figures["own"]]}
    dense = own[DENSE]
    few, many = _ends(figures)
    ahead = figures["ahead"]
    because = f" ({'; '.join(figures['why'])})" if figures["why"] else ""
    lines = [
        f"Verdict: {figures['verdict']}{because}. The rule: {figures['rule']}.",
        f"Averaged over k, the latents' AUROC is {formatted(figures['latents'], '.3f')}. Less that "
        f"of as many dimensions it is {formatted(ahead[DIMENSIONS], '+.3f')}, less that of as many "
        f"random latents {formatted(ahead[RANDOM], '+.3f')}, less that of the length "
        f"{formatted(ahead[LENGTH], '+.3f')}, less that of the dense probe "
        f"{formatted(ahead[DENSE], '+.3f')}; these four with 99% intervals.",
        f"The dense probe of {figures['own']} has {formatted(dense['auroc'], '.3f')} (p = "
        f"{figures['p_of_dense']:.2g}), its balanced accuracy is "
        f"{formatted(dense['balanced'], '.3f')}. {_keeps(own[few], few)} {_keeps(own[many], many)}",
    ]
    if figures["verdict"] == "better":
        lines.append(
            "Probes of few latents do not tell variants of one architecture apart (arXiv "
            "2605.18229), so this ranks no arms of a sweep."
        )
    if len(figures["sites"]) > 1:
        lines.append(_over_sites(figures["sites"]))
    return [*lines, *_about(figures)]


def _ends(figures: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the probes of the fewest and of the most latents."""
    sizes = figures["options"]["k"]
    return str(Probing(LATENTS, sizes[0])), str(Probing(LATENTS, sizes[-1]))


def _keeps(record: Mapping[str, Any], name: str) -> str:
    return (
        f"{name}: {formatted(record['auroc'], '.3f')}, "
        f"{formatted(record['kept'], '.0%')} of what the dense probe has above chance."
    )


def _over_sites(sites: Mapping[str, Any]) -> str:
    dense = {}
    for name, records in sites.items():
        dense[name] = next(record["auroc"] for record in records if record["probe"] == DENSE)
    best = max(dense, key=lambda name: dense[name]["value"])
    worst = min(dense, key=lambda name: dense[name]["value"])
    return (
        f"Among {len(sites)} layers the dense probe is best at {best} "
        f"({formatted(dense[best], '.3f')}) and worst at {worst} "
        f"({formatted(dense[worst], '.3f')}); the best of several is flattered by the choice."
    )


def _about(figures: Mapping[str, Any]) -> list[str]:
    chance = figures["chance"]
    options = figures["options"]
    classes = max(2, len(figures["classes"]))
    lines = [
        f"{figures['texts']:,} texts in {figures['groups']:,} groups, {classes} classes by "
        f"{figures['label']}, pooled by {options['pooling']}; {options['seeds']} splits, each with "
        "its own choice of columns, penalty and probe. Chance is an AUROC of 0.5 and a balanced "
        f"accuracy of {chance['balanced']:.3f}; to name the largest class always gives an accuracy "
        f"of {chance['accuracy']:.3f}. {resampled(figures['groups'], 'group')}"
    ]
    if figures["repeated"]:
        lines.append(
            f"{figures['repeated']:,} texts are there before, {figures['contradicting']:,} of them "
            "with another label; the same texts are always on one side."
        )
    if figures["left_out"]:
        few = ", ".join(f"{name} ({count})" for name, count in figures["left_out"].items())
        lines.append(f"Left out, for want of texts: {few}.")
    return lines


# -- tables ----------------------------------------------------------------------------------------


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Every probe of every site, and the latents of each class."""
    header = ("probe", "AUROC", "of the dense probe", "balanced accuracy", "accuracy", "null, 95%")
    drawn = []
    for name, records in figures["sites"].items():
        rows = [_row(record, figures["null"]) for record in records]
        is_own = name == figures["own"]
        more = f", which the {figures['noun']} reads" if is_own else ""
        drawn.append(Table(f"Probes at {name}{more}", header, rows))
    few, many = _ends(figures)
    of_classes = []
    for found in figures["classes"]:
        named = [f"{latent} ({times})" for latent, times in found["first_latents"][:_FIRST]]
        cells = [f"{found['auroc'][probe]:.3f}" for probe in (few, many, DENSE)]
        of_classes.append((found["class"], f"{found['texts']:,}", ", ".join(named), *cells))
    caption = "Classes, each against the rest: the latent chosen first, and in how many splits"
    header = ("class", "texts", "latents", f"AUROC of {few}", f"of {many}", "of dense")
    return [*drawn, Table(caption, header, of_classes)]


def _row(record: Mapping[str, Any], null: Mapping[str, Any]) -> tuple[str, ...]:
    of_null = null.get(record["probe"]) if "kept" in record or record["probe"] == DENSE else None
    return (
        _NAMED.get(record["probe"], record["probe"]),
        formatted(record["auroc"], ".3f"),
        formatted(record["kept"], ".0%") if "kept" in record else "-",
        formatted(record["balanced"], ".3f"),
        formatted(record["accuracy"], ".3f"),
        f"{of_null['most']:.3f}" if of_null else "-",
    )
