"""Which dictionaries find features that are known, and where variance explained says otherwise.

SynthSAEBench (arXiv 2602.14687) found dictionaries that reconstruct better and find less. Here
every objective of the project is trained at several k on rows that are made of known features, and
what it finds is held against what it explains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from residual_saes.analyze import results
from residual_saes.analyze.outcome import dumped, markdown, printed
from residual_saes.analyze.pages.template import rendered
from residual_saes.analyze.stats import spearman
from residual_saes.analyze.studies.synth import scores, training, words
from residual_saes.analyze.studies.synth.baselines import Encoder, baselines, of_sae, pursuit
from residual_saes.analyze.studies.synth.planted import CHOICE, HELD_OUT, MOST_OFTEN, World
from residual_saes.analyze.studies.synth.training import Dictionary
from residual_saes.analyze.studies.synth.verdict import (
    Floats,
    disagreements,
    half_width,
    log_explained,
)
from residual_saes.analyze.study import Definition, at_least
from residual_saes.data import sealed
from residual_saes.data.errors import SettingError
from residual_saes.data.journal import Progress, note, show, tell
from residual_saes.data.neutral import neutral
from residual_saes.data.settings import build, names, number, whole
from residual_saes.train import objective, sae_file
from residual_saes.train.sae import SAE
from residual_saes.train.trainer import TrainConfig

VERSION = 1
PURSUIT = "pursuit"
CORRELATED = ("f1", "f1_by_decoder", "mcc", "absorption")  # with variance explained
_FOLDER = "synth"  # without out=
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/synth.yaml."""

    objectives: Any = "all"
    k: Any = (3, 6, 12)
    l1: Any = (5.0, 2.5, 1.0)
    n_features: int = 128
    d_model: int = 48
    d_sae: int = 128
    active: float = 6.0
    hierarchy: float = 0.5
    correlation: float = 0.3
    tail: float = 0.7
    noise: float = 0.05
    tokens: int = 200_000
    rows: int = 16_384
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("n_features", "d_model", "d_sae"):
            at_least(f"study.{name}", getattr(self, name), 2)
        at_least("study.rows", self.rows, 100)
        at_least("study.seeds", self.seeds, 1)
        at_least("study.tokens", self.tokens, training.BATCH)
        asked = names("study.objectives", self.objectives, objective.names())
        self._set("objectives", tuple(asked))
        self._set("k", _each("study.k", self.k, whole))
        self._set("l1", _each("study.l1", self.l1, number))
        for k in self.k:
            if not 1 <= k <= self.d_sae:
                raise SettingError(f"study.k={k} must be from 1 to study.d_sae={self.d_sae}")
        if "gated" in self.objectives and len(self.l1) != len(self.k):
            raise SettingError(
                f"study.l1 has {len(self.l1)} values and study.k {len(self.k)}; give one for each "
                "k, or leave gated out of study.objectives"
            )
        bounds = {"hierarchy": 1.0, "correlation": 0.99, "tail": 5.0, "noise": 1e3}
        for name, most in bounds.items():
            if not 0 <= getattr(self, name) <= most:
                value = getattr(self, name)
                raise SettingError(f"study.{name}={value} must be from 0 to {most:g}")
        if not 0 < self.active <= 0.99 * (most := self.world(0).most_active):
            raise SettingError(
                f"study.active={self.active} must be above 0 and at most {0.99 * most:.1f}, for no "
                f"root of study.n_features={self.n_features} fires on more than {MOST_OFTEN:.0%} "
                "of the rows"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def world(self, seed: int) -> World:
        known: dict[str, Any] = {"features": self.n_features, "seed": seed}
        for field in fields(World):
            known.setdefault(field.name, getattr(self, field.name, None))
        return World(**known)

    def config(self, dictionary: Dictionary, seed: int) -> TrainConfig:
        """An arm's settings of training."""
        config = training.config(dictionary, self.d_model, self.d_sae, self.tokens, seed)
        if dictionary.objective != "gated":
            return config
        l1 = self.l1[self.k.index(dictionary.k)]
        return replace(config, sae=replace(config.sae, l1_coef=l1))  # type: ignore[call-arg]

    @property
    def dictionaries(self) -> list[Dictionary]:
        """What is trained on every world."""
        return [Dictionary(name, k) for name in self.objectives for k in self.k]

    @property
    def compared(self) -> list[Dictionary]:
        """The arms: what is trained, and TopK's dictionaries read by matching pursuit."""
        pursued = [PURSUIT] if "topk" in self.objectives else []
        return [Dictionary(name, k) for name in (*self.objectives, *pursued) for k in self.k]


def _each(name: str, value: Any, read: Callable[[str, Any], T]) -> tuple[T, ...]:
    """A value, or a list of different ones, each read."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or len(set(map(str, values))) < len(values):
        raise SettingError(f"{name}={values} must be a list of different numbers")
    return tuple(read(name, item) for item in values)


def compare(settings: Mapping[str, Any]) -> None:
    """Train and judge every arm, and write the page.

    Raises:
        SettingError: run= or runs= is given, or a setting is wrong.
        PipelineError: an arm could not be trained.
    """
    for name in ("run", "runs", "store"):
        if settings[name]:
            raise SettingError(
                f"{name}={settings[name]} is of studies of a run; study=synth trains its own "
                "dictionaries, so leave it out, and say by out= where its files go"
            )
    given = {key: value for key, value in settings["study"].items() if key != "name"}
    options = build(Options, "study", given)
    out = Path(settings["out"] or _FOLDER)
    tell(*words.rule(len(options.compared), options.seeds))
    with results.locked(out, "synth"):
        table = measure(options, out)
        outcome = words.outcome_of(figures_of(options, table))
        record = {"study": "synth", "summary": outcome.summary, "figures": outcome.figures}
        page = rendered(
            "study.html",
            name=neutral(out.absolute().name),
            title="dictionaries on known features",
            summary=outcome.summary,
            tables=outcome.tables,
            pictures=list(outcome.pictures.values()),
        )
        files = {
            "synth.json": dumped(record).encode() + b"\n",
            "synth.md": "\n".join(["# synth", "", *markdown(outcome), ""]).encode(),
            "synth.html": page,
        }
        results.write_beside(out, "synth", files)
    show("# synth", "", *printed(outcome))
    tell("", f"wrote {out / 'synth.html'}: open it in a browser; beside it synth.json, synth.md")


# -- arms ------------------------------------------------------------------------------------------

Scores = dict[str, float]


def measure(options: Options, out: Path) -> dict[str, list[Scores]]:
    """By arm, trained or not, its scores on each world."""
    table: dict[str, list[Scores]] = {}
    for seed in range(options.seeds):
        for name, found in Judge(options, out, seed).all().items():
            table.setdefault(name, []).append(found)
    return table


class Judge:
    """One world: its arms are trained, and judged beside what nobody trained."""

    def __init__(self, options: Options, out: Path, seed: int) -> None:
        note(f"world {seed}: drawing rows")
        self.options = options
        self.world = options.world(seed)
        self.seed = seed
        self._arms = out / "arms"
        self._stream = training.stream_of(self.world, options.tokens)
        self._choice = self.world.draw(CHOICE, 0, options.rows)
        self._held_out = self.world.draw(HELD_OUT, 0, options.rows)
        self._progress = Progress()

    def all(self) -> dict[str, Scores]:
        """The scores, by the arm's name; those that are there are not made again.

        Raises:
            PipelineError: an arm could not be trained; the others are.
        """
        arms = {}
        for dictionary in self.options.dictionaries:
            config = self.options.config(dictionary, self.seed)
            arms[dictionary] = training.arm_of(dictionary, config, self._stream, self._arms)
        failed = training.train_all(list(arms.values()))
        if failed:
            raise failed
        found = {}
        for dictionary, arm in arms.items():
            found[dictionary.name] = self._kept(arm.folder, "found", of_sae)
            if dictionary.objective == "topk":
                name = Dictionary(PURSUIT, dictionary.k).name
                found[name] = self._kept(arm.folder, PURSUIT, pursuit)
        return {**found, **self._untrained()}

    def _untrained(self) -> dict[str, Scores]:
        """The scores of what nobody trained, at the k nearest to how many features a row has."""
        options = self.options
        k = min(options.k, key=lambda k: abs(k - options.active))
        config = options.config(Dictionary("topk", k), self.seed)
        found = {}
        for name, encoder in baselines(self.world, self._stream, config).items():
            found[name] = self._scores(name, encoder)
        return found

    def _kept(self, arm: Path, name: str, reading: Callable[[SAE], Encoder]) -> Scores:
        """The scores in NAME.json of an arm's folder, or made now."""
        path = arm / f"{name}.json"
        of = {"version": VERSION, "rows": self.options.rows}
        if content := sealed.read(path):
            kept = json.loads(content)
            if kept.get("of") == of:
                return dict(kept["scores"])
        found = self._scores(arm.name, reading(sae_file.load(arm / sae_file.FILE)))
        sealed.write(path, [json.dumps({"of": of, "scores": found}).encode()])
        return found

    def _scores(self, name: str, encoder: Encoder) -> Scores:
        self._progress.show(f"world {self.seed}: judging {name}")
        chosen, code = encoder(self._choice.x), encoder(self._held_out.x)
        return scores.scores(self.world, self._choice, self._held_out, chosen, code)


# -- figures ---------------------------------------------------------------------------------------


def figures_of(options: Options, table: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Every figure, as plain JSON: of each arm its mean, and by world."""
    arms: dict[str, dict[str, Any]] = {}
    for name, found in table.items():
        arms[name] = {key: _over([scores[key] for scores in found]) for key in found[0]}
    names = [arm.name for arm in options.compared]
    values: dict[str, Floats] = {}  # (arms, worlds) of each figure
    for key in ("variance_explained", *CORRELATED):
        values[key] = np.array([arms[name][key]["by_seed"] for name in names])
    explained = log_explained(values["variance_explained"])
    pairs = []
    for more, less in disagreements(explained, values["f1"]):
        pair: dict[str, Any] = {"more": names[more], "less": names[less]}
        pair["same_k"] = options.compared[more].k == options.compared[less].k
        for key in ("variance_explained", "f1"):
            pair[key] = float(values[key][more].mean() - values[key][less].mean())
        pairs.append(pair)
    frequency = options.world(0).frequency
    return {
        "options": {**vars(options)},
        "version": VERSION,
        "true_l0": float(frequency.sum()),
        "always_on": float(np.mean(2 * frequency / (1 + frequency))),
        "arms": arms,
        "compared": names,
        "half_widths": {"log_unexplained": half_width(explained), "f1": half_width(values["f1"])},
        "pairs": math.comb(len(names), 2),
        "disagreements": pairs,
        "rank_correlations": _rank_correlations(options, values),
    }


def _rank_correlations(options: Options, values: Mapping[str, Floats]) -> dict[str, Any]:
    """Of figures with variance explained, by world: over all arms, and over those of each k."""
    ks = np.array([arm.k for arm in options.compared])
    groups = {"all": ks > 0} | {f"k {k}": ks == k for k in options.k}
    correlations: dict[str, Any] = {}
    for key in CORRELATED:
        correlations[key] = {}
        for group, own in groups.items():
            by_world = []
            for world in range(options.seeds):
                x = values["variance_explained"][own, world]
                by_world.append(spearman(x, values[key][own, world]))
            correlations[key][group] = _over(by_world)
    return correlations


def _over(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "by_seed": list(values)}


DEFINITION = Definition(compare=compare, options=Options)
