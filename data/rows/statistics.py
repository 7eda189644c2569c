"""Mean and variance of the rows that training keeps, and what was left out before.

A store has exact moments of every kind of row, not of every token, and not of the rows that another
hook point keeps. So with drop_tokens, and where one of several sources drops rows that another one
keeps, the moments are those of a sample of the kept rows. It comes from the training units; in a
ring, which frees them, from the held-out units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data.rows import summary
from residual_saes.data.rows.rounds import KeptRows
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import (
    EXCLUDED,
    TRAINING,
    Policy,
    held_out_units,
    stored_kind,
    training_units,
)
from residual_saes.data.rows.summary import Summary
from residual_saes.data.site import Point
from residual_saes.data.store import retention
from residual_saes.data.store.kinds import BOS, NON_FINITE, OUTLIER, OUTLIER_NORM
from residual_saes.data.store.moments import Moments
from residual_saes.data.store.store import Store

# Rows of the samples that are read of the training units, which a thin store keeps
# (harvest/thinning.py). For means: an error of 1/500 of a channel's deviation, for reading 1.3 GB.
SAMPLED = 262_144
# For a linear map, in whole units: 25 for each dimension of E4B. They take a minute of a core.
FITTED = 65_536
_BLOCK = 4096  # rows held as float64 at a time


class Statistics(NamedTuple):
    """Statistics of the kept training rows of one source."""

    moments: Moments
    mean_norm: float


def of_training(
    store: Store, point: Point, policy: Policy, whole: Summary | None = None
) -> Statistics:
    """The statistics of the rows of one hook point that a policy keeps.

    Args:
        whole: the summary of the hook point; None: it is read, if it is needed.
    """
    kept = KeptRows([Source.of(store, point)], policy)
    return of_kept(kept, [], None if whole is None else [whole])[0]


def of_kept(
    kept: KeptRows, units: Sequence[int], wholes: Sequence[Summary] | None = None
) -> list[Statistics]:
    """The statistics of the kept training rows, of each source.

    Args:
        units: where sources that drop other rows are looked for: all training units, or those of a
            ring's first round.
        wholes: the summary of each source; None: they are read, if they are needed.
    """
    if kept.policy.drop_tokens or not kept.are_shared(units):
        return _sampled(kept.sources, kept.policy)
    if wholes is None:
        wholes = [summary.read(*source) for source in kept.sources]
    return [_exact(whole, kept.policy) for whole in wholes]


def _exact(whole: Summary, policy: Policy) -> Statistics:
    moments = whole.of(TRAINING, policy.kinds)
    norm_sum = float(whole.norm_sums[TRAINING, list(policy.kinds)].sum())
    return Statistics(moments, norm_sum / max(moments.count, 1))


def _sampled(sources: Sequence[Source], policy: Policy) -> list[Statistics]:
    """The statistics of the kept rows of some units."""
    store = sources[0].store
    is_ring = retention.read(store.place).span is not None
    units = held_out_units(store) if is_ring else training_units(store)
    moments = [Moments.empty(source.width) for source in sources]
    norm_sums = [0.0] * len(sources)
    for unit in sample(units, store.unit_tokens):
        kept = policy.keeps(sources, unit)
        for number, source in enumerate(sources):
            for block in _blocks(source, unit, kept):
                moments[number] = moments[number].merge(Moments.of(block))
            norm_sums[number] += float(source.norms(unit)[kept].sum(dtype=np.float64))
    found = []
    for of_source, norm_sum in zip(moments, norm_sums, strict=True):
        found.append(Statistics(of_source, norm_sum / max(of_source.count, 1)))
    return found


def _blocks(source: Source, unit: int, kept: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    """The kept rows of a unit, some thousand at a time."""
    rows = torch.from_numpy(source.rows(unit)[kept]).view(torch.bfloat16)
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK].double().numpy()


def sample(units: Sequence[int], unit_tokens: int, rows: int = SAMPLED) -> list[int]:
    """As many of the units as have the rows, from the first to the last; all, if they are few."""
    count = min(len(units), -(-rows // unit_tokens))
    return [units[index] for index in np.linspace(0, len(units) - 1, count).round().astype(int)]


# -- what is left out ------------------------------------------------------------------------------


class Share(NamedTuple):
    """What a rule leaves out."""

    rows: float  # of the rows
    energy: float  # of E|x|^2, the rows' mean squared norm


def left_out(kept: KeptRows, units: Sequence[int], of_units: Sequence[Summary]) -> dict[str, Share]:
    """What each rule of the policy leaves out of some training units, by the rule's setting.

    A row that several rules name counts for the first: drop_bos, drop_outliers, drop_tokens. Rows
    with NaN or infinity count nowhere. Of several sources it is what a sample of the units loses,
    and a rule's share of E|x|^2 is the mean of its shares in the sources.

    Args:
        of_units: the summary of these units, of each source.
    """
    if len(kept.sources) > 1:
        return _left_out_of_sample(kept, units)
    counts = of_units[0].counts[TRAINING]
    mean, m2 = of_units[0].moments[TRAINING].transpose(1, 0, 2)
    energies = m2.sum(1) + counts * np.square(mean).sum(1)
    dropped: dict[str, tuple[float, float]] = {}
    if kept.policy.drop_bos:
        dropped["drop_bos"] = counts[BOS], energies[BOS]
    if kept.policy.drop_outliers:
        dropped["drop_outliers"] = counts[OUTLIER], energies[OUTLIER]
    if kept.policy.drop_tokens:
        counted = kept.counted(units)
        rows = sum(of_unit.excluded for of_unit in counted)
        dropped["drop_tokens"] = rows, sum(of_unit.energy for of_unit in counted)
    return {rule: _share(*sums, counts, energies) for rule, sums in dropped.items()}


def _left_out_of_sample(kept: KeptRows, units: Sequence[int]) -> dict[str, Share]:
    tallies = [Tally() for _ in kept.sources]
    for unit in sample(units, kept.store.unit_tokens):
        kinds = kept.policy.kinds_in(kept.sources, unit)
        finite = stored_kind(kinds) != NON_FINITE
        for tally, source in zip(tallies, kept.sources, strict=True):
            norms = source.norms(unit)[finite].astype(np.float64)
            tally.add(kinds[finite], np.square(norms))
    first, *others = (tally.left_out(kept.policy) for tally in tallies)
    shares = {}
    for rule, share in first.items():
        energies = [share["energy"], *(other[rule]["energy"] for other in others)]
        shares[rule] = Share(share["rows"], float(np.mean(energies)))
    return shares


def _share(count: float, energy: float, counts: NDArray[Any], energies: NDArray[Any]) -> Share:
    """`count` rows and their energy as shares of sums by kind."""
    of_energy = float(energy / energies.sum()) if energies.any() else 0.0
    return Share(float(count / max(counts.sum(), 1)), of_energy)


class Tally:
    """Rows and their squared norms by kind, counted while they are measured."""

    def __init__(self) -> None:
        self._counts = np.zeros(2 * EXCLUDED, np.int64)
        self._energies = np.zeros(2 * EXCLUDED)

    def add(self, kinds: NDArray[np.uint8], squared: NDArray[np.float64]) -> None:
        """Count finite rows.

        Args:
            kinds: (n,) as `Policy.kinds_of` has them.
            squared: (n,) |x|^2.
        """
        self._counts += np.bincount(kinds, minlength=2 * EXCLUDED)
        self._energies += np.bincount(kinds, squared, minlength=2 * EXCLUDED)

    def left_out(self, policy: Policy) -> dict[str, dict[str, float]]:
        """What each rule leaves out of the counted rows: `count`, and as `Share` has it.

        Args:
            policy: the one whose kinds were counted, or one without drop_tokens.
        """
        kinds = np.arange(2 * EXCLUDED, dtype=np.uint8)
        if not policy.drop_tokens:
            kinds = stored_kind(kinds)
        rules = {
            "drop_bos": kinds == BOS,
            "drop_outliers": kinds == OUTLIER,
            "drop_tokens": kinds >= EXCLUDED,
        }
        shares = {}
        for rule, mask in rules.items():
            if getattr(policy, rule):
                count = int(self._counts[mask].sum())
                energy = float(self._energies[mask].sum())
                share = _share(count, energy, self._counts, self._energies)
                shares[rule] = {"count": count, **share._asdict()}
        return shares


def told(policy: Policy, shares: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """What a policy leaves out, on one line.

    Args:
        shares: `rows` and `energy` by the rule, as a run records them, or with `count`, as `Tally`
            has them; None: they are not known.
    """
    rules = {}
    if policy.drop_bos:
        rules["drop_bos"] = "BOS"
    if policy.drop_outliers:
        rules["drop_outliers"] = f"other rows above {OUTLIER_NORM:g} median norms of their unit"
    if policy.drop_tokens:
        rules["drop_tokens"] = f"token ids {', '.join(map(str, policy.drop_tokens))}"
    parts = []
    for rule, name in rules.items():
        share = (shares or {}).get(rule)
        parts.append(name if share is None else f"{name} ({_of_all(share)})")
    return ", ".join(parts) or "nothing"


def _of_all(share: Mapping[str, Any]) -> str:
    if not share["rows"]:
        return "none"
    count = f"{share['count']:,} rows: " if "count" in share else ""
    return f"{count}{share['rows']:.3%} of rows, {share['energy']:.3%} of E|x|²"
