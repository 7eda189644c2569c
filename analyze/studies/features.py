"""Which latents fire on the tokens of a text that the user gives: `text=`.

Every token but BOS is encoded, also those that the run's policy leaves out of training. Each text
has a folder of its own in the study's (analyze/shelf.py): features.json, features.md, index.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from operator import itemgetter
from os.path import relpath
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from residual_saes.analyze import given, refusals, shelf
from residual_saes.analyze.latents import rates, text_features
from residual_saes.analyze.latents.rates import Rates
from residual_saes.analyze.latents.text_features import Reader, TextFeatures, word
from residual_saes.analyze.outcome import Outcome, Table
from residual_saes.analyze.pages.template import rendered, sha256_of
from residual_saes.analyze.results import FOLDER, PAGE
from residual_saes.analyze.study import Definition, Study, at_least
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import SettingError
from residual_saes.data.settings import build
from residual_saes.data.text.documents import Content

VERSION = 1


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/features.yaml."""

    each: int = 5  # latents of a token
    most: int = 20  # latents of a text, the strongest first
    others: list[str] = field(default_factory=list)  # other runs on the same store
    rows: int = rates.ROWS  # held-out rows to count densities on, where there is no catalogue

    def __post_init__(self) -> None:
        for name in ("each", "most", "rows"):
            at_least(f"study.{name}", getattr(self, name), 1)
        if not isinstance(self.others, list) or not all(map(_is_name, self.others)):
            raise SettingError(
                f"study.others={self.others} must be a list of directories, such as [runs/b,runs/c]"
            )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


class Asked(NamedTuple):
    """What is asked, checked before the model is loaded."""

    texts: Sequence[Content]
    sequences: Sequence[Sequence[int]]  # ids of each text, BOS first


def asked_of(study: Study) -> Asked:
    """The texts of text=.

    Raises:
        SettingError: there are none, or one cannot be read.
    """
    texts = given.contents("text", study.asked.get("text"))
    tokenizer = study.description.tokenizer
    return Asked(texts, given.sequences("text", texts, tokenizer, study.subject.store.context))


def features(study: Study) -> Outcome:
    """The features of the texts, as they were found before or are now."""
    options = build(Options, "study", study.options)
    subject = study.subject
    subjects = [subject, *map(subject.beside, options.others)]
    for other in subjects[1:]:
        if reason := refusals.two_models(other, {}):
            raise SettingError(f"study.others={other.run}: {reason}")
    asked = asked_of(study)
    key = {
        **study.settings(DEFINITION),
        "texts": durable.digest(str(asked.sequences).encode()),
        "runs": list(map(_follows, subjects)),
    }

    def make() -> tuple[Outcome, bytes]:
        blocks = [block for block, _ in found(study, subjects, asked, options)]
        return _outcome(blocks), page_of(study, blocks)

    return shelf.outcome_of(study, given.label(asked.texts[0]), key, make)


def found(
    study: Study, subjects: Sequence[Subject], asked: Asked, options: Options
) -> Iterator[tuple[dict[str, Any], TextFeatures]]:
    """Of each text in each run what is shown of it, and all that fires."""
    known = list(map(partial(rates.of, rows=options.rows), subjects))
    readers = list(map(Reader.of, subjects))
    for number, of_text in enumerate(text_features.read(study.lm, readers, asked.sequences)):
        for subject, rate, features in zip(subjects, known, of_text, strict=True):
            yield _block(asked.texts, number, subject, rate, features, options), features


def _follows(subject: Subject) -> dict[str, Any]:
    """What a run's part depends on."""
    return {
        "sae": subject.digest,
        "catalogue": rates.catalogue_digest(subject),
        "browser": _browser(subject).is_file(),
    }


def _browser(subject: Subject) -> Any:
    return subject.run / FOLDER / "browser" / PAGE


# -- a text in a run -------------------------------------------------------------------------------


def _block(
    texts: Sequence[Content],
    number: int,
    subject: Subject,
    rate: Rates,
    features: TextFeatures,
    options: Options,
) -> dict[str, Any]:
    """All that is shown of one text in one run, as plain values."""
    strong = features.top(options.most)
    examples = rate.examples([latent.feature for latent in strong])
    latents = []
    for latent in strong:
        latents.append(
            {
                "feature": latent.feature,
                "max": latent.max,
                "mean": latent.mean,
                "tokens": list(latent.tokens),
                "values": features.of(latent.feature)[list(latent.tokens)].tolist(),
                "words": features.words(latent.tokens),
                "density": float(rate.density[latent.feature]),
                "usual": float(rate.mean[latent.feature]),
                **examples.get(latent.feature, {}),
            }
        )
    name = f"{subject.run.resolve().name}, {subject.where}"
    return {
        "text": number + 1,
        "of": len(texts),
        "run": str(subject.run),
        "name": name if len(texts) == 1 else f"text {number + 1}: {name}",
        "ids": list(features.ids),
        "tokens": list(features.tokens),
        "strongest": list(map(partial(features.at, count=options.each), range(len(features.ids)))),
        "latents": latents,
        "fire": len(set(features.feature.tolist())),
        "rows": rate.rows,
        "has_catalogue": rate.catalogue is not None,
        "browser": str(_browser(subject)) if _browser(subject).is_file() else None,
    }


# -- in words --------------------------------------------------------------------------------------


def _outcome(blocks: Sequence[Mapping[str, Any]]) -> Outcome:
    summary = []
    tables = []
    for block in blocks:
        summary.append(_sentence(block))
        rows = []
        for position, token in enumerate(block["tokens"]):
            strongest = [f"{latent} {value:.4g}" for latent, value in block["strongest"][position]]
            said = ", ".join(strongest) or "none"
            rows.append((str(position), token, said if position else "BOS, which is not encoded"))
        tables.append(Table(f"{block['name']}: each token", ("", "token", "strongest"), rows))
        tables.append(_of_text(block))
    lacking = [block["run"] for block in blocks if not block["has_catalogue"]]
    where = "held-out" if lacking else "of the catalogue"
    rows_of = map(itemgetter("rows"), blocks)
    counted = " and ".join(map("{:,}".format, dict.fromkeys(rows_of)))
    summary.append(
        f"A latent's density, and its usual activation where it fires, are of {counted} {where} "
        "rows without BOS."
    )
    for run in dict.fromkeys(lacking):
        summary.append(
            f"`python -m analyze study=catalogue run={run}` tells what a latent fires on "
            "elsewhere, and what it raises."
        )
    return Outcome({"texts": list(blocks)}, summary, tables)


def _sentence(block: Mapping[str, Any]) -> str:
    count = len(block["tokens"])
    if not block["latents"]:
        return f"{block['name']}: no latent fires on the {count} tokens."
    first = block["latents"][0]
    peak = first["tokens"][first["values"].index(first["max"])]
    return (
        f"{block['name']}: {block['fire']} latents fire on the {count} tokens; the strongest is "
        f"{first['feature']}, {first['max']:.4g} on token {peak}, {word(block['tokens'][peak])}."
    )


def _of_text(block: Mapping[str, Any]) -> Table:
    header = ["latent", "max", "mean", "usual", "density", "fires on"]
    if block["has_catalogue"]:
        header += ["elsewhere on", "raises"]
    rows = []
    for latent in block["latents"]:
        row = [
            str(latent["feature"]),
            f"{latent['max']:.4g}",
            f"{latent['mean']:.4g}",
            f"{latent['usual']:.4g}",
            f"{100 * latent['density']:.3g}%",
            latent["words"],
        ]
        if block["has_catalogue"]:
            row += [" ".join(latent.get("peaks", ())), " ".join(latent.get("raised", ()))]
        rows.append(tuple(row))
    return Table(f"{block['name']}: the strongest latents", tuple(header), rows)


# -- the page --------------------------------------------------------------------------------------


def page_of(study: Study, blocks: Sequence[Mapping[str, Any]]) -> bytes:
    script = (
        resources.files("residual_saes.analyze.pages")
        .joinpath("templates", "features.js")
        .read_text()
    )
    shown = []
    for block in blocks:
        link = None
        if block["browser"]:
            # The page lies one folder deeper than the study's own.
            link = quote(relpath(block["browser"], study.place / "one"))
        shown.append({**block, "link": link})
    return rendered(
        "features.html",
        blocks=shown,
        script=Markup(script),  # our own file
        source=sha256_of(script),
    )


DEFINITION = Definition(
    features,
    version=VERSION,
    options=Options,
    refuses=refusals.two_models,
    order=190,
    fresh=True,
    takes=("text",),
    finds=False,
)
