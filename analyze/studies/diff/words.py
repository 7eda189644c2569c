"""The difference of targets in sentences, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze import drawing
from residual_saes.analyze.latents.targets import Targets
from residual_saes.analyze.outcome import Picture, Table
from residual_saes.analyze.stats import bracketed, formatted, resampled


def summary(figures: Mapping[str, Any]) -> list[str]:
    own = figures["own"]
    lines = [_verdict(own, figures["cosine"])]
    lines += [_of_target(name, target) for name, target in own.items()]
    first = next(iter(own.values()))
    if "null" in first:
        lines.append(_of_null(first["null"], figures["null"]))
    else:
        lines.append(
            "The null is that of permuted documents alone. It says what noise of the rows gives, "
            "not what training gives: train a crosscoder of a model with itself by store=[A,A], "
            "and give it as study.null_run=."
        )
    classes = figures["classes"]
    counts = ", ".join(f"{found['latents']:,} {name}" for name, found in classes.items())
    lines.append(
        f"By relative decoder norms (own from {figures['own_from']:g} on, shared where each target "
        f"has {figures['shared_from']:.2g} or more): {counts}; {figures['silent']:,} never fire."
    )
    if cosine := figures["cosine"]:
        lines.append(
            f"Shared latents have the same direction in all targets in {cosine['same']:,} cases "
            f"(cosine {cosine['alike_from']:g} or more), a rotated one in {cosine['rotated']:,}, "
            f"an opposite one in {cosine['opposite']:,}; the median cosine is "
            f"{cosine['median']:.2f}.{_of_null_cosine(figures['cosine_of_null'])}"
        )
    stores = ", ".join(f"store {i} is {name}" for i, name in enumerate(figures["stores"]))
    lines.append(
        f"{figures['rows']:,} rows of {figures['documents']:,} documents; {stores}. "
        f"{resampled(figures['documents'], 'document')}"
    )
    return lines


def _verdict(own: Mapping[str, Any], cosine: Mapping[str, Any] | None) -> str:
    differing = [name for name, target in own.items() if target["differs"]]
    is_tested = bool(cosine and "p" in cosine)
    reasons = []
    if differing:
        counts = ", ".join(f"{own[name]['survive']:,} of {name}" for name in differing)
        reasons.append(f"own latents that survive are {counts}")
    if cosine and is_tested and cosine["differs"]:
        turned = cosine["rotated"] + cosine["opposite"]
        reasons.append(f"{turned:,} shared latents have other directions (p = {cosine['p']:.2g})")
    if reasons:
        return f"The targets differ beyond the null: {'; '.join(reasons)}."
    line = "No difference beyond the null: no target has more own latents than it"
    if is_tested:
        return f"{line}, and no more shared latents have other directions than in it."
    return (
        f"{line}. Own latents alone are tested, for want of a study.null_run=; what both have may "
        "still differ in direction or use."
    )


def _of_target(name: str, target: Mapping[str, Any]) -> str:
    line = f"{name}: {target['latents']:,} latents are its own by their norms"
    if "shrunk" not in target:
        return f"{line}; targets of different widths have no latent scaling, so none counts."
    line += (
        f", {target['survive']:,} survive latent scaling ({target['shrunk']:,} have their "
        f"direction in another target's error, {target['decoupled']:,} in another target's "
        "reconstruction)"
    )
    permuted = target["permuted"]
    return (
        f"{line}; with targets permuted {permuted['mean']:.1f} would, at most "
        f"{permuted['most']:.0f} in 97.5% of draws; p = {target['p']:.3g}."
    )


def _of_null(null: Mapping[str, Any], path: str) -> str:
    own, survive = null["own"], null["survive"]
    return (
        f"{path}, of a model with itself, calls {own['value']:.2%} "
        f"{bracketed(own['interval'], '.2%')} of its latents a target's own, and "
        f"{survive['value']:.2%} {bracketed(survive['interval'], '.2%')} survive: of each target "
        f"here {null['expected_own']:.1f} and {null['expected_survivors']:.1f} would be false."
    )


def _of_null_cosine(cosine: Mapping[str, Any] | None) -> str:
    if cosine is None:
        return ""
    return (
        f" In the null the same are {cosine['same']:,}, {cosine['rotated']:,}, "
        f"{cosine['opposite']:,} and {cosine['median']:.2f}: what training alone gives."
    )


def tables(figures: Mapping[str, Any]) -> list[Table]:
    targets = figures["variance_explained"]
    rows = []
    for name, found in figures["classes"].items():
        density = "-" if found["density"] is None else f"{found['density']:.3%}"
        lost = [formatted(target["of_class"][name], ".4f") for target in targets.values()]
        rows.append((name, f"{found['latents']:,}", density, formatted(found["l0"], ".2f"), *lost))
    whole = [formatted(target["all"], ".4f") for target in targets.values()]
    rows.append(("all", f"{figures['features'] - figures['silent']:,}", "-", "-", *whole))
    caption = (
        "Classes of latents: how often they fire, and the variance of each target that is no "
        "longer explained where a class adds its mean alone."
    )
    explains = [f"explains of {name}" for name in targets]
    header = ("class", "latents", "median density", "firing per token", *explains)
    return [Table(caption, header, rows)]


def pictures(written: Targets) -> dict[str, Picture]:
    """How norms are shared among targets, and how alike directions are."""
    shares = written.shares
    of_two = shares.shape[1] == 2
    label = "|d_B| / (|d_A| + |d_B|)" if of_two else "largest share of a latent's norms"
    values = shares[:, 1] if of_two else shares.max(1)
    drawn = {"shares": Picture("Relative decoder norms", _histogram(values, (0, 1), label))}
    known = written.cosine[~np.isnan(written.cosine)]
    if len(known):
        caption = "Cosine of each latent's directions in the targets"
        drawn["cosines"] = Picture(caption, _histogram(known, (-1, 1), "cosine"))
    return drawn


def _histogram(values: NDArray[np.float64], ends: tuple[float, float], label: str) -> str:
    counts, edges = np.histogram(values, bins=50, range=ends)
    return drawing.histogram(counts.tolist(), edges.tolist(), label, "latents")
