"""k-sparse probing: how well k latents tell labels apart, beside what costs less.

Whatever a linear probe on all dimensions reads is in the residual. A dictionary is worth something
for a label if a few of its latents read much of that, and more than as few dimensions, latents of a
random dictionary, or the text's length do. fitting.py has the probes and their splits, scoring.py
the figures and the verdict, examples.py the labels.

It is the evaluation of Gurnee et al. (arXiv 2305.01610), SAEBench (arXiv 2503.09532) and sae-probes
(Kantamneni et al., arXiv 2502.16681). SAEBench chooses k latents by the difference of means and
pools a text by its mean; sae-probes divides each latent by its mean first, and takes a text's last
token. Both split once. Ours are Hedges' g, which suits dimensions as well as latents; splits by
groups; a random dictionary; and intervals.

Shapes: n texts, S splits, C classes that are judged against the rest, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from residual_saes.analyze import refusals
from residual_saes.analyze.latents import directions
from residual_saes.analyze.latents.pooling import MEAN, POOLINGS, Reading, pooled
from residual_saes.analyze.memory import Needed, of_sae
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.parts import Parts
from residual_saes.analyze.questions import answering
from residual_saes.analyze.results import FEATURES, digest_of
from residual_saes.analyze.stats import Floats, permutation_p
from residual_saes.analyze.studies.probes import fitting, plot, scoring, words
from residual_saes.analyze.studies.probes.examples import (
    CORRECT,
    Examples,
    examples,
    label_of,
    require_group,
)
from residual_saes.analyze.studies.probes.fitting import (
    DENSE,
    DIMENSIONS,
    LATENTS,
    LENGTH,
    RANDOM,
    Inputs,
    Probing,
    Split,
)
from residual_saes.analyze.studies.probes.scoring import Scores
from residual_saes.analyze.study import Column, Definition, Study, at_least, write_features
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress, note, tell
from residual_saes.data.settings import build, whole
from residual_saes.data.site import RESID_POST, HookPoint

VERSION = 1  # of what is kept: raise it when the same texts give something else
SEED = 0  # of the random dictionary and the resampling


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/probes.yaml."""

    texts: str | None = None  # .jsonl of {text, label}
    label: str | None = None  # see examples.py
    group: str | None = None  # field of the lines, or `wording`
    layers: list[int] | str | None = None  # whose resid_post is probed too, or `all`
    k: Sequence[int] = (1, 2, 5, 10, 20)  # columns
    pooling: str = MEAN  # one of POOLINGS
    examples: int = 1000  # texts at most
    seeds: int = 5  # splits
    draws: int = 1000  # resamplings
    permutations: int = 20  # of the labels

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise SettingError(f"study.pooling={self.pooling} must be one of {', '.join(POOLINGS)}")
        sizes = self.k if isinstance(self.k, list | tuple) else [self.k]
        for size in sizes:
            at_least("study.k", whole("study.k", size), 1)
        if not sizes or len(set(sizes)) < len(sizes):
            raise SettingError(f"study.k={list(sizes)} must be different numbers, such as [1,5]")
        object.__setattr__(self, "k", sorted(map(int, sizes)))
        layers = [self.layers] if isinstance(self.layers, int) else self.layers
        if isinstance(layers, list | tuple):
            layers = list(dict.fromkeys(whole("study.layers", layer) for layer in layers))
        elif layers not in (None, "all"):
            raise SettingError(f"study.layers={layers} must be layers, such as [5,10], or all")
        object.__setattr__(self, "layers", layers)
        for name, least in (("examples", 30), ("seeds", 1), ("draws", 20), ("permutations", 1)):
            at_least(f"study.{name}", getattr(self, name), least)

    def points(self, study: Study) -> list[HookPoint]:
        """The layers that are asked for.

        Raises:
            SettingError: one is none of the model's.
        """
        layers = self.layers or []
        if isinstance(layers, str):
            layers = list(range(study.n_layers))
        for layer in layers:
            if not 0 <= layer < study.n_layers:
                raise SettingError(
                    f"study.layers={layer} must be among the model's layers, 0 to "
                    f"{study.n_layers - 1}"
                )
        return list(map(HookPoint, layers))


class Site(NamedTuple):
    """Where rows are probed."""

    name: str
    layer: int | None  # whose resid_post it is
    inputs: Inputs


class Measured(NamedTuple):
    """What is known of a site."""

    layer: int | None  # see `Site`
    scores: dict[Probing, Scores]
    odds: NDArray[np.float32]  # (probes, S, C, n)
    latents: NDArray[np.int64]  # (S, C, largest k) those chosen; of a site without any (S, C, 0)


def inputs(study: Study) -> dict[str, Any]:
    """What the result depends on beside its settings; what cannot be probed is refused here.

    Raises:
        SettingError, StoreError: see `examples`, and `Options.points`.
    """
    options = build(Options, "study", study.options)
    options.points(study)
    label = label_of(study, options.texts, options.label)
    require_group(options.texts, label, options.group)
    if label == CORRECT and not options.texts:
        return answering.inputs(study)
    return {"examples": digest_of(_examples(study, options, None).record())}


def probes(study: Study) -> Outcome:
    """The verdict by `scoring.RULE`, with every probe's figures."""
    options = build(Options, "study", study.options)
    tell(f"the rule: {scoring.RULE}")
    note("the texts and their labels")
    with StopRequest() as stop:
        made = _examples(study, options, stop)
        points = options.points(study)
        sites = _sites(study, made, points, options, stop)
        weight = scoring.resampling(made.group, options.draws, SEED)
        measured = {}
        for site in sites:
            measured[site.name] = _measure(study, made, site, options, weight, stop)
        own = sites[0]
        null = _null(study, made, own, options, stop)
        figures = _figures(study, made, measured, own.name, null, options)
        _write(study, made, own.inputs[LATENTS])
    study.subject.forget()
    return Outcome(figures, words.summary(figures), words.tables(figures), plot.pictures(figures))


def _examples(study: Study, options: Options, stop: StopRequest | None) -> Examples:
    label = label_of(study, options.texts, options.label)
    return examples(study, options.texts, label, options.group, options.examples, stop)


# -- what is probed --------------------------------------------------------------------------------


def _sites(
    study: Study, made: Examples, asked: list[HookPoint], options: Options, stop: StopRequest
) -> list[Site]:
    """What the dictionary reads, first; then the other layers that are asked for."""
    subject = study.subject
    reads = [port.point for port in subject.ports.reads]
    points = list(dict.fromkeys([*reads, *asked]))
    reading = Reading(
        points,
        [subject.sae, directions.random_dictionary(subject.sae, SEED)],
        options.pooling,
        "text",
    )
    key = {
        "version": VERSION,
        **study.identity,
        **answering.model_key(study),
        "points": [point.name for point in points],
        "pooling": options.pooling,
        "texts": digest_of({"spans": made.spans}),
    }
    found = pooled(study, "pooled", key, made.spans, reading, stop)
    rows = {point: found.hidden[:, index] for index, point in enumerate(points)}
    own = {
        LATENTS: found.features[0],
        DIMENSIONS: np.concatenate([rows[point] for point in reads], 1),
        RANDOM: found.features[1],
        LENGTH: made.length,
    }
    layer = reads[0].layer if len(reads) == 1 and reads[0].site == RESID_POST else None
    sites = [Site(" and ".join(map(str, subject.ports.reads)), layer, own)]
    for point in asked:
        if [point] != reads:
            sites.append(Site(str(point), point.layer, {DIMENSIONS: rows[point]}))
    return sites


def _measure(
    study: Study,
    made: Examples,
    site: Site,
    options: Options,
    weight: NDArray[np.float32],
    stop: StopRequest,
) -> Measured:
    """Every probe of a site in every split."""
    parts = _parts(study, made, site, options, "splits")
    wanted = fitting.probings(site.inputs, options.k)
    odds = []
    latents = []
    progress = Progress()
    for seed in range(options.seeds):
        sides = fitting.split(made.label, made.group, seed)

        def make(sides: Split = sides) -> dict[str, NDArray[Any]]:
            return fitting.judged(site.inputs, made.label, sides, wanted, stop)._asdict()

        part = parts.of(seed, make)
        odds.append(part["odds"])
        latents.append(part["latents"])
        line = f"{site.name}: {seed + 1}/{options.seeds} splits probed"
        progress.show(line, last=seed + 1 == options.seeds)
    every = np.stack(odds, 1)
    found = {}
    for probing, values in zip(wanted, every, strict=True):
        stop.check()
        found[probing] = scoring.scores(values, made.label, weight)
    return Measured(site.layer, found, every, np.stack(latents))


def _null(
    study: Study, made: Examples, own: Site, options: Options, stop: StopRequest
) -> dict[Probing, Floats]:
    """(permutations,) AUROC with labels permuted, of latents and of the dense probe."""
    parts = _parts(study, made, own, options, "permutations")
    every = fitting.probings(own.inputs, options.k)
    wanted = list(filter(lambda probing: probing.reads in (LATENTS, DENSE), every))
    found = []
    progress = Progress()
    for number in range(options.permutations):

        def make(number: int = number) -> dict[str, NDArray[Any]]:
            drawn = scoring.null(own.inputs, made.label, made.group, wanted, number, stop)
            return {"auroc": drawn}

        found.append(parts.of(number, make)["auroc"])
        line = f"{number + 1}/{options.permutations} permutations of the labels"
        progress.show(line, last=number + 1 == options.permutations)
    return dict(zip(wanted, np.stack(found, 1), strict=True))


def _parts(study: Study, made: Examples, site: Site, options: Options, what: str) -> Parts:
    """Where splits or permutations that are done are kept."""
    key = {
        "version": VERSION,
        **study.identity,
        **answering.model_key(study),
        "examples": digest_of(made.record()),
        "what": what,
        "site": site.name,
        "k": list(options.k),
        "pooling": options.pooling,
    }
    return study.subject.parts("probes", key)


# -- figures ---------------------------------------------------------------------------------------


def _figures(
    study: Study,
    made: Examples,
    measured: dict[str, Measured],
    own: str,
    null: dict[Probing, Floats],
    options: Options,
) -> dict[str, Any]:
    found = measured[own].scores
    dense = found[Probing(DENSE)].auroc
    counts = np.bincount(made.label)
    sites = {}
    for name, of_site in measured.items():
        of_probes: list[dict[str, Any]] = []
        for probing, scores in of_site.scores.items():
            record: dict[str, Any] = {"probe": str(probing), "reads": probing.reads, "k": probing.k}
            record |= scores.record()
            if name == own and probing.k:
                record["kept"] = scoring.kept_share(scores.auroc, dense)
            of_probes.append(record)
        sites[name] = of_probes
    of_null = {}
    for probing, values in null.items():
        of_null[str(probing)] = {
            "mean": float(values.mean()),
            "most": float(np.quantile(values, 0.95)),
            "p": permutation_p(float(found[probing].auroc[0]), values),
        }
    return {
        **scoring.judgement(found, null[Probing(DENSE)]),
        "rule": scoring.RULE,
        "own": own,
        "label": label_of(study, options.texts, options.label),
        "noun": study.subject.noun,
        "options": {**vars(options), "seed": SEED},
        "texts": len(made.label),
        "groups": int(made.group.max()) + 1,
        "repeated": made.repeated,
        "contradicting": made.contradicting,
        "left_out": made.left_out,
        "chance": {
            "auroc": 0.5,
            "balanced": 1 / len(made.names),
            "accuracy": float(counts.max() / counts.sum()),
        },
        "classes": _of_classes(made, measured[own], options),
        "sites": sites,
        "layers": {name: of_site.layer for name, of_site in measured.items()},
        "null": of_null,
    }


def _of_classes(made: Examples, own: Measured, options: Options) -> list[dict[str, Any]]:
    """Each class that is judged against the rest: its first latents, and AUROC of its probes."""
    judged = made.names[1:] if len(made.names) == 2 else made.names
    found = []
    for number, name in enumerate(judged):
        first, times = np.unique(own.latents[:, number, 0], return_counts=True)
        most = np.argsort(-times, kind="stable")
        chosen = np.stack([first, times], 1)[most]
        aurocs = {}
        for probing, odds in zip(own.scores, own.odds, strict=True):
            aurocs[str(probing)] = scoring.of_class(odds, made.label, number)
        found.append(
            {
                "class": name,
                "texts": int((made.label == made.names.index(name)).sum()),
                "first_latents": chosen.tolist(),
                "latents": own.latents[:, number].tolist(),
                "auroc": aurocs,
            }
        )
    return found


# -- files -----------------------------------------------------------------------------------------


def _write(study: Study, made: Examples, features: Any) -> None:
    """Of every latent the class that it tells best by itself, and how well on other texts."""
    best, aurocs = scoring.of_latents(features, made.label, made.group, SEED)
    names = made.names[1:] if len(made.names) == 2 else made.names
    fires = np.diff(features.tocsc().indptr)
    silent = fires == 0
    columns = {
        "feature": pa.array(np.arange(features.shape[1]), pa.uint32()),
        "texts": pa.array(fires),
        "class": pa.array(np.array(names)[best].tolist(), mask=silent),
        "auroc": pa.array(aurocs, mask=silent),
    }
    write_features(study.folder / FEATURES, columns)


def memory(study: Study) -> Needed:
    """The dictionary and the random one, texts' states, and the latents of 4,096 columns."""
    options = build(Options, "study", study.options)
    layers = study.n_layers if options.layers == "all" else len(options.layers or []) + 1
    states = 5.0 * layers * options.examples * study.subject.store.d_model
    return Needed(
        2 * of_sae(study.subject) + states + 24.0 * options.examples * fitting.WIDTH, "study.k"
    )


DEFINITION = Definition(
    probes,
    options=Options,
    inputs=inputs,
    refuses=refusals.two_models,
    memory=memory,
    order=55,
    columns=(
        Column(
            "auroc",
            "probe_auroc",
            "probe AUROC",
            "how well the latent alone tells the class that it tells best from the rest, on texts "
            "that did not choose the class: 0.5 is chance, below it the latent is low in the class "
            "(study=probes)",
        ),
    ),
)
