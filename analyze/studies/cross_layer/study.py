"""Which latents of one dictionary predict which of another, on the same tokens of the same text.

As a rule those of an earlier layer (run=) predict those of a later one (study.to=); either order is
measured. Of each latent of study.to= the five latents of the run that fire most like it are chosen
on half of the documents, and measured on the other half (pairs.py). Beside each pair stands the
cosine of its directions: the stream may carry a direction on, or the later latent may have another
one. A latent of study.to= is one of

    same direction    its best partner explains half of its variance, and has its direction
    other direction   its best partner explains half of its variance
    combined          its partners explain half of it together, none alone
    partly            a partner coincides with it more often than by chance (`RULE`)
    new               no latent of the run predicts it
    rare              it fires too seldom to be judged

To predict is not to cause: two latents of one token fire together though neither makes the other.
study.causal= takes the earlier latent out of the model and looks at the later one (causal.py).

Null: the same once more with the run's firing turned around in each document (rotation.py).

Shapes: n rows, F latents of the run, G of study.to=.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.latents.codes import Codes, Ints, choosing_half, codes_of, shared_rows
from residual_saes.analyze.latents.matching import BLOCK, NONE, measure
from residual_saes.analyze.latents.nearest import unit
from residual_saes.analyze.latents.targets import ALIKE
from residual_saes.analyze.memory import Needed, of_pass, of_sae, rows_read
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.parts import Arrays, Parts
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.stats import Floats, figure, percentiles
from residual_saes.analyze.studies.cross_layer import causal, pairs, words
from residual_saes.analyze.studies.cross_layer.pairs import LEVEL, TOP, Found
from residual_saes.analyze.studies.cross_layer.rotation import Runs, rotated
from residual_saes.analyze.study import Column, Definition, Study, at_least, write_features
from residual_saes.analyze.subject import Subject, recorded_stores
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import tell
from residual_saes.data.rows import aligned
from residual_saes.data.settings import build
from residual_saes.train.run import read_config

PAIRS = "pairs.parquet"
CLASSES = ("same direction", "other direction", "combined", "partly", "new", "rare")
EXPLAINED = 0.5  # of a latent's variance
SEED = 0  # of the halves, the null's turns and the resampling
DRAWS = 200  # of documents
VERSION = 1  # of the kept pairs: raise it when the same rows give other ones
RULE = (
    "a latent is predicted if one of the partners that half of the documents chose is strong where "
    "it is strong, on the other documents, more often than when documents are turned around: "
    f"q <= {LEVEL} (exact test, Benjamini and Hochberg over all pairs)"
)


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/cross_layer.yaml."""

    to: str | None = None  # directory of the finished run whose latents are predicted
    rows: int = 250_000  # held-out rows at most, in whole units: about 64 bytes * k of memory each
    min_firing: int = 10  # rows of either half in which a latent fires, for it to be judged
    causal: int = 0  # pairs of each direction whose earlier latent is ablated in the model

    def __post_init__(self) -> None:
        if not self.to:
            raise SettingError(
                "study.to is missing; give the finished run whose latents are predicted, on the "
                "same store, as study.to="
            )
        for name, least in (("rows", 1), ("min_firing", 2), ("causal", 0)):
            at_least(f"study.{name}", getattr(self, name), least)


class Coded(NamedTuple):
    """Activations of both dictionaries on the same rows, in the order of the text."""

    ours: Codes
    theirs: Codes
    document: Ints  # (n,)


# -- what is compared ------------------------------------------------------------------------------


def refuses(subject: Subject, _: Mapping[str, Any]) -> str | None:
    """A crosscoder's latents are of several layers at once, so none is the earlier."""
    if len(subject.ports.reads) == len(subject.ports.writes) == 1:
        return None
    return (
        f"{subject.run} is a {subject.noun} of {subject.where}, whose latents are of all of them "
        "at once; study=diff has their figures"
    )


def other_of(study: Study) -> Subject:
    """The run whose latents are predicted: on the same store, or on one of the same tokens.

    Raises:
        StoreError: it is missing or unfinished.
        SettingError: it is the run itself, of other tokens, or a crosscoder; or study.causal= is
            asked of what it cannot be.
    """
    options = build(Options, "study", study.options)
    ours = study.subject
    path = Path(str(options.to))
    identities = [identity for _, identity in recorded_stores(read_config(path))]
    if identities == [store.identity for store in ours.stores]:
        theirs = ours.beside(str(path))
    else:
        theirs = Subject.open(path, None, ours.device)
        aligned.require([*ours.sources(ours.ports.every), *theirs.sources(theirs.ports.every)])
    if reason := refuses(theirs, study.options):
        raise SettingError(f"study.to={path} is not for study=cross_layer: {reason}")
    if options.causal and (reason := causal.refuses(ours, theirs)):
        raise SettingError(f"study.causal={options.causal} needs {reason}; leave it out")
    return theirs


def inputs(study: Study) -> Mapping[str, Any]:
    """What the result depends on beside its settings."""
    return _of(other_of(study))


def _of(theirs: Subject) -> Mapping[str, Any]:
    return {"to_sae": theirs.digest, "to_store": theirs.store.identity}


def encode(ours: Subject, theirs: Subject, limit: int, stop: StopRequest) -> Coded:
    """Both on the rows that they have in common; raises StoreError if there are none."""
    parts: list[Coded] = []
    for rows in shared_rows(ours, theirs, limit, stop):
        mine = codes_of(ours.encoded(rows.ours), rows.our_rows, ours.sae.d_sae)
        their = codes_of(theirs.encoded(rows.theirs), rows.their_rows, theirs.sae.d_sae)
        parts.append(Coded(mine, their, rows.document))
    mine, their, document = zip(*parts, strict=True)
    both = [sparse.vstack(codes, format="csr") for codes in (mine, their)]
    return Coded(both[0], both[1], np.concatenate(document))


# -- the study -------------------------------------------------------------------------------------


def cross_layer(study: Study) -> Outcome:
    """Pairs, classes and their null."""
    options = build(Options, "study", study.options)
    ours = study.subject
    theirs = other_of(study)
    tell(f"rule: {RULE}")
    if options.causal:
        _ = study.lm  # what is wrong with it is said at once
    with StopRequest() as stop:
        coded = encode(ours, theirs, options.rows, stop)
        half = choosing_half(coded.document, SEED)
        kept = _kept(study, theirs, options)
        found = _found(kept, 0, coded, half, options, stop)
        cosine = cosines(ours, theirs, found.partner)
        figures = {
            "run": str(ours.run),
            "to": str(theirs.run),
            "where": [ours.where, theirs.where],
            "rule": RULE,
            "rows": len(half),
            "documents": len(np.unique(coded.document)),
            "min_firing": options.min_firing,
            **of_classes(found, cosine),
            "best_explains_half": _resampled(coded, found, half),
            "null": _null(study, theirs, coded, half, options, kept, stop),
        }
        if options.causal:
            figures["causal"] = causal.measured(study, theirs, found, cosine, options.causal, stop)
    write_features(study.folder / FEATURES, _of_ours(found, cosine))
    write_features(study.folder / PAIRS, table_of(found, cosine))
    theirs.forget()
    return Outcome(
        figures, words.summary(figures), words.tables(figures, _strongest(found, cosine))
    )


def _kept(study: Study, theirs: Subject, options: Options) -> Parts:
    """Where the pairs are kept: a stop costs no more than the search at hand."""
    key = {"version": VERSION, "rows": options.rows, "min_firing": options.min_firing}
    return study.subject.parts("cross_layer", {**key, **study.identity, **_of(theirs)})


def _found(
    kept: Parts,
    number: int,
    coded: Coded,
    half: NDArray[np.bool_],
    options: Options,
    stop: StopRequest,
) -> Found:
    def make() -> Arrays:
        least = options.min_firing
        found = pairs.find(coded.theirs, coded.ours, coded.document, half, least, stop)
        return found._asdict()

    return Found(**kept.of(number, make))


def _null(
    study: Study,
    theirs: Subject,
    coded: Coded,
    half: NDArray[np.bool_],
    options: Options,
    kept: Parts,
    stop: StopRequest,
) -> dict[str, Any]:
    """The same figures where the run's firing is turned around in each document."""
    turned = rotated(coded.ours, Runs.of(coded.document), SEED)
    found = _found(kept, 1, coded._replace(ours=turned), half, options, stop)
    return of_classes(found, cosines(study.subject, theirs, found.partner))


def cosines(ours: Subject, theirs: Subject, partner: Ints) -> Floats:
    """(G, T) of each pair's directions; NaN without a partner, and of two models."""
    cosine = np.full(partner.shape, np.nan)
    weights = ours.store.manifest["model"]["weights"]
    if theirs.store.manifest["model"]["weights"] != weights:
        return cosine
    W_ours = unit(ours.sae.W_dec)
    W_theirs = unit(theirs.sae.W_dec)
    for first in range(0, len(partner), BLOCK):
        part = slice(first, first + BLOCK)
        chosen = torch.from_numpy(np.maximum(partner[part], 0)).to(W_ours.device)
        cosine[part] = torch.einsum("gd,gtd->gt", W_theirs[part], W_ours[chosen]).cpu().numpy()
    cosine[partner == NONE] = np.nan
    return cosine


# -- figures ---------------------------------------------------------------------------------------


def classes_of(found: Found, cosine: Floats) -> Ints:
    """(G,) number in CLASSES of each latent that is predicted, or is not."""
    predicted = (found.q <= LEVEL).any(1)
    alone = found.r[:, 0] ** 2 >= EXPLAINED
    by_one = np.where(cosine[:, 0] >= ALIKE, 0, 1)
    by_several = np.where(found.explained >= EXPLAINED, 2, 3)
    of_judged = np.where(predicted, np.where(alone, by_one, by_several), 4)
    return np.where(found.judged, of_judged, 5)


def of_classes(found: Found, cosine: Floats) -> dict[str, Any]:
    """How many latents are of each class."""
    classes = classes_of(found, cosine)
    judged = found.judged
    counts = np.bincount(classes, minlength=len(CLASSES))
    predicts = np.unique(found.partner[found.q <= LEVEL])
    best = found.r[judged, 0]
    return {
        "latents": len(classes),
        "judged": int(judged.sum()),
        "classes": dict(zip(CLASSES, counts.tolist(), strict=True)),
        "predicted": int(counts[:4].sum()),
        "pairs": int((found.partner != NONE).sum()),
        "pairs_predict": int((found.q <= LEVEL).sum()),
        "predicting": len(predicts),
        "able": int(found.able.sum()),
        "median_r": float(np.nanmedian(best)) if np.isfinite(best).any() else None,
        "median_cosine": _median_cosine(found, cosine),
    }


def _median_cosine(found: Found, cosine: Floats) -> float | None:
    """Of the best pairs that predict."""
    known = cosine[:, 0][(found.q[:, 0] <= LEVEL) & np.isfinite(cosine[:, 0])]
    return float(np.median(known)) if len(known) else None


def _resampled(coded: Coded, found: Found, half: NDArray[np.bool_]) -> dict[str, Any]:
    """Share of the judged latents of whose variance the best partner explains half."""
    rest = np.flatnonzero(~half)
    measured = measure(
        coded.theirs[rest], coded.ours[rest], found.partner[:, 0], coded.document[rest], DRAWS, SEED
    )
    explains = measured.r[found.judged] ** 2 >= EXPLAINED
    draws = (measured.draws[:, found.judged] ** 2 >= EXPLAINED).mean(1)
    value = explains.mean() if len(explains) else np.nan
    return figure(value, percentiles(draws) if len(draws) and len(explains) else None)


# -- files -----------------------------------------------------------------------------------------


def _of_ours(found: Found, cosine: Floats) -> dict[str, Any]:
    """One row per latent of the run: how many it predicts, and the one that it predicts best."""
    latents = len(found.able)
    predicts = found.q <= LEVEL
    count = np.bincount(found.partner[predicts], minlength=latents)
    latent, rank = np.nonzero(predicts)
    order = np.argsort(found.r[latent, rank], kind="stable")
    best = np.full(latents, NONE)
    best[found.partner[latent, rank][order]] = latent[order]
    r, alike = np.full(latents, np.nan), np.full(latents, np.nan)
    ours = found.partner[latent, rank][order]
    r[ours] = found.r[latent, rank][order]
    alike[ours] = cosine[latent, rank][order]
    return {
        "feature": pa.array(np.arange(latents), pa.uint32()),
        "predicts": pa.array(count, mask=~found.able),
        "best": pa.array(best, mask=best == NONE),
        "r": _known(r),
        "cosine": _known(alike),
    }


def table_of(found: Found, cosine: Floats) -> dict[str, Any]:
    """One row per pair, the best of each latent first; a latent without a partner has one row.

    `feature` is the latent of study.to=, `partner` that of the run.
    """
    has = found.partner != NONE
    has[:, 0] = True
    latent, rank = np.nonzero(has)
    partner = found.partner[has]
    columns = {
        "feature": pa.array(latent, pa.uint32()),
        "class": pa.array(np.array(CLASSES)[classes_of(found, cosine)[latent]].tolist()),
        "explained": _known(found.explained[latent]),
        "rank": pa.array(rank, pa.uint8()),
        "partner": pa.array(partner, mask=partner == NONE),
    }
    for name in ("r", "slope", "phi", "jaccard", "lift", "given_partner", "given_latent"):
        columns[name] = _known(getattr(found, name)[has])
    columns["cosine"] = _known(cosine[has])
    for name in ("strong", "expected", "q"):
        columns[name] = _known(getattr(found, name)[has])
    return columns


def _known(values: Floats) -> pa.Array:
    return pa.array(values, mask=~np.isfinite(values))


def _strongest(found: Found, cosine: Floats) -> list[dict[str, Any]]:
    """The pairs of the largest correlation of each class that one partner explains."""
    classes = classes_of(found, cosine)
    chosen = []
    for number in (0, 1):
        mine = np.flatnonzero(classes == number)
        for latent in mine[np.argsort(-found.r[mine, 0], kind="stable")][:TOP].tolist():
            figures = {name: float(getattr(found, name)[latent, 0]) for name in words.COLUMNS}
            alike = float(cosine[latent, 0])
            ends = {"partner": int(found.partner[latent, 0]), "feature": latent}
            chosen.append({**ends, "class": CLASSES[number], **figures, "cosine": alike})
    return chosen


def memory(study: Study) -> Needed:
    """A pass, another dictionary, 64 bytes a latent that fires, eight figures of each draw, a
    latent's moments, and 48 bytes of each pair of latents whose products are made together.
    """
    subject = study.subject
    theirs = other_of(study).sae
    limit = build(Options, "study", study.options).rows
    fires = 64 * rows_read(subject, limit) * (subject.sae.k + theirs.k) / 2
    of_latents = theirs.d_sae * (8 * 8 * (1 + DRAWS) + 8 * 4 * (TOP + 1) ** 2)
    products = 48 * BLOCK * subject.sae.d_sae
    return Needed(
        of_pass(subject, limit) + of_sae(subject) + fires + of_latents + products, "study.rows"
    )


DEFINITION = Definition(
    cross_layer,
    options=Options,
    refuses=refuses,
    inputs=inputs,
    memory=memory,
    order=90,
    columns=(
        Column("predicts", "predicts", "predicts", "latents of study.to= that it predicts"),
        Column("r", "predicts_r", "r of those", "correlation with the one that it predicts best"),
    ),
)
