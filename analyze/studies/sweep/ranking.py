"""Which setting of a sweep is best on held-out rows, and which ones cannot be told from the best.

E_a and T are sums over the rows of each document: E_a of |e_a|^2, the squared error of arm a, and T
of |x - mu|^2. w is how often each document was drawn.

    variance explained of a      1 - (w . E_a) / (w . T)
    behind the best arm b        (w . (E_a - E_b)) / (w . T)

The difference is paired: what makes a document hard for all arms cancels.

The best of several equal arms looks better than each. So the interval of a difference is one of
simultaneous intervals for all pairs: in 95 % of data sets all of them hold their true differences
at once, the pairs with the arm that happens to look best too. Their half-width is

    sqrt(c^2 s^2 + c'^2 (v_a / n_a + v_b / n_b))

s^2 is the difference's variance over documents, linearised; c is the 95 % quantile of the largest
studentised difference of any pair over resampled documents (Romano and Wolf, 2005). The rest is 0
where no setting was trained with several seeds. Else arms that differ in their seeds alone are one
setting, whose E is their mean. v is the variance between seeds, pooled over settings, or of one
setting where that is larger; n is the number of seeds; c' is the same quantile for settings that
differ in nothing but normal seeds. Two critical values, as Cochran and Cox have them: one for the
sum would be too small where a few seeds happen to be alike.

Shapes: D documents, A arms, U different seeds of settings, S settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze.studies.sweep.reading import Measured

_DRAWS = 1000
_SEED_DRAWS = 20_000  # a quantile of a t distribution with one degree of freedom needs many
_LEVEL = 0.95
_TIE = 1e-12  # of variance explained: arms nearer than this are equal

Floats = NDArray[np.float64]


class Standing(NamedTuple):
    """One arm's figures, and those of its setting beside the best setting's."""

    variance_explained: float
    interval: list[float] | None  # low, high; None of a single document
    seeds: int  # different seeds of its setting
    mean: float  # variance explained of its setting
    behind: float  # by how much the best setting explains more
    behind_interval: list[float] | None  # simultaneous; None if there are too few documents
    first_share: float  # of the resamples in which its setting is first

    @property
    def is_told(self) -> bool:
        """Whether its setting can be told from the best one."""
        return self.behind_interval is not None and self.behind_interval[0] > _TIE


class Settings(NamedTuple):
    """Which arms are of one setting, and which of those have the same seed."""

    units: Floats  # (U, A) means over the arms of a setting and seed
    means: Floats  # (S, U) means over the seeds of a setting
    counts: NDArray[np.int64]  # (S,) seeds

    @classmethod
    def of(cls, labels: list[tuple[str, str]]) -> Settings:
        """Arms by (setting, seed)."""
        units = list(dict.fromkeys(labels))
        names = list(dict.fromkeys(setting for setting, _ in units))
        of_arm = np.array([[label == unit for label in labels] for unit in units], np.float64)
        of_unit = np.array([[unit[0] == name for unit in units] for name in names], np.float64)
        counts = of_unit.sum(1)
        return cls(
            of_arm / of_arm.sum(1, keepdims=True),
            of_unit / counts[:, None],
            counts.astype(np.int64),
        )

    @property
    def of_arms(self) -> Floats:
        """(S, A) means over the arms of a setting."""
        return self.means @ self.units

    def variance(self, units: Floats) -> Floats:
        """(..., S) the variance of each setting's mean, from its seeds' values (..., U)."""
        freedom = self.counts - 1
        if not freedom.any():
            return np.zeros((*units.shape[:-1], len(self.counts)))
        member = self.means > 0
        centred = units - (units @ self.means.T) @ member
        squares = np.square(centred) @ member.T
        pooled = squares.sum(-1, keepdims=True) / freedom.sum()
        return np.asarray(np.maximum(pooled, squares / np.maximum(freedom, 1)) / self.counts)


def compare(
    measured: Measured,
    labels: Mapping[str, tuple[str, str]] | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
) -> dict[str, Standing]:
    """Each arm's standing: the best setting's arms first, and of a setting the best arm first.

    Equal ones are in the order of their names.

    Args:
        labels: each arm's (setting, seed); None: each is a setting of its own.
        draws: resamples of documents.
        seed: of everything random.
    """
    names = sorted(measured.squared_error)
    errors = np.stack([measured.squared_error[name] for name in names])
    total = measured.about_mean
    settings = Settings.of([labels[name] if labels else (name, "") for name in names])
    explained = 1 - errors.sum(1) / total.sum()
    means = settings.of_arms @ explained
    best = int(np.argmax(means))
    base = settings.of_arms[best] @ errors
    # Differences first, then sums: between equal arms the sum is exactly 0.
    behind_arms = errors - base
    behind = settings.of_arms @ behind_arms
    best_draws, arm_draws = resample(base, behind_arms, total, draws, seed)
    half = half_widths(behind, total, settings, explained, best, draws, seed)

    # How often each setting is first, if documents and seeds are drawn again.
    noise = np.sqrt(settings.variance(settings.units @ explained))
    rng = np.random.default_rng([seed, 1])
    drawn = arm_draws @ settings.of_arms.T + rng.normal(size=(draws, len(means))) * noise
    lead = drawn <= drawn.min(1, keepdims=True) + _TIE
    first = (lead / lead.sum(1, keepdims=True)).mean(0)

    intervals = np.quantile(1 - best_draws[:, None] - arm_draws, [0.025, 0.975], axis=0)
    standings = {}
    setting_of = settings.of_arms.argmax(0)
    for arm, name in enumerate(names):
        own = setting_of[arm]
        gap = float(behind[own].sum() / total.sum()) if own != best else 0.0
        has_interval = np.isfinite(half[own])
        standings[name] = Standing(
            variance_explained=float(explained[arm]),
            interval=intervals[:, arm].tolist() if len(total) > 1 else None,
            seeds=int(settings.counts[own]),
            mean=float(means[own]),
            behind=gap,
            behind_interval=[gap - float(half[own]), gap + float(half[own])]
            if has_interval
            else None,
            first_share=float(first[own]),
        )

    def rank(name: str) -> tuple[float, float, str]:
        return -standings[name].mean, -standings[name].variance_explained, name

    return {name: standings[name] for name in sorted(standings, key=rank)}


def resample(
    best: Floats, behind: Floats, total: Floats, draws: int, seed: int = 0
) -> tuple[Floats, Floats]:
    """Ratios to `total` over resampled documents: of `best` (draws,), and of `behind` (draws, A).

    The draws are those of `analyze.stats.bootstrap_ratio`, so an arm has the interval that
    study=quality gives it.

    Args:
        best: (D,) sums of each document.
        behind: (A, D) likewise.
        total: (D,) likewise.
    """
    of_best = np.empty(draws)
    of_behind = np.empty((draws, len(behind)))
    for draw, times in enumerate(_times(len(total), draws, seed)):
        whole = times @ total
        of_best[draw] = (times @ best) / whole
        of_behind[draw] = (behind @ times) / whole
    return of_best, of_behind


def _times(documents: int, draws: int, seed: int) -> list[Floats]:
    """How often each document is drawn, (D,) for each draw."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        times = np.bincount(rng.integers(0, documents, documents), minlength=documents)
        drawn.append(times.astype(np.float64))
    return drawn


# -- simultaneous intervals ------------------------------------------------------------------------


def half_widths(
    behind: Floats,
    total: Floats,
    settings: Settings,
    explained: Floats,
    best: int,
    draws: int,
    seed: int,
) -> Floats:
    """(S,) half-widths of the differences to the best setting; infinite with too few documents.

    Args:
        behind: (S, D) sums of each document, less the best setting's.
        total: (D,) likewise.
        explained: (A,) variance explained.
        best: number of the best setting.
    """
    if len(behind) == 1:
        return np.zeros(1)
    if len(total) < 2:
        return np.where(np.arange(len(behind)) == best, 0, np.inf)
    variance = differences(behind, total, np.ones(len(total)))[1][best]
    critical = document_quantile(behind, total, draws, seed)
    square = np.zeros(len(behind))
    square[variance > 0] = critical**2 * variance[variance > 0]
    if (settings.counts > 1).any():
        of_seeds = settings.variance(settings.units @ explained)
        square += seed_quantile(settings, seed) ** 2 * (of_seeds + of_seeds[best])
    square[best] = 0
    return np.sqrt(square)


def differences(sums: Floats, total: Floats, times: Floats) -> tuple[Floats, Floats]:
    """(S, S) differences of the settings' ratios to `total`, and their variances over documents.

    With u = E_a - E_b - r T, r the difference, the variance is D / (D - 1) sum w u^2 / (w . T)^2.

    Args:
        times: (D,) how often each document counts.
    """
    whole = times @ total
    ratios = sums @ times / whole
    r = ratios[:, None] - ratios
    products = (sums * times) @ sums.T
    squares = np.diag(products)[:, None] + np.diag(products) - 2 * products
    with_total = sums @ (times * total)
    crossed = with_total[:, None] - with_total
    summed = squares - 2 * r * crossed + r**2 * (times @ total**2)
    n = len(total)
    return r, np.maximum(summed, 0) / whole**2 * n / (n - 1)


def document_quantile(sums: Floats, total: Floats, draws: int, seed: int) -> float:
    """The quantile of the largest studentised difference of any pair, over resampled documents."""
    truth, _ = differences(sums, total, np.ones(len(total)))
    largest = np.empty(draws)
    for draw, times in enumerate(_times(len(total), draws, seed)):
        drawn, variance = differences(sums, total, times)
        largest[draw] = _largest(np.abs(drawn - truth), variance)
    return float(np.quantile(largest, _LEVEL, method="higher"))


def seed_quantile(settings: Settings, seed: int) -> float:
    """The same quantile of settings that are equal but for normal seeds."""
    rng = np.random.default_rng([seed, 2])
    units = rng.normal(size=(_SEED_DRAWS, settings.means.shape[1]))
    means = units @ settings.means.T
    variance = settings.variance(units)
    largest = np.zeros(_SEED_DRAWS)
    for first in range(len(settings.counts)):
        of_pair = np.abs(means - means[:, [first]]) / np.sqrt(variance + variance[:, [first]])
        largest = np.maximum(largest, of_pair.max(1))
    return float(np.quantile(largest, _LEVEL))


def _largest(difference: Floats, variance: Floats) -> float:
    """The largest of some differences over their deviations; equal arms have 0."""
    differs = difference > _TIE
    if not differs.any():
        return 0.0
    with np.errstate(divide="ignore"):
        return float((difference[differs] / np.sqrt(variance[differs])).max())
