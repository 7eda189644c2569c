"""What the targets of a crosscoder have in common, and what is one target's own.

Targets are two models' layers (store=[A,B]: model diffing), or several layers or sites of one. Each
latent is classed by what it writes to each target (analyze/latents/targets.py). An own latent by
its norms alone may be an artefact of training, so latent scaling tests each (measuring.py). How
many survive stands beside two nulls:

    permuted   on this crosscoder and the same rows: the targets change places in random documents
    null       of a crosscoder of a model with itself, trained by the same settings with
               store=[A,A], given as study.null_run=: every own latent that it has is a false one

A target differs where more of its own latents survive than in each null.

Shapes: F latents, T targets, D documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from residual_saes.analyze.latents import targets
from residual_saes.analyze.latents.targets import ALIKE, OWN, SHARED, Targets, class_names, names_of
from residual_saes.analyze.memory import Needed, of_pass
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.stats import (
    Floats,
    Interval,
    bootstrap_ratio,
    bootstrap_ratios,
    figure,
    holm,
    permutation_p,
    wilson,
)
from residual_saes.analyze.studies.diff import measuring, words
from residual_saes.analyze.studies.diff.measuring import Explained, Fired, Measuring, Nu, Scaling
from residual_saes.analyze.study import Column, Definition, Study, at_least, write_features
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.settings import build

LEVEL = 0.05  # of the tests, adjusted over the targets
DRAWS = 200  # permutations
SEED = 0


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/diff.yaml."""

    null_run: str | None = None  # directory of a finished crosscoder of a model with itself
    rows: int = 1_000_000  # held-out rows at most, in whole units

    def __post_init__(self) -> None:
        at_least("study.rows", self.rows, 1)


class Measured(NamedTuple):
    """All that is measured of one crosscoder."""

    targets: Targets
    fired: Fired
    explained: Explained
    scaling: Scaling | None
    nu: Nu | None

    @property
    def alive(self) -> NDArray[np.bool_]:
        return self.fired.fires > 0

    def own(self) -> NDArray[np.int64]:
        """(T,) latents that fire and are each target's own by their norms."""
        count = self.targets.norms.shape[1]
        return np.bincount(self.targets.classes[self.alive], minlength=count)[:count]

    def survivors(self) -> NDArray[np.int64]:
        """(T,) those of them that survive latent scaling."""
        count = self.targets.norms.shape[1]
        if self.nu is None:
            return np.zeros(count, np.int64)
        return measuring.survivors(self.nu, self.targets.classes, count)


def inputs(study: Study) -> Mapping[str, Any]:
    """What the result depends on beside its settings.

    Raises:
        SettingError: the run is no crosscoder, or study.null_run is no null of it.
    """
    require_crosscoder(study.subject, f"run={study.subject.run}")
    null = null_of(study)
    return {"null_sae": null.digest if null else None}


def require_crosscoder(subject: Subject, given: str) -> None:
    """Refuse what writes one target alone.

    Args:
        given: the setting that names the run.
    """
    written = subject.ports.writes
    if len(written) < 2:
        raise SettingError(
            f"{given} writes {written[0]} alone, and study=diff compares the targets of a "
            "crosscoder; train one by sae=crosscoder_32k with layer=[21,27] or store=[A,B]"
        )


def null_of(study: Study) -> Subject | None:
    """The crosscoder of a model with itself that study.null_run names.

    Raises:
        SettingError: it is another kind of run, or of another size.
    """
    path = build(Options, "study", study.options).null_run
    if path is None:
        return None
    null = Subject.open(Path(path), None, study.subject.device)
    require_crosscoder(null, f"study.null_run={path}")
    sources = {(null.stores[port.store].identity, port.point) for port in null.ports.writes}
    if len(sources) > 1:
        raise SettingError(
            f"study.null_run={path} has different targets, {null.where}; a null is trained on one "
            "store twice, by store=[A,A]"
        )
    mine, its = study.subject.sae, null.sae
    if (mine.d_sae, mine.k) != (its.d_sae, its.k):
        raise SettingError(
            f"study.null_run={path} has {its.d_sae} latents and k={its.k}, and the run "
            f"{mine.d_sae} and k={mine.k}; train the null by the run's settings"
        )
    return null


def diff(study: Study) -> Outcome:
    """Which latents are whose, with the nulls and intervals."""
    options = build(Options, "study", study.options)
    subject = study.subject
    null = null_of(study)
    with StopRequest() as stop:
        measured, figures = compare(subject, null, options.rows, stop)
    _write(study, measured)
    if null:
        null.forget()
        figures["null"] = options.null_run
    summary, tables = words.summary(figures), words.tables(figures)
    return Outcome(figures, summary, tables, words.pictures(measured.targets))


def compare(
    subject: Subject, null: Subject | None, limit: int, stop: StopRequest
) -> tuple[Measured, dict[str, Any]]:
    """What is measured of a crosscoder, and every figure.

    Args:
        null: a crosscoder of a model with itself.
        limit: see `Subject.rows`.
    """
    measured = measure(subject, limit, stop)
    of_null = measure(null, limit, stop) if null else None
    permuted = None
    if measured.scaling:
        classes = measured.targets.classes
        permuted = measuring.permuted(measured.scaling, classes, DRAWS, SEED, stop)
    return measured, figures_of(subject, measured, permuted, of_null)


def measure(subject: Subject, limit: int, stop: StopRequest) -> Measured:
    """Both passes over a crosscoder's held-out rows.

    Args:
        limit: see `Subject.rows`.
    """
    written = targets.of(subject)
    fired = measuring.fired(subject, limit, stop)
    explained, scaling = Measuring(subject, written.classes, fired).run(limit, stop)
    found = None
    if scaling:
        found = measuring.nu(scaling, written.classes)
    return Measured(written, fired, explained, scaling, found)


# -- figures ---------------------------------------------------------------------------------------


def figures_of(
    subject: Subject,
    measured: Measured,
    permuted: NDArray[np.int64] | None,
    self_null: Measured | None,
) -> dict[str, Any]:
    """Every figure.

    Args:
        permuted: (draws, T) survivors where targets are permuted.
        self_null: of a crosscoder of a model with itself.
    """
    names = names_of(subject)
    classes = class_names(names)
    alive = measured.alive
    explained = measured.explained
    figures: dict[str, Any] = {
        "targets": names,
        "stores": [store.name for store in subject.stores],
        "rows": measured.fired.rows,
        "documents": len(explained.rows),
        "features": len(alive),
        "silent": int((~alive).sum()),
        "own_from": OWN,
        "shared_from": SHARED / len(names),
        "classes": _of_classes(measured, classes),
        "entropy": float(measured.targets.entropy[alive].mean()) if alive.any() else None,
        "cosine": _of_cosines(measured),
        "cosine_of_null": self_null and _of_cosines(self_null),
        "variance_explained": _of_targets(explained, names, classes),
        "own": _of_own(measured, names, permuted, self_null),
    }
    _judge_(figures)
    return figures


def _of_classes(measured: Measured, names: list[str]) -> dict[str, Any]:
    """How many latents of each class there are, and how often they fire."""
    fires, rows = measured.explained.fires, measured.explained.rows
    intervals = bootstrap_ratios(fires, rows)
    density = measured.fired.fires / measured.fired.rows
    found = {}
    for number, name in enumerate(names):
        mine = (measured.targets.classes == number) & measured.alive
        l0 = fires[:, number].sum() / rows.sum()
        found[name] = {
            "latents": int(mine.sum()),
            "density": float(np.median(density[mine])) if mine.any() else None,
            "l0": figure(l0, intervals[number]),
        }
    return found


def _of_cosines(measured: Measured) -> dict[str, Any] | None:
    """Directions of shared latents; None where targets have different widths."""
    classes = measured.targets.classes
    shared = measured.alive & (classes == measured.targets.norms.shape[1])
    cosine = measured.targets.cosine[shared]
    if not len(cosine) or np.isnan(cosine).all():
        return None
    return {
        "median": float(np.nanmedian(cosine)),
        "alike_from": ALIKE,
        "same": int((cosine >= ALIKE).sum()),
        "rotated": int((np.abs(cosine) < ALIKE).sum()),
        "opposite": int((cosine <= -ALIKE).sum()),
    }


def _of_targets(explained: Explained, names: list[str], classes: list[str]) -> dict[str, Any]:
    """Variance explained of each target, and what it loses without each class."""
    found = {}
    for number, name in enumerate(names):
        error = explained.error[:, number]
        about_mean = explained.about_mean[:, number]
        lost = explained.without[:, :, number] - error[:, None]
        unexplained = bootstrap_ratio(error, about_mean)
        whole = unexplained and Interval(1 - unexplained.high, 1 - unexplained.low)
        intervals = bootstrap_ratios(lost, about_mean)
        total = about_mean.sum()
        by_class = {}
        for c, title in enumerate(classes):
            by_class[title] = figure(lost[:, c].sum() / total, intervals[c])
        found[name] = {"all": figure(1 - error.sum() / total, whole), "of_class": by_class}
    return found


def _of_own(
    measured: Measured,
    names: list[str],
    permuted: NDArray[np.int64] | None,
    self_null: Measured | None,
) -> dict[str, Any]:
    """Own latents of each target, which of them survive, and what the nulls have."""
    own = measured.own()
    survive = measured.survivors()
    alive = int(measured.alive.sum())
    found: dict[str, Any] = {}
    for number, name in enumerate(names):
        of_target: dict[str, Any] = {"latents": int(own[number]), "survive": int(survive[number])}
        p = []
        if measured.nu is not None:
            mine = measured.alive & (measured.targets.classes == number)
            shrunk = np.abs(measured.nu.error[mine]) >= measuring.NU_ERROR
            decoupled = np.abs(measured.nu.reconstruction[mine]) >= measuring.NU_RECONSTRUCTION
            of_target |= {"shrunk": int(shrunk.sum()), "decoupled": int(decoupled.sum())}
        if permuted is not None:
            draws = permuted[:, number]
            p.append(permutation_p(float(survive[number]), draws))
            most = float(np.quantile(draws, 0.975))
            of_target["permuted"] = {"mean": float(draws.mean()), "most": most, "p": p[-1]}
        if self_null is not None:
            of_null = _against(self_null, int(own[number]), int(survive[number]), alive)
            p.append(of_null["p"])
            of_target["null"] = of_null
        of_target["p"] = max(p, default=1.0)  # the weakest of its tests
        found[name] = of_target
    return found


def _judge_(figures: dict[str, Any]) -> None:
    """Decide what differs: each target's own latents, and the directions of shared ones.

    Directions are compared with those of a crosscoder of a model with itself, where there is one.
    All tests are adjusted together.
    """
    tested = list(figures["own"].values())
    cosine, of_null = figures["cosine"], figures["cosine_of_null"]
    if cosine and of_null:
        counts = []
        for found in (cosine, of_null):
            counts.append([found["rotated"] + found["opposite"], found["same"]])
        cosine["p"] = float(scipy_stats.fisher_exact(counts, alternative="greater").pvalue)
        tested.append(cosine)
    for found, p in zip(tested, holm([found["p"] for found in tested]), strict=True):
        found |= {"p": float(p), "differs": bool(p < LEVEL)}


def _against(null: Measured, own: int, survive: int, alive: int) -> dict[str, Any]:
    """A target's own latents beside those of all targets of a crosscoder of a model with itself."""
    its_alive = int(null.alive.sum()) * len(null.own())
    its_own = int(null.own().sum())
    its_survivors = int(null.survivors().sum())
    counts = [[survive, alive - survive], [its_survivors, its_alive - its_survivors]]
    return {
        "own": figure(its_own / max(its_alive, 1), wilson(its_own, its_alive)),
        "survive": figure(its_survivors / max(its_alive, 1), wilson(its_survivors, its_alive)),
        "expected_own": alive * its_own / max(its_alive, 1),
        "expected_survivors": alive * its_survivors / max(its_alive, 1),
        "p": float(scipy_stats.fisher_exact(counts, alternative="greater").pvalue),
    }


# -- files -----------------------------------------------------------------------------------------


def _write(study: Study, measured: Measured) -> None:
    """One row per latent."""
    written = measured.targets
    names = [port.name for port in study.subject.ports.writes]
    classes = np.array(class_names(names))[written.classes]
    columns: dict[str, Any] = {
        "feature": pa.array(np.arange(len(classes)), pa.uint32()),
        "count": pa.array(measured.fired.fires),
        "class": pa.array(classes.tolist()),
        "entropy": pa.array(written.entropy),
        "cosine": _known(written.cosine),
    }
    for number, name in enumerate(names):
        columns[f"share {name}"] = pa.array(written.shares[:, number])
    if measured.nu is not None:
        columns["nu_error"] = _known(measured.nu.error)
        columns["nu_reconstruction"] = _known(measured.nu.reconstruction)
        is_own = written.classes < len(names)
        columns["survives"] = pa.array(measured.nu.survives.astype(np.int8), mask=~is_own)
    write_features(study.folder / FEATURES, columns)


def _known(values: Floats) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def memory(study: Study) -> Needed:
    """A pass, W_dec of the classes, and the directions of own latents."""
    subject = study.subject
    limit = build(Options, "study", study.options).rows
    return Needed(of_pass(subject, limit) + 4.0 * subject.sae.W_dec.numel(), "study.rows")


DEFINITION = Definition(
    diff,
    options=Options,
    inputs=inputs,
    memory=memory,
    order=85,
    columns=(
        Column(
            "nu_error",
            "nu_error",
            "nu, error",
            "of an own latent: near 1 if another target has its direction, in the error "
            "(study=diff)",
        ),
        Column(
            "nu_reconstruction",
            "nu_reconstruction",
            "nu, reconstruction",
            "of an own latent: near 1 if other latents write its direction to another target "
            "(study=diff)",
        ),
    ),
)
