"""Which latents another run finds, too: two SAEs' latents matched on identical rows of one store.

The other run may differ in seed, settings, size or layer; both read the same tokens. A latent's
partner is the other run's latent with the largest correlation of activations, chosen on half of the
documents. The correlation that counts is that on the other half (see matching.py). Beside it stands
each latent's largest cosine of decoder directions (their mean is MMCS; Sharkey, Braun and Millidge,
2022).

Nulls:
    random    a random dictionary on the same rows: directions normal with the second moments of the
              other run's decoder, encoder = decoder transposed, TopK with its k. It says what any
              dictionary would match.
    shifted   the other run's own activations, shifted along the text by about half of the rows.
              They say what latents' densities alone would match.

Shapes: n rows, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.latents import directions, encoding, matching
from residual_saes.analyze.latents.codes import Codes, choosing_half, codes_of, shared_rows
from residual_saes.analyze.latents.matching import NONE, Measured
from residual_saes.analyze.latents.nearest import nearest, unit
from residual_saes.analyze.memory import Needed, of_pass, of_sae, rows_read
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.peers import imported
from residual_saes.analyze.stats import Floats, Interval, percentiles
from residual_saes.analyze.studies.stability import words
from residual_saes.analyze.study import Column, Definition, Study, write_features
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.settings import build
from residual_saes.train.sae import SAE

FILE = "matches.parquet"
SEED = 0  # of the halves, the random dictionary and the resampling
DRAWS = 200  # of documents
LEVELS = words.LEVELS
# Latents up to which the best one-to-one assignment is found: 134 MB, and half a minute.
_ASSIGNED = 4096


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/stability.yaml."""

    other: str | None = None  # directory of another finished run on the same store
    rows: int = 250_000  # held-out rows at most, in whole units: about 64 bytes * k of memory each

    def __post_init__(self) -> None:
        if not self.other:
            raise SettingError(
                "study.other is missing; give another finished run on the same store, "
                "as study.other="
            )
        if self.rows < 1:
            raise SettingError(f"study.rows={self.rows} must be at least 1")


class Coded(NamedTuple):
    """Activations of the three dictionaries on the same rows, in the order of the text."""

    ours: Codes
    theirs: Codes
    random: Codes
    document: NDArray[np.int64]  # (n,)


class Match(NamedTuple):
    """One dictionary's latents matched with another's."""

    partner: NDArray[np.int64]  # (F,)
    mutual: NDArray[np.bool_]  # (F,) whether each is the other's partner
    chosen: NDArray[np.float64]  # (F,) correlation on the documents on which partners were chosen
    measured: Measured  # on the other documents


def other_of(study: Study) -> Subject:
    """The run that is compared with.

    Raises:
        StoreError: it is missing, unfinished, or of another store.
        SettingError: it is the study's own run, or writes other sites.
    """
    options = build(Options, "study", study.options)
    assert options.other is not None
    ours = study.subject
    other = options.other
    if imported.is_foreign(other):
        other = str(imported.run_of(other, ours.store.name, ours.only_layer))
    theirs = ours.beside(other)
    sites = [[port.point.site for port in run.ports.writes] for run in (ours, theirs)]
    if ours.noun != theirs.noun or sites[0] != sites[1]:
        raise SettingError(
            f"study.other={options.other} is a run of the {theirs.noun} of {theirs.where}, and "
            f"{ours.run} of the {ours.noun} of {ours.where}: what they write cannot be compared; "
            "give one of the same kind and sites"
        )
    return theirs


def inputs(study: Study) -> Mapping[str, Any]:
    """What the result depends on beside its settings, for `Study.perform`."""
    return {"other_sae": other_of(study).digest}


def stability(study: Study) -> Outcome:
    """How much of a run's dictionary another run has, with nulls and intervals."""
    options = build(Options, "study", study.options)
    ours = study.subject
    theirs = other_of(study)
    drawn = directions.random_dictionary(theirs.sae, SEED)
    with StopRequest() as stop:
        coded = encode(ours, theirs, drawn, options.rows, stop)
        half = choosing_half(coded.document, SEED)
        matches = {}
        for name, codes in (
            ("other", coded.theirs),
            ("random", coded.random),
            ("shifted", _shifted(coded.theirs)),
        ):
            stop.check()
            matches[name] = match(coded.ours, codes, coded.document, half)
    outcome = _outcome(study, theirs, coded, half, matches, drawn)
    theirs.forget()
    return outcome


# -- the pass --------------------------------------------------------------------------------------


def encode(ours: Subject, theirs: Subject, drawn: SAE, limit: int, stop: StopRequest) -> Coded:
    """All three dictionaries on the held-out rows that both runs' policies keep, without BOS."""
    parts: list[Coded] = []
    drawn_kept = theirs.encodings(drawn, "random")
    for rows in shared_rows(ours, theirs, limit, stop):
        random = encoding.encode(drawn, rows.theirs, drawn_kept)
        parts.append(
            Coded(
                ours=codes_of(ours.encoded(rows.ours), rows.our_rows, ours.sae.d_sae),
                theirs=codes_of(theirs.encoded(rows.theirs), rows.their_rows, theirs.sae.d_sae),
                random=codes_of(random, rows.their_rows, drawn.d_sae),
                document=rows.document,
            )
        )
    return Coded(
        ours=sparse.vstack([part.ours for part in parts], format="csr"),
        theirs=sparse.vstack([part.theirs for part in parts], format="csr"),
        random=sparse.vstack([part.random for part in parts], format="csr"),
        document=np.concatenate([part.document for part in parts]),
    )


def _shifted(codes: Codes) -> Codes:
    """The rows rotated by about half of them."""
    n = codes.shape[0]
    by = int(np.random.default_rng(SEED).integers(n // 4, max(3 * n // 4, 1)))
    return sparse.csr_array(sparse.vstack([codes[by:], codes[:by]], format="csr"))


def match(
    ours: Codes, theirs: Codes, document: NDArray[np.int64], half: NDArray[np.bool_]
) -> Match:
    """Partners by one half of the documents, their correlations by the other."""
    choose = np.flatnonzero(half)
    rest = np.flatnonzero(~half)
    best = matching.best_partners(ours[choose], theirs[choose])
    back = np.where(best.ours == NONE, NONE, best.theirs[best.ours])
    mutual = back == np.arange(len(back))
    measured = matching.measure(ours[rest], theirs[rest], best.ours, document[rest], DRAWS, SEED)
    return Match(best.ours, mutual, best.correlation, measured)


# -- figures ---------------------------------------------------------------------------------------


def _match_figures(match: Match, alive: NDArray[np.bool_]) -> dict[str, Any]:
    """Figures over latents that fire on both halves."""
    r = match.measured.r[alive]
    draws = match.measured.draws[:, alive]
    above = {}
    for level in LEVELS:
        # In each draw, of the latents that fire in its documents.
        shares = (draws >= level).sum(1) / (~np.isnan(draws)).sum(1)
        above[str(level)] = {
            "share": float((r >= level).mean()),
            "share_95": _interval(np.asarray(shares, np.float64)),
        }
    return {
        "correlation": float(np.mean(r)),
        "correlation_95": _interval(np.nanmean(draws, axis=1)),
        "correlation_where_chosen": float(match.chosen[alive].mean()),
        "mutual": float(match.mutual[alive].mean()),
        "above": above,
    }


def _interval(draws: Floats) -> Interval | None:
    """The middle 95 % of a statistic's draws (draws,); None if there was no document to draw."""
    return percentiles(draws) if len(draws) else None


def _scaled(subject: Subject, sae: SAE) -> SAE:
    """An SAE with the directions that are compared: those of a crosscoder's targets, scaled."""
    return replace(sae, W_dec=subject.scaled(sae.W_dec))


def _cosines(of: SAE, among: SAE) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(F,) each latent's largest cosine with a direction of `among`, and which direction it is."""
    values, ids = nearest(of.W_dec, among.W_dec, 1)
    return values[:, 0].cpu().numpy(), ids[:, 0].cpu().numpy()


def _pair_cosines(of: SAE, among: SAE, partner: NDArray[np.int64]) -> NDArray[np.float32]:
    """(F,) cosine of each latent's direction and its partner's; NaN without a partner."""
    index = torch.from_numpy(np.maximum(partner, 0)).to(among.W_dec.device)
    theirs = unit(among.W_dec)[index]
    cosines = (unit(of.W_dec) * theirs).sum(1).cpu().numpy()
    return np.where(partner == NONE, np.float32("nan"), cosines)


def _cosine_figures(cosine: NDArray[np.float32]) -> dict[str, Any]:
    above = {str(level): float((cosine >= level).mean()) for level in LEVELS}
    return {"mean_max_cosine": float(cosine.mean()), "above": above}


def _by_density(
    density: NDArray[np.float64], r: NDArray[np.float64], cosine: NDArray[Any]
) -> list[dict[str, Any]]:
    """Figures by decile of density, of latents that are alive."""
    deciles = []
    for part in np.array_split(np.argsort(density, kind="stable"), 10):
        if len(part):
            deciles.append(
                {
                    "from": float(density[part[0]]),
                    "to": float(density[part[-1]]),
                    "latents": len(part),
                    "correlation": float(r[part].mean()),
                    "above_0.7": float((r[part] >= LEVELS[0]).mean()),
                    "max_cosine": float(cosine[part].mean()),
                }
            )
    return deciles


def _assigned(coded: Coded, half: NDArray[np.bool_]) -> tuple[NDArray[np.int64], Measured] | None:
    """The best one-to-one assignment by one half of the documents, measured on the other.

    None if there are too many latents.
    """
    if max(coded.ours.shape[1], coded.theirs.shape[1]) > _ASSIGNED:
        return None
    choose = np.flatnonzero(half)
    rest = np.flatnonzero(~half)
    partner = matching.assignment(matching.correlations(coded.ours[choose], coded.theirs[choose]))
    measured = matching.measure(
        coded.ours[rest], coded.theirs[rest], partner, coded.document[rest], DRAWS, SEED
    )
    return partner, measured


def _assigned_figures(
    assigned: tuple[NDArray[np.int64], Measured] | None, alive: NDArray[np.bool_]
) -> dict[str, Any] | None:
    if assigned is None:
        return None
    _, measured = assigned
    return {
        "correlation": float(measured.r[alive].mean()),
        "correlation_95": _interval(np.nanmean(measured.draws[:, alive], axis=1)),
    }


# -- output ----------------------------------------------------------------------------------------


def _outcome(
    study: Study,
    theirs: Subject,
    coded: Coded,
    half: NDArray[np.bool_],
    matches: dict[str, Match],
    drawn: SAE,
) -> Outcome:
    ours = _scaled(study.subject, study.subject.sae)
    other_sae = _scaled(theirs, theirs.sae)
    drawn = _scaled(theirs, drawn)
    other = matches["other"]
    fires = np.bincount(coded.ours[half].indices, minlength=ours.d_sae)
    fires_again = np.bincount(coded.ours[~half].indices, minlength=ours.d_sae)
    alive = (fires > 0) & (fires_again > 0)
    density = (fires + fires_again) / len(half)
    if not alive.any():
        raise StoreError("no latent fires on both halves of the documents; give more study.rows=")

    # One row per latent.
    cosine, closest = _cosines(ours, other_sae)
    assigned = _assigned(coded, half)
    alone = other.partner == NONE
    partner_cosine = _pair_cosines(ours, other_sae, other.partner)
    columns = {
        "feature": pa.array(np.arange(ours.d_sae), pa.uint32()),
        "density": pa.array(density),
        "partner": pa.array(other.partner, pa.int64(), mask=alone),
        "correlation": pa.array(other.measured.r, mask=~alive),
        "mutual": pa.array(other.mutual),
        "partner_cosine": pa.array(partner_cosine, mask=alone),
        "nearest": pa.array(closest),
        "cosine": pa.array(cosine),
    }
    if assigned:
        partner, measured = assigned
        columns["assigned"] = pa.array(partner, mask=partner == NONE)
        columns["assigned_correlation"] = pa.array(measured.r, mask=~alive)
    write_features(study.folder / FILE, columns)

    figures: dict[str, Any] = {
        "other": str(theirs.run),
        "layers": [study.subject.place, theirs.place],
        "rows": len(half),
        "documents": len(np.unique(coded.document)),
        "seed": SEED,
        "features": [ours.d_sae, theirs.sae.d_sae],
        "alive": int(alive.sum()),
        "matched": {name: _match_figures(matched, alive) for name, matched in matches.items()},
        "assigned": _assigned_figures(assigned, alive),
        "cosine": {
            "other": _cosine_figures(cosine[alive]),
            "random": _cosine_figures(_cosines(ours, drawn)[0][alive]),
        },
        "by_density": _by_density(density[alive], other.measured.r[alive], cosine[alive]),
        "file": FILE,
    }
    correlations = {name: matched.measured.r[alive] for name, matched in matches.items()}
    pictures = words.pictures(correlations, figures["by_density"])
    return Outcome(figures, words.summary(figures), words.tables(figures), pictures)


def memory(study: Study) -> Needed:
    """A pass, two dictionaries more, 64 bytes a latent that fires, eight figures of each draw, and
    48 bytes of each pair of latents whose products are made together.
    """
    subject = study.subject
    limit = build(Options, "study", study.options).rows
    fires = 64 * rows_read(subject, limit) * subject.sae.k
    drawn = 8 * 8 * (1 + DRAWS) * subject.sae.d_sae
    dictionaries = 2 * of_sae(subject) + of_pass(subject, limit)
    products = 48 * matching.BLOCK * subject.sae.d_sae
    return Needed(dictionaries + fires + drawn + products, "study.rows")


DEFINITION = Definition(
    stability,
    options=Options,
    inputs=inputs,
    memory=memory,
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
