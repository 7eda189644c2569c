"""What tells right answers from wrong ones: at which layer, in which SAE features, how surely.

Residuals and SAE features are averaged over each answer (means.py). d is Cohen's with Hedges'
correction, right minus wrong, of every dimension and every feature.

Where each question has one answer, the null shuffles labels over all answers. Labelled solutions
and samples come several to a question, and are compared within it: questions that have both a right
and a wrong one take part, and labels are shuffled within each. The adjusted d holds equal the
length, whether the answer finished, who wrote it if several did, and the question if it has several
(see `effects.Effect`).

Problems in two parts choose on the train questions. All else is of the test questions. Of problems
in one file, some questions choose and the others judge what was chosen (see
analyze/questions/split.py and choice.py). What chooses nothing is measured on all of them.

Shapes: n answers, d d_model, F latents, c of these that are tested.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.analyze import refusals
from residual_saes.analyze.outcome import Outcome, dumped
from residual_saes.analyze.questions.answering import answers, inputs
from residual_saes.analyze.questions.split import require_share
from residual_saes.analyze.results import FEATURES
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.studies.contrast import choice, effects
from residual_saes.analyze.studies.contrast.choice import TOP, choose
from residual_saes.analyze.studies.contrast.effects import Design, Effect, Watched
from residual_saes.analyze.studies.contrast.findings import (
    Features,
    Findings,
    Layer,
    Ranked,
    feature_table,
    figures,
)
from residual_saes.analyze.studies.contrast.means import Means, answer_means, memory
from residual_saes.analyze.studies.contrast.words import pictures, summary, tables
from residual_saes.analyze.study import Column, Definition, Study, write_features
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress
from residual_saes.data.settings import build

_LEAST = 5  # right answers, and wrong ones: with fewer no p value of 32,768 features can be small
_BOOTSTRAPS = 1000
_SPLITS = 100


@dataclass(frozen=True)
class Options:
    """The settings of conf/study/contrast.yaml."""

    discovery: float = 0.5  # share of the questions that choose, where problems have no parts
    permutations: int = 1000  # permutations of the labels
    min_firing: int = 5  # answers in which a feature fires, for it to be tested
    seed: int = 0

    def __post_init__(self) -> None:
        require_share(self.discovery)
        for name, least in (("permutations", 19), ("min_firing", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise SettingError(f"study.{name}={value} must be at least {least}")


def contrast(study: Study) -> Outcome:
    """Cohen's d of every dimension at every layer and of every feature, beside shuffled labels.

    Leaves these files:
        cohens_d.npy                         (layers, d)
        contrastive_features_L{layer}.json   the features that they choose, of the SAE's layer, with
                                             d in the other answers; the names of
                                             other hook points stand for L{layer}
        features.parquet                     figures of every feature that was tested
    """
    options = build(Options, "study", study.options)
    with StopRequest() as stop:
        answered = answers(study, stop)
        means = answer_means(study, answered, stop)
        findings = compare(means, [answer.source for answer in answered], options, stop)

    d = io.BytesIO()
    np.save(d, np.array([of_layer.raw.d for of_layer in findings.layers], np.float32))
    durable.write(study.folder / "cohens_d.npy", [d.getbuffer()])
    of_choice = choice.figures(findings.choice, means)
    chosen = {**of_choice, "layer": study.subject.only_layer, "options": vars(options)}
    path = study.folder / f"contrastive_features_{study.subject.label}.json"
    durable.write(path, [dumped(chosen).encode()])
    table = feature_table(findings)
    if table:
        write_features(study.folder / FEATURES, table)

    measured = {**figures(findings), "chosen": of_choice, "options": vars(options)}
    return Outcome(measured, summary(measured), tables(measured), pictures(findings))


# -- what is compared ------------------------------------------------------------------------------


def compare(means: Means, sources: Sequence[str], options: Options, stop: StopRequest) -> Findings:
    """Right answers against wrong ones; one layer's effects are in memory at a time.

    Args:
        sources: (n,) who wrote each.

    Raises:
        SettingError: too few answers are right, or wrong.
    """
    comparable_rows, paired = comparable(means)
    permuting: dict[str, Any] = {
        "paired": paired,
        "shuffles": options.permutations,
        "seed": options.seed,
    }
    chosen = choose(
        means, comparable_rows, options.discovery, options.min_firing, permuting, stop.check
    )
    kept = comparable_rows if means.part is None else chosen.others
    require_both(means.correct[kept], paired)
    correct = means.correct[kept]
    question = means.question[kept]
    covariates = _covariates(means, np.array(sources), kept)
    design = Design.of(
        correct,
        question,
        np.array([*covariates.values()]).reshape(len(covariates), len(kept)).T,
        **permuting,
    )
    splits = effects.split(design, _SPLITS, np.random.default_rng([options.seed, 1]))
    times = effects.drawn(design.cluster, _BOOTSTRAPS, np.random.default_rng([options.seed, 2]))

    def watched(x: Any, line: str) -> Watched:
        def check() -> None:
            stop.check()
            progress.show(line)

        return Watched(x, check)

    layers: list[Layer] = []
    progress = Progress()
    total = means.hidden.shape[1]
    for layer in range(total):
        x = watched(means.hidden[kept, layer], f"{layer}/{total} layers compared")
        adjusted = effects.against_shuffled(x, design.adjusted, TOP) if design.adjusted else None
        layers.append(
            Layer(
                raw=effects.against_shuffled(x, design.raw, TOP),
                adjusted=adjusted,
                drawn=effects.drawn_top(x, correct, times, TOP),
                halves=effects.halves(x, splits, TOP),
            )
        )
        progress.show(f"{layer + 1}/{total} layers compared", last=layer + 1 == total)
    every = watched(means.features[kept].tocsc(), "comparing features")
    features = _features(every, design, splits, options.min_firing)
    return Findings(design, question, covariates, layers, features, chosen)


def comparable(means: Means) -> tuple[NDArray[np.int64], bool]:
    """Which answers are compared, and whether they are compared within questions.

    Answers without a token are left out.
    """
    kept = means.length > 0
    _, question = np.unique(means.question, return_inverse=True)
    paired = bool(np.bincount(question[kept]).max(initial=0) > 1)
    if paired:
        has_right = np.bincount(question[kept & means.correct], minlength=question.max() + 1) > 0
        has_wrong = np.bincount(question[kept & ~means.correct], minlength=question.max() + 1) > 0
        kept &= (has_right & has_wrong)[question]
    return np.flatnonzero(kept), paired


def require_both(correct: NDArray[np.bool_], paired: bool) -> None:
    """Raise SettingError if too few of the answers that are compared are right, or wrong."""
    right = int(correct.sum())
    wrong = len(correct) - right
    if min(right, wrong) < _LEAST:
        among = " of questions that have both" if paired else ""
        raise SettingError(
            f"{right} right and {wrong} wrong answers{among} are too few to tell apart, at least "
            f"{_LEAST} of each are needed; ask more with answers.questions=, or harder or easier "
            "ones with problems="
        )


def _covariates(
    means: Means, sources: NDArray[np.str_], kept: NDArray[np.int64]
) -> dict[str, Floats]:
    """What else the kept answers differ by, by name: (n,) each."""
    known: dict[str, NDArray[Any]] = {
        "log length": np.log(means.length[kept]),
        "finished": means.finished[kept],
    }
    for writer in np.unique(sources[kept])[1:]:  # the first is who none of the others is
        known[f"by {writer}"] = sources[kept] == writer
    covariates = {}
    for name, values in known.items():
        numbers = values.astype(np.float64)
        if np.ptp(numbers):
            covariates[name] = numbers
    return covariates


def _features(every: Watched, design: Design, splits: effects.Splits, least: int) -> Features:
    """What is found of the features (n, F), sparse, that fire in `least` answers."""
    ids = np.flatnonzero(np.diff(every.x.indptr) >= least)
    x = every[:, ids]
    fired = np.diff(x.x.indptr)
    if not len(ids):
        return Features(ids, fired)

    def ranked(effect: Effect) -> Ranked:
        rare = effects.is_rare(fired, design.correct)
        tested = effects.against_shuffled(x, effect, TOP, rare=rare)
        return Ranked(tested, effects.rank_p(x, fired, design.correct, effect))

    right = np.asarray(x.x[design.correct].mean(axis=0), np.float64)
    wrong = np.asarray(x.x[~design.correct].mean(axis=0), np.float64)
    return Features(
        ids=ids,
        fired=fired,
        means=(right, wrong),
        raw=ranked(design.raw),
        adjusted=ranked(design.adjusted) if design.adjusted else None,
        halves=effects.halves(x, splits, TOP),
    )


DEFINITION = Definition(
    contrast,
    version=3,
    options=Options,
    refuses=refusals.two_models,
    inputs=inputs,
    memory=memory,
    order=30,
    columns=(
        Column(
            "d",
            "d",
            "contrast d",
            "right answers less wrong ones, in standard deviations (Hedges' d, study=contrast)",
        ),
        Column("q", "d_q", "its q", "of all features up to this q, the share found by chance"),
    ),
)
