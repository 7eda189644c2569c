"""What the model writes behind `prompt=` while latents are pushed, side by side for several scales.

analyze/changes/steered.py says what a scale means. Beside each scale stand the same with random
latents of equal density, whose push is as long. Scale 0 goes through the same code as any other,
and must write what the untouched model writes, token for token.

Each prompt has a folder of its own in the study's (analyze/shelf.py): steer.json, steer.md,
index.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from typing import Any

import numpy as np

from residual_saes.analyze import given, refusals, shelf
from residual_saes.analyze.changes import steered
from residual_saes.analyze.changes.steered import Push, Writer
from residual_saes.analyze.language_model import Generation
from residual_saes.analyze.latents import rates
from residual_saes.analyze.latents.matched import random_latents
from residual_saes.analyze.outcome import Outcome, Table
from residual_saes.analyze.pages.template import rendered
from residual_saes.analyze.study import Definition, Study, at_least
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import PipelineError, SettingError
from residual_saes.data.settings import build

VERSION = 1


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/steer.yaml."""

    new_tokens: int = 64  # of a continuation, at most
    seed: int = 0  # of the random latents
    rows: int = rates.ROWS  # held-out rows to count mean activations on, without a catalogue

    def __post_init__(self) -> None:
        at_least("study.new_tokens", self.new_tokens, 1)
        at_least("study.seed", self.seed, 0)
        at_least("study.rows", self.rows, 1)


@dataclass(frozen=True)
class Asked:
    """What is asked, checked before the model is loaded."""

    content: Any  # the prompt, or the chat
    ids: list[int]  # of the prompt, with BOS
    features: list[int]
    scales: list[float]

    @property
    def in_turns(self) -> bool:
        return given.is_chat(self.content)

    @property
    def name(self) -> str:
        return _named(self.features)


def asked_of(study: Study, options: Options) -> Asked:
    """What the settings ask.

    Raises:
        SettingError: a setting cannot be meant.
    """
    features = steered.features_of(study.asked.get("feature"), study.subject.sae.d_sae)
    scales = steered.scales_of(study.asked.get("scale"))
    contents = given.contents("prompt", study.asked.get("prompt"))
    if len(contents) > 1:
        raise SettingError(f"prompt= has {len(contents)} texts; give one, and each its own command")
    description = study.description
    context = description.max_context or 2**31
    (ids,) = given.sequences("prompt", contents, description.tokenizer, context, reply=True)
    steered.require_room("study.new_tokens", options.new_tokens, ids, context)
    return Asked(contents[0], ids, features, scales)


def steer(study: Study) -> Outcome:
    """The continuations, as they were made before or are now."""
    options = build(Options, "study", study.options)
    asked = asked_of(study, options)
    key = {
        **study.settings(DEFINITION),
        "prompt": asked.ids,
        "feature": asked.features,
        "scale": asked.scales,
        "catalogue": rates.catalogue_digest(study.subject),
    }
    known = rates.of(study.subject, options.rows)
    pushes = pushes_of(study.subject, options, asked, known)

    def make() -> tuple[Outcome, bytes]:
        outcome = _steered(study, options, asked, known, pushes)
        return outcome, _page(study, asked, outcome)

    return shelf.outcome_of(study, given.label(asked.content), key, make)


def pushes_of(
    subject: Subject, options: Options, asked: Asked, known: rates.Rates
) -> dict[str, Push]:
    """What scale 1 adds: of the `chosen` latents, and as long of `random` ones of equal density."""
    chosen = Push.usual(subject.sae, asked.features, known)
    rng = np.random.default_rng(options.seed)
    drawn = random_latents(known.density, asked.features, rng).tolist()
    random = Push.usual(subject.sae, drawn, known)
    return {"chosen": chosen, "random": random.scaled(chosen.norm / (random.norm or 1.0))}


def writer_of(study: Study, options: Options, asked: Asked) -> Writer:
    """Writes behind the prompt; the model is loaded."""
    layer = study.subject.layer
    return Writer(study.lm, layer, asked.ids, options.new_tokens, asked.in_turns)


def doses(
    writer: Writer, plain: Generation, pushes: Mapping[str, Push], scales: Sequence[float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each push does at each scale, scale by scale; each with the push's name."""
    for scale in scales:
        for name, push in pushes.items():
            yield name, _dose(writer, plain, push, scale)


def _steered(
    study: Study,
    options: Options,
    asked: Asked,
    known: rates.Rates,
    pushes: Mapping[str, Push],
) -> Outcome:
    writer = writer_of(study, options, asked)
    plain = writer.written(None)
    figures: dict[str, Any] = {
        "prompt": given.label(asked.content),
        "prompt_ids": asked.ids,
        "layer": writer.layer,
        "rows": known.rows,
        "untouched": {"ids": plain.ids, "text": steered.text_of(study.lm, plain)},
    }
    for name, push in pushes.items():
        features = list(push.features)
        figures[name] = {
            "features": features,
            "activations": list(push.activations),  # that scale 1 adds
            "density": known.density[features].tolist(),
            "doses": [],
        }
    for name, dose in doses(writer, plain, pushes, asked.scales):
        figures[name]["doses"].append(dose)
    return _outcome(asked, figures)


def _dose(writer: Writer, plain: Generation, push: Push, scale: float) -> dict[str, Any]:
    dose = writer.dose(plain, push, scale)
    written = dose.generation
    return {
        "scale": scale,
        "added": push.scaled(scale).activations,
        "relative": dose.relative,
        "norm": dose.norm,
        "kl": dose.kl,
        "text": dose.text,
        "ids": written.ids,
        "finished": written.finished,
        "same_tokens": _shared(written.ids, plain.ids),
        "is_untouched": written == plain,
    }


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with together."""
    pairs = zip(first, second, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


# -- in words --------------------------------------------------------------------------------------


def _outcome(asked: Asked, figures: Mapping[str, Any]) -> Outcome:
    chosen, random = figures["chosen"]["doses"], figures["random"]["doses"]
    for dose in (*chosen, *random):
        if dose["scale"] == 0 and not dose["is_untouched"]:
            raise PipelineError(
                "scale 0 changed the continuation, so generation does not repeat itself on this "
                "device; no scale can be judged"
            )
    summary = [
        f"{_changed(chosen)} of {len(chosen)} scales of {asked.name} change the continuation.",
        f"The same lengths along {_random(figures)} change it at {_changed(random)}.",
        *_meaning(figures),
    ]
    if 0 in asked.scales:
        summary.append("Scale 0 writes what the untouched model writes, token for token.")
    rows = []
    for dose, other in zip(chosen, random, strict=True):
        rows.append(
            (
                f"{dose['scale']:g}",
                _added(dose),
                f"{dose['relative']:.3g}",
                f"{dose['kl']:.3g}",
                f"{other['kl']:.3g}",
                _same(dose),
                _same(other),
            )
        )
    header = ("scale", "added", "|delta|/|h|", "KL", "KL, random", "same tokens", "same, random")
    figure_table = Table("Each scale", header, rows)
    texts = [("untouched", "", figures["untouched"]["text"])]
    for dose, other in zip(chosen, random, strict=True):
        texts.append((f"{dose['scale']:g}", asked.name, dose["text"]))
        texts.append((f"{dose['scale']:g}", "random", other["text"]))
    caption = f"What is written behind: {figures['prompt']}"
    return Outcome(
        dict(figures), summary, [figure_table, Table(caption, ("scale", "of", "text"), texts)]
    )


def _changed(doses: Sequence[Mapping[str, Any]]) -> int:
    untouched = list(map(itemgetter("is_untouched"), doses))
    return untouched.count(False)


def _added(dose: Mapping[str, Any]) -> str:
    return " and ".join(f"{value:.4g}" for value in dose["added"])


def _same(dose: Mapping[str, Any]) -> str:
    return "all" if dose["is_untouched"] else str(dose["same_tokens"])


def _named(features: Sequence[int]) -> str:
    plural = "s" if len(features) > 1 else ""
    return f"latent{plural} {' + '.join(map(str, features))}"


def _random(figures: Mapping[str, Any]) -> str:
    return f"random {_named(figures['random']['features'])} of equal density"


def _meaning(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    columns = itemgetter("features", "activations", "density")(figures["chosen"])
    for feature, mean, density in zip(*columns, strict=True):
        lines.append(
            f"Scale 1 adds {mean:.4g} times the direction of latent {feature} to layer "
            f"{figures['layer']} at every position: its mean activation where it fires, on "
            f"{100 * density:.3g}% of {figures['rows']:,} rows."
        )
    lines.append(
        "KL is of the next token, steered from untouched, in nats a token of the untouched "
        "continuation; |delta|/|h| is what was added over what was there."
    )
    return lines


def _page(study: Study, asked: Asked, outcome: Outcome) -> bytes:
    figures = outcome.figures
    plain = figures["untouched"]["text"]
    columns = []
    for dose, other in zip(*(figures[name]["doses"] for name in ("chosen", "random")), strict=True):
        cells = []
        for name, each in ((asked.name, dose), ("random", other)):
            same = _shared(plain, each["text"])
            parts = (each["text"][:same].split("\n"), each["text"][same:].split("\n"))
            cells.append({"name": name, "kl": each["kl"], "parts": parts})
        columns.append({"scale": dose["scale"], "added": _added(dose), "cells": cells})
    return rendered(
        "steer.html",
        name=asked.name,
        run=str(study.subject.run.resolve().name),
        prompt=figures["prompt"].split("\n"),
        plain=plain.split("\n"),
        summary=outcome.summary,
        table=outcome.tables[0],
        columns=columns,
    )


DEFINITION = Definition(
    steer,
    version=VERSION,
    options=Options,
    refuses=refusals.all_but_of_streams,
    order=191,
    fresh=True,
    takes=("prompt", "feature", "scale"),
    finds=False,
)
