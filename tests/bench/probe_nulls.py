"""How often study=probes finds something where there is nothing, and where there is something.

    python -m tests.bench.probe_nulls --sets 200 --out probe_nulls.json

Rows are normal. The dictionary and the random dictionary keep the 8 largest products with 96
directions each. What the label is, by name:

    random      nothing: undecided is right
    repeated    nothing, and each text is there four times, with one label
    directions  a direction; both dictionaries' directions are random, so neither is better
    alike       three columns of each: latents, dimensions and random latents have the same law
    length      the number of tokens, which one dimension has too
    absent      a direction orthogonal to all of the dictionary's
    planted     latent 0, which fires where the label is true, and on 3 % of the other rows

`latents ahead` and `dimensions ahead` count intervals of their difference that leave out 0: 2.5 %
each is nominal where they are alike.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.probes import fitting, scoring
from residual_saes.analyze.studies.probes.fitting import (
    DENSE,
    DIMENSIONS,
    LATENTS,
    LENGTH,
    RANDOM,
    Probing,
)
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress
from tests.bench.outcome import finish

KINDS = ("random", "repeated", "directions", "alike", "length", "absent", "planted")
D, F, KEPT = 24, 96, 8
K = (1, 2, 5)


class Texts(NamedTuple):
    """Made-up texts."""

    inputs: dict[str, Any]
    label: NDArray[np.int64]
    group: NDArray[np.int64]


def texts(kind: str, n: int, seed: int) -> Texts:
    """A data set of one of KINDS."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    x = rng.normal(size=(n, D))
    group = np.arange(n)
    length = rng.integers(5, 60, n)
    label = rng.permutation(n) % 2
    if kind == "repeated":
        group = group // 4
        x, label = x[group * 4], label[group * 4]
    W, random = rng.normal(size=(2, D, F))
    if kind in ("directions", "absent"):
        w = rng.normal(size=D)
        w /= np.linalg.norm(w)
        label = (x @ w + 0.5 * rng.normal(size=n) > 0).astype(np.int64)
        if kind == "absent":
            W -= np.outer(w, w @ W)
    if kind == "length":
        label = (length > np.median(length)).astype(np.int64)
        x[:, 0] = (length - 30) / 20 + 0.3 * x[:, 0]
    inputs = {LATENTS: _kept(x, W), DIMENSIONS: x, RANDOM: _kept(x, random), LENGTH: length}
    if kind == "planted":
        fires = (label == 1) | (rng.random(n) < 0.03)
        inputs[LATENTS][:, 0] = np.where(fires, 1 + rng.random(n), 0)
        # The rows have it along a direction that no dimension is near.
        x += 1.5 * fires[:, None] * rng.normal(size=D) / D**0.5
    if kind == "alike":
        for name in (LATENTS, DIMENSIONS, RANDOM):
            inputs[name] = rng.normal(size=(n, D))
            inputs[name][:, :3] += 0.5 * (label[:, None] - 0.5)
    return Texts(inputs, label, group)


def _kept(x: Floats, directions: Floats) -> Floats:
    """(n, F) the largest products of each row, as TopK keeps them."""
    products = x @ (directions / np.linalg.norm(directions, axis=0))
    least = np.sort(products, 1)[:, -KEPT, None]
    return np.where((products >= least) & (products > 0), products, 0)


def judged(made: Texts, seeds: int, draws: int, permutations: int, stop: StopRequest) -> Any:
    """The study's judgement of a data set, and its probes' scores."""
    wanted = fitting.probings(made.inputs, K)
    splits = [fitting.split(made.label, made.group, seed) for seed in range(seeds)]
    every = [fitting.judged(made.inputs, made.label, side, wanted, stop).odds for side in splits]
    weight = scoring.resampling(made.group, draws, 0)
    found = {}
    for probing, odds in zip(wanted, np.stack(every, 1), strict=True):
        found[probing] = scoring.scores(odds, made.label, weight)
    null = []
    for number in range(permutations):
        dense = [Probing(DENSE)]
        null.append(scoring.null(made.inputs, made.label, made.group, dense, number, stop)[0])
    return scoring.judgement(found, np.array(null)), found


def shares(kind: str, sets: int, n: int, stop: StopRequest) -> dict[str, float]:
    """Shares of the data sets with each verdict, and with each interval that leaves out 0."""
    counts: Counter[str] = Counter()
    progress = Progress()
    for seed in range(sets):
        judgement, found = judged(texts(kind, n, seed), 5, 300, 20, stop)
        ahead = judgement["ahead"][DIMENSIONS]["interval"]
        counts[judgement["verdict"]] += 1
        counts["latents ahead"] += ahead.low > 0
        counts["dimensions ahead"] += ahead.high < 0
        dense = found[Probing(DENSE)].auroc
        counts["dense above 0.5"] += bool(np.quantile(dense[1:], 0.025) > 0.5)
        progress.show(f"{kind}: {seed + 1}/{sets} sets", last=seed + 1 == sets)
    return {name: count / sets for name, count in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=200)
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    shape = {"sets": asked.sets, "texts": asked.texts, "d": D, "F": F, "kept": KEPT, "k": list(K)}
    figures = {}
    with StopRequest() as stop:
        for kind in asked.kinds:
            figures[kind] = shares(kind, asked.sets, asked.texts, stop)
    finish(shape, figures, asked.out)


if __name__ == "__main__":
    main()
