"""What one part of the questions chooses, and what the others say of it.

An effect that was chosen for its size is too large where it was chosen. Every figure of what is
chosen is therefore of the other questions.

Shapes: n answers, c chosen columns, L permutations of the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.questions.split import in_discovery
from residual_saes.analyze.stats import Floats, benjamini_hochberg, permutation_p
from residual_saes.analyze.studies.contrast.effects import (
    Design,
    Watched,
    columns,
    is_rare,
    largest,
)
from residual_saes.analyze.studies.contrast.means import Means
from residual_saes.data.errors import SettingError

# The reference's "top-10 |d|" of a layer; also how many features of either sign are written out.
TOP = 10
_LEAST = 2  # right answers, and wrong ones, for an effect


class Held(NamedTuple):
    """What the other questions say of c chosen columns."""

    d: Floats  # (c,)
    p: Floats  # (c,) two-sided, of each by itself
    carried: float  # mean d in the direction that was chosen
    null_95: float  # 95 % of shuffled labels are below
    carried_p: float  # one-sided


class Ranking(NamedTuple):
    """Columns with the largest d, in one direction or either."""

    ids: NDArray[np.int64]  # (c,)
    d: Floats  # (c,) where they were chosen
    held: Held | None  # None: no column, or too few right or wrong answers


class Choice(NamedTuple):
    """What was chosen, and by which questions."""

    rows: NDArray[np.int64]  # answers that chose
    others: NDArray[np.int64]  # answers that judge
    layer: int  # of the largest top-10 |d|
    dimensions: Ranking  # of that layer
    helpful: Ranking  # features
    harmful: Ranking


def choose(
    means: Means,
    kept: NDArray[np.int64],
    share: float,
    min_firing: int,
    design: dict[str, Any],
    check: Callable[[], None],
) -> Choice:
    """The layer, its dimensions and the features of largest d.

    Args:
        kept: answers that can be compared.
        share: see `split.in_discovery`.
        min_firing: choosing answers in which a feature fires, for it to be chosen.
        design: `paired`, `shuffles` and `seed` of a `Design`.
        check: is called before each part of the columns.

    Raises:
        SettingError: the choosing answers are nearly all right, or nearly all wrong.
    """
    part = means.part[kept] if means.part is not None else None
    side = in_discovery(means.question[kept], share, part)
    rows = kept[side]
    others = kept[~side]
    right = int(means.correct[rows].sum())
    if not _enough(means.correct[rows]):
        raise SettingError(
            f"of the answers that choose {right} are right and {len(rows) - right} wrong, and "
            f"{_LEAST} of each are needed; ask more with answers.questions="
        )
    choosing = _design(means, rows, {**design, "shuffles": 0})
    judging = _design(means, others, design) if _enough(means.correct[others]) else None

    # The layer and its dimensions.
    def d_of(x: Any) -> Floats:
        return np.hstack([choosing.raw.d(part)[0] for part in columns(Watched(x, check))])

    by_layer = [d_of(means.hidden[rows, layer]) for layer in range(means.hidden.shape[1])]
    layer = int(np.argmax([largest(np.abs(d)[None], TOP).mean() for d in by_layer]))
    d = by_layer[layer]
    best = np.argsort(-np.abs(d), kind="stable")[:TOP]
    values = means.hidden[others, layer][:, best]
    dimensions = Ranking(best, d[best], _held(values, d[best], judging, None))

    # Features of either sign.
    features = means.features[rows].tocsc()
    fires = np.flatnonzero(np.diff(features.indptr) >= min_firing)
    d = np.zeros(features.shape[1])
    if len(fires):
        d[fires] = d_of(features[:, fires])
    rankings = []
    for sign in (1, -1):
        best = np.argsort(-sign * d, kind="stable")[:TOP]
        best = best[sign * d[best] > 0]
        values = means.features[others][:, best].toarray()
        held = _held(values, d[best], judging, (values > 0).sum(0))
        rankings.append(Ranking(best, d[best], held))
    return Choice(rows, others, layer, dimensions, *rankings)


def _enough(correct: NDArray[np.bool_]) -> bool:
    return bool(min(correct.sum(), (~correct).sum()) >= _LEAST)


def _design(means: Means, rows: NDArray[np.int64], design: dict[str, Any]) -> Design:
    no_covariates = np.empty((len(rows), 0))
    return Design.of(means.correct[rows], means.question[rows], no_covariates, **design)


def _held(x: Any, d: Floats, design: Design | None, fired: NDArray[np.int64] | None) -> Held | None:
    """What the other answers say of columns (n, c) that were chosen for their d (c,).

    Args:
        fired: (c,) of features the answers in which each is not 0.
    """
    if design is None or not len(d):
        return None
    x = np.asarray(x, np.float64)
    plain = design.raw.d(x)
    sizes = design.raw.sizes(x)
    if fired is not None:
        sizes = np.where(is_rare(fired, design.correct), plain, sizes)
    p = [permutation_p(size[0], size[1:]) for size in np.abs(sizes).T]
    carried = (np.sign(d) * sizes).mean(1)
    return Held(
        d=plain[0],
        p=np.array(p),
        carried=float(carried[0]),
        null_95=float(np.quantile(carried[1:], 0.95)),
        carried_p=permutation_p(carried[0], carried[1:]),
    )


# -- figures ---------------------------------------------------------------------------------------


def figures(choice: Choice, means: Means) -> dict[str, Any]:
    """Everything, as plain JSON; `ids` are those of the questions that chose."""
    chose = means.correct[choice.rows]
    judged = means.correct[choice.others]
    return {
        "ids": np.unique(means.question[choice.rows]),
        "answers": len(chose),
        "right": int(chose.sum()),
        "judged_by": {
            "ids": np.unique(means.question[choice.others]),
            "answers": len(judged),
            "right": int(judged.sum()),
        },
        "peak_layer": choice.layer,
        "dimensions": _listed(choice.dimensions, "dimension"),
        "dimensions_carried": _carried(choice.dimensions),
        "helpful": _listed(choice.helpful, "feature"),
        "harmful": _listed(choice.harmful, "feature"),
        "helpful_carried": _carried(choice.helpful),
        "harmful_carried": _carried(choice.harmful),
    }


def _listed(ranking: Ranking, name: str) -> list[dict[str, Any]]:
    """A row per column: d and p in the other questions, and d where it was chosen."""
    rows = []
    held = ranking.held
    for index, column in enumerate(ranking.ids):
        found = {"d": held.d, "p": held.p, "q": benjamini_hochberg(held.p)} if held else {}
        row: dict[str, Any] = {name: int(column), "d_where_chosen": float(ranking.d[index])}
        for key in ("d", "p", "q"):
            row[key] = float(found[key][index]) if found else None
        rows.append(row)
    return rows


def _carried(ranking: Ranking) -> dict[str, float] | None:
    held = ranking.held
    if held is None:
        return None
    return {"d": held.carried, "null_95": held.null_95, "p": held.carried_p}
