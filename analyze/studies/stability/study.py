"""Which latents another run finds, too: two SAEs' latents matched on identical rows of the same
store.

The other run may differ in seed, settings, size or layer; both read the same tokens. A latent's
partner is the other run's latent with the largest correlation of activations, chosen on half of the
documents; the correlation that counts is that on the other half (see `matching`). Beside it stands
the cosine of decoder directions, each latent's largest (their mean is MMCS; Sharkey, Braun and
Millidge, 2022).

Nulls: a random dictionary (directions normal with the second moments of the other run's decoder,
encoder = decoder transposed, TopK with its k) on the same rows, which says what any dictionary
would match; and the other run's own activations shifted along the text by about half of the rows,
which says what remains of latents' densities alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse

from analyze import directions
from analyze import drawing as pictures
from analyze import subject as subjects
from analyze.outcome import Outcome, Picture, Table
from analyze.stats import percentiles
from analyze.studies.stability import matching
from analyze.studies.stability.matching import NONE, Codes, Measured
from analyze.study import Column, Definition, Study, write_features
from analyze.subject import Subject, Unit
from data.errors import SettingError, StopRequest, StoreError
from data.journal import Progress
from data.settings import build
from train.sae import SAE

FILE = "matches.parquet"
SEED = 0  # of the halves, the random dictionary and the resampling
DRAWS = 200  # of documents
LEVELS = (0.7, 0.9)
_ASSIGNED = (
    4096  # latents up to which the best one-to-one assignment is found: 134 MB, and half a minute
)


@dataclass(frozen=True)
class Options:
    """What a run is compared with."""

    other: str | None = None  # directory of another finished run on the same store
    rows: int = (
        250_000  # held-out rows at most, in whole units: memory is about 64 bytes * k for each
    )

    def __post_init__(self) -> None:
        if not self.other:
            raise SettingError(
                "study.other is missing; give another finished run on the same store, as study.other="
            )
        if self.rows < 1:
            raise SettingError(f"study.rows={self.rows} must be at least 1")


class Coded(NamedTuple):
    """Activations of the three dictionaries on the same rows, in the order of the text."""

    ours: Codes
    theirs: Codes
    random: Codes
    document: NDArray[np.int64]


class Match(NamedTuple):
    """One dictionary's latents matched with another's."""

    partner: NDArray[np.int64]  # (F,)
    mutual: NDArray[np.bool_]  # (F,)
    chosen: NDArray[np.float64]  # (F,) correlation on the documents on which it was chosen
    measured: Measured  # on the others


def other_of(study: Study) -> Subject:
    """The run that is compared with.

    Raises:
        StoreError: it is missing, unfinished, or of another store.
        SettingError: it is the run itself.
    """
    options = build(Options, "study", study.options)
    assert options.other is not None
    return study.subject.beside(options.other)


def inputs(study: Study) -> Mapping[str, Any]:
    """What the result depends on beside the settings, for `Study.perform`."""
    return {"other_sae": other_of(study).digest}


def stability(study: Study) -> Outcome:
    """How much of a run's dictionary another run has, with nulls and intervals."""
    options, ours, theirs = build(Options, "study", study.options), study.subject, other_of(study)
    drawn = random_dictionary(theirs.sae)
    with StopRequest() as stop:
        coded = encode(ours, theirs, drawn, options.rows, stop)
        half = _half(coded.document)
        shift = int(
            np.random.default_rng(SEED).integers(len(half) // 4, max(3 * len(half) // 4, 1))
        )
        found = {}
        for name, codes in (
            ("other", coded.theirs),
            ("random", coded.random),
            ("shifted", _rolled(coded.theirs, shift)),
        ):
            stop.check()
            found[name] = match(coded.ours, codes, coded.document, half)
    return _outcome(study, theirs, coded, half, found, drawn)


# -- the pass --------------------------------------------------------------------------------------


def random_dictionary(sae: SAE) -> SAE:
    """Directions normal with the second moments of another decoder's, about 0, scaled to norm 1; no
    encoder bias.
    """
    W = sae.W_dec.cpu().double()
    values, vectors = torch.linalg.eigh(W.T @ W / len(W))
    normal = torch.randn(W.shape, generator=torch.Generator().manual_seed(SEED)).double()
    drawn = normal * values.clamp_min(0).sqrt() @ vectors.T
    W_dec = directions.unit(drawn).float().to(sae.W_dec.device)
    return SAE.of(W_dec.clone().T, W_dec, torch.zeros_like(sae.b_enc), sae.b_dec, sae.k)


@torch.inference_mode()
def encode(ours: Subject, theirs: Subject, drawn: SAE, limit: int, stop: StopRequest) -> Coded:
    """All three on the held-out rows that both runs' policies keep at their layers, BOS never."""
    parts: list[tuple[Any, ...]] = []
    progress = Progress()
    for one, two in zip(ours.rows(limit), theirs.rows(limit), strict=False):
        stop.check()
        first, second = _shared(ours, one, theirs, two)
        codes = [
            _codes(ours.sae, one, first),
            _codes(theirs.sae, two, second),
            _codes(drawn, two, second),
        ]
        parts.append((*codes, one.document[first].astype(np.int64)))
        progress.show(f"encoded unit {one.number}")
    if not sum(part[0].shape[0] for part in parts):
        raise StoreError(f"no held-out row of {ours.store.name} passes both runs' policies")
    *codes, document = zip(*parts, strict=True)
    return Coded._make(
        [*(sparse.vstack(column, format="csr") for column in codes), np.concatenate(document)]
    )


def _shared(
    ours: Subject, one: Unit, theirs: Subject, two: Unit
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of both of a unit's layers that belong to the same tokens, in the order of the
    text.
    """
    assert one.number == two.number
    first = ours.text_rows(one)
    second = theirs.text_rows(two)
    _, of_first, of_second = np.intersect1d(
        one.local[first], two.local[second], assume_unique=True, return_indices=True
    )
    return first[of_first], second[of_second]


def _codes(sae: SAE, unit: Unit, rows: NDArray[np.int64]) -> Codes:
    """(n, F) activations of some of a unit's rows."""
    latent, row, value = (column.cpu().numpy() for column in subjects.encode(sae, unit, rows))
    return sparse.csr_array((value, (row, latent)), shape=(len(rows), sae.d_sae))


def _rolled(codes: Codes, by: int) -> Codes:
    return sparse.csr_array(sparse.vstack([codes[by:], codes[:by]], format="csr"))


def _half(document: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) whether a row belongs to the random half of the documents on which partners are
    chosen.
    """
    names, which = np.unique(document, return_inverse=True)
    if len(names) < 2:
        raise StoreError(
            "the rows are of a single document, so no other is left to measure on; give more study.rows="
        )
    chosen = np.random.default_rng(SEED).permutation(len(names)) < len(names) // 2
    return chosen[which]


def match(
    ours: Codes, theirs: Codes, document: NDArray[np.int64], half: NDArray[np.bool_]
) -> Match:
    """Partners by one half of the documents, their correlations by the other."""
    choose, rest = np.flatnonzero(half), np.flatnonzero(~half)
    best = matching.best_partners(ours[choose], theirs[choose])
    back = np.where(best.ours == NONE, NONE, best.theirs[best.ours])
    mutual = back == np.arange(len(back))
    measured = matching.measure(ours[rest], theirs[rest], best.ours, document[rest], DRAWS, SEED)
    return Match(best.ours, mutual, best.correlation, measured)


# -- figures ---------------------------------------------------------------------------------------


def _said(one: Match, alive: NDArray[np.bool_]) -> dict[str, Any]:
    """Figures over latents that fire on both halves."""
    r, draws = one.measured.r[alive], one.measured.draws[:, alive]
    return {
        "correlation": float(np.mean(r)),
        "correlation_95": list(percentiles(np.nanmean(draws, axis=1))),
        "correlation_where_chosen": float(one.chosen[alive].mean()),
        "mutual": float(one.mutual[alive].mean()),
        "above": {
            str(level): {
                "share": float((r >= level).mean()),
                "share_95": list(percentiles(_share(draws, level))),
            }
            for level in LEVELS
        },
    }


def _share(draws: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """(draws,) share at `level` or more, of the latents that fire in a draw's documents."""
    return np.asarray((draws >= level).sum(1) / (~np.isnan(draws)).sum(1), np.float64)


def _cosines(of: SAE, among: SAE) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    values, ids = directions.nearest(of.W_dec, among.W_dec, 1)
    return values[:, 0].cpu().numpy(), ids[:, 0].cpu().numpy()


def _pair_cosines(of: SAE, among: SAE, partner: NDArray[np.int64]) -> NDArray[np.float32]:
    """(F,) of each latent's direction and its partner's; NaN without one."""
    theirs = directions.unit(among.W_dec)[
        torch.from_numpy(np.maximum(partner, 0)).to(among.W_dec.device)
    ]
    found = (directions.unit(of.W_dec) * theirs).sum(1).cpu().numpy()
    return np.where(partner == NONE, np.float32("nan"), found)


def _cosine_figures(cosine: NDArray[np.float32]) -> dict[str, Any]:
    above = {str(level): float((cosine >= level).mean()) for level in LEVELS}
    return {"mean_max_cosine": float(cosine.mean()), "above": above}


def _by_density(
    density: NDArray[np.float64], r: NDArray[np.float64], cosine: NDArray[Any]
) -> list[dict[str, Any]]:
    """Figures by decile of density, of latents that are alive."""
    order = np.argsort(density, kind="stable")
    return [
        {
            "from": float(density[part[0]]),
            "to": float(density[part[-1]]),
            "latents": len(part),
            "correlation": float(r[part].mean()),
            "above_0.7": float((r[part] >= LEVELS[0]).mean()),
            "max_cosine": float(cosine[part].mean()),
        }
        for part in np.array_split(order, 10)
        if len(part)
    ]


def _assigned(coded: Coded, half: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Measured] | None:
    """The best one-to-one assignment by one half, measured on the other; None if there are too many
    latents.
    """
    if max(coded.ours.shape[1], coded.theirs.shape[1]) > _ASSIGNED:
        return None
    choose, rest = np.flatnonzero(half), np.flatnonzero(~half)
    partner = matching.assignment(matching.correlations(coded.ours[choose], coded.theirs[choose]))
    measured = matching.measure(
        coded.ours[rest], coded.theirs[rest], partner, coded.document[rest], DRAWS, SEED
    )
    return partner, measured


# -- output ----------------------------------------------------------------------------------------


def _outcome(
    study: Study,
    theirs: Subject,
    coded: Coded,
    half: NDArray[np.bool_],
    found: dict[str, Match],
    drawn: SAE,
) -> Outcome:
    ours, other = study.subject.sae, found["other"]
    fires = [np.bincount(coded.ours[rows].indices, minlength=ours.d_sae) for rows in (half, ~half)]
    alive, density = (fires[0] > 0) & (fires[1] > 0), (fires[0] + fires[1]) / len(half)
    if not alive.any():
        raise StoreError("no latent fires on both halves of the documents; give more study.rows=")
    cosine, nearest = _cosines(ours, theirs.sae)
    assigned = _assigned(coded, half)
    columns = {
        "feature": pa.array(np.arange(ours.d_sae), pa.uint32()),
        "density": pa.array(density),
        "partner": pa.array(other.partner, pa.int64(), mask=other.partner == NONE),
        "correlation": pa.array(other.measured.r, mask=~alive),
        "mutual": pa.array(other.mutual),
        "partner_cosine": pa.array(
            _pair_cosines(ours, theirs.sae, other.partner), mask=other.partner == NONE
        ),
        "nearest": pa.array(nearest),
        "cosine": pa.array(cosine),
    }
    if assigned:
        columns["assigned"] = pa.array(assigned[0], mask=assigned[0] == NONE)
        columns["assigned_correlation"] = pa.array(assigned[1].r, mask=~alive)
    write_features(study.folder / FILE, columns)
    figures: dict[str, Any] = {
        "other": str(theirs.run),
        "layers": [study.subject.layer, theirs.layer],
        "rows": len(half),
        "documents": len(np.unique(coded.document)),
        "seed": SEED,
        "features": [ours.d_sae, theirs.sae.d_sae],
        "alive": int(alive.sum()),
        "matched": {name: _said(one, alive) for name, one in found.items()},
        "assigned": _assigned_figures(assigned, alive),
        "cosine": {
            "other": _cosine_figures(cosine[alive]),
            "random": _cosine_figures(_cosines(ours, drawn)[0][alive]),
        },
        "by_density": _by_density(density[alive], other.measured.r[alive], cosine[alive]),
        "file": FILE,
    }
    return Outcome(
        figures, _summary(figures), _tables(figures), _pictures(found, alive, figures["by_density"])
    )


def _assigned_figures(
    assigned: tuple[NDArray[np.int64], Measured] | None, alive: NDArray[np.bool_]
) -> dict[str, Any] | None:
    if assigned is None:
        return None
    r, draws = assigned[1].r[alive], assigned[1].draws[:, alive]
    return {
        "correlation": float(r.mean()),
        "correlation_95": list(percentiles(np.nanmean(draws, axis=1))),
    }


def _interval(value: float, interval: list[float], form: str = ".1%") -> str:
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def _summary(figures: dict[str, Any]) -> list[str]:
    other, random, shifted = (figures["matched"][name] for name in ("other", "random", "shifted"))
    level = str(LEVELS[0])
    cosines = figures["cosine"]
    lines = [
        f"{_interval(other['above'][level]['share'], other['above'][level]['share_95'])} of the {figures['alive']:,} "
        f"latents have a partner in {figures['other']} with a correlation of {level} or more; in a random dictionary "
        f"{random['above'][level]['share']:.1%} have, and with the other's rows shifted "
        f"{shifted['above'][level]['share']:.1%}.",
        f"Mean correlation with the partner {_interval(other['correlation'], other['correlation_95'], '.3f')}, "
        f"random dictionary {random['correlation']:.3f}, shifted {shifted['correlation']:.3f}; on the documents on "
        f"which partners were chosen it is {other['correlation_where_chosen']:.3f}.",
        f"Mean of the largest decoder cosines {cosines['other']['mean_max_cosine']:.3f}, of random directions with the "
        f"same second moments {cosines['random']['mean_max_cosine']:.3f}.",
        f"Each is the other's best for {other['mutual']:.1%} of latents ({random['mutual']:.1%} in a random "
        "dictionary). "
        + (
            "There are too many latents for a one-to-one assignment."
            if figures["assigned"] is None
            else "One to one, the mean correlation is "
            f"{_interval(figures['assigned']['correlation'], figures['assigned']['correlation_95'], '.3f')}."
        ),
        f"{figures['rows']:,} rows of {figures['documents']:,} documents, half of them to choose partners and half to "
        "measure; brackets are 95 % intervals from resampling the latter. Latents that are silent in a half are left "
        "out.",
    ]
    if figures["layers"][0] != figures["layers"][1]:
        lines.append(
            f"The two are of layers {figures['layers'][0]} and {figures['layers'][1]}, on the same tokens."
        )
    return lines


def _tables(figures: dict[str, Any]) -> list[Table]:
    rows = [
        (
            f"{row['from']:.2e} to {row['to']:.2e}",
            f"{row['latents']:,}",
            f"{row['correlation']:.3f}",
            f"{row['above_0.7']:.1%}",
            f"{row['max_cosine']:.3f}",
        )
        for row in figures["by_density"]
    ]
    header = ("density", "latents", "correlation", "0.7 or more", "largest cosine")
    return [Table("Stability by tenths of the ranking by density.", header, rows)]


def _pictures(
    found: dict[str, Match], alive: NDArray[np.bool_], by_density: list[Any]
) -> dict[str, Picture]:
    names = {"other": "other run", "random": "random dictionary", "shifted": "rows shifted"}
    levels = np.linspace(0, 1, 101)
    shares = {
        label: [
            (float(level), float((found[name].measured.r[alive] >= level).mean()))
            for level in levels
        ]
        for name, label in names.items()
    }
    density = {"other run": [(row["to"], row["correlation"]) for row in by_density]}
    return {
        "partners": Picture(
            "Share of latents whose partner correlates at least so much, on documents on which it was not chosen",
            pictures.curves(shares, "correlation", "share of latents"),
        ),
        "density": Picture(
            "Mean correlation with the partner by tenths of density",
            pictures.curves(density, "density", "correlation", log=True),
        ),
    }


DEFINITION = Definition(
    stability,
    options=Options,
    inputs=inputs,
    order=90,
    columns=(
        Column(
            "correlation",
            "stability",
            "stability",
            "correlation with its partner in another run (study=stability)",
        ),
    ),
    table=FILE,
)
