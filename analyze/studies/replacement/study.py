"""All MLPs replaced by transcoders at once, and whether the model that is left is near enough.

The model is read as circuit-tracer reads it: `study=replacement runs=FOLDER`, one transcoder for
each of several layers, such as the arms of `python -m train -m layer=0,1,2,... sae=transcoder_32k`.
Measured are the cross entropy and KL of the replaced model (analyze/studies/replacement/spliced.py)
with all layers, each alone, and all up to each, beside

    errors added back   what each transcoder leaves out is added: must change nothing, exactly
    linear maps         a linear map in place of each transcoder (analyze/linear.py)
    mean, zero          every MLP's output replaced by its mean over the training rows, by zeros

It passes if all of these hold for the replaced model:

    loss recovered      (CE_mean - CE) / (CE_mean - CE_clean) is at least study.least_recovered,
                        with its whole interval over documents
    CE                  exceeds the model's own by at most study.most_ce_increase, likewise
    linear maps         cost more, with the whole interval of the paired difference
    errors added back   change no token's loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residual_saes.analyze import kept, language_model, results
from residual_saes.analyze.losses import SEED, TRAINED, Losses, choose, ratios
from residual_saes.analyze.outcome import Outcome, dumped, markdown, printed
from residual_saes.analyze.pages.template import rendered
from residual_saes.analyze.parts import Parts
from residual_saes.analyze.questions.answering import model_key
from residual_saes.analyze.results import digest_of
from residual_saes.analyze.stats import sums_by
from residual_saes.analyze.studies.replacement import spliced
from residual_saes.analyze.studies.replacement.spliced import (
    IDENTITY,
    LINEAR,
    MEAN,
    TRANSCODERS,
    Layer,
    Way,
)
from residual_saes.analyze.studies.replacement.words import find, outcome_of, transcoders
from residual_saes.analyze.studies.sweep import arms
from residual_saes.analyze.study import Definition, Study, at_least, model_of
from residual_saes.analyze.subject import Subject, places_of
from residual_saes.data.device import torch_device
from residual_saes.data.errors import MismatchError, SettingError
from residual_saes.data.journal import show, tell
from residual_saes.data.neutral import neutral
from residual_saes.data.settings import build
from residual_saes.data.site import MLP_OUT

VERSION = 1  # of the kept losses: raise it when the same pieces give other ones


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/replacement.yaml."""

    tokens: int = 20_000  # held-out tokens at most, in whole pieces
    least_recovered: float = 0.5  # to pass: share of what mean ablation costs
    most_ce_increase: float | None = None  # to pass: nats a token; None: whatever it is

    def __post_init__(self) -> None:
        at_least("study.tokens", self.tokens, 2)
        if not self.least_recovered <= 1:
            raise SettingError(
                f"study.least_recovered={self.least_recovered} must be at most 1: all of the loss"
            )
        if self.most_ce_increase is not None and not self.most_ce_increase >= 0:
            raise SettingError(
                f"study.most_ce_increase={self.most_ce_increase} must be 0 or more nats a token"
            )


def compare(settings: Mapping[str, Any]) -> None:
    """Measure the replaced model, and write its page.

    Raises:
        SettingError: runs= is missing or names what is no transcoder of an MLP, or two of a layer.
        StoreError: a run is missing, unfinished or damaged.
        MismatchError: the runs are of different stores.
    """
    if settings["run"] or not settings["runs"]:
        raise SettingError(
            "study=replacement takes runs=, the directories of transcoders of several layers, e.g. "
            "runs=runs/SWEEP/*"
        )
    given = {key: value for key, value in settings["study"].items() if key != "name"}
    options = build(Options, "study", given)
    folders = arms.find(settings["runs"])
    device = torch_device(settings["device"])
    subjects = open_all(folders, places_of(settings["store"]), device)
    out = Path(settings["out"]) if settings["out"] else arms.common_folder(folders)
    first = subjects[0]
    study = Study("replacement", first, given, model_of(first, settings["model"], device))
    with results.locked(out, study.name):
        outcome = outcome_of(replacement(study, subjects, options, out))
        results.write_beside(out, study.name, _files(out, outcome))
    show("# replacement", "", *printed(outcome))
    page = out / f"{study.name}.html"
    tell("", f"wrote {page}: open it in a browser; beside it replacement.json and replacement.md")


def _files(out: Path, outcome: Outcome) -> dict[str, bytes]:
    """JSON, Markdown, and a page that needs no network."""
    record = {"study": "replacement", "summary": outcome.summary, "figures": outcome.figures}
    lines = ["# replacement", "", *markdown(outcome)]
    page = rendered(
        "study.html",
        title="MLPs replaced by transcoders",
        name=neutral(out.absolute().name),
        summary=outcome.summary,
        tables=[*outcome.tables, transcoders(outcome.figures["runs"])],
        pictures=list(outcome.pictures.values()),
    )
    return {
        "replacement.json": dumped(record).encode() + b"\n",
        "replacement.md": "\n".join(lines).encode() + b"\n",
        "replacement.html": page,
    }


def open_all(
    folders: Sequence[Path], stores: Sequence[str] | None, device: torch.device
) -> list[Subject]:
    """The transcoders, by layer.

    Raises:
        SettingError: one is none of an MLP, or two are of one layer.
        MismatchError: they are of different stores.
    """
    subjects: dict[int, Subject] = {}
    for folder in folders:
        subject = Subject.open(folder, stores, device)
        target = subject.target
        if subject.ports.is_autoencoder or target is None or target.site != MLP_OUT:
            raise SettingError(
                f"runs= holds the {subject.noun} of {subject.where} in {folder}, and "
                "study=replacement is of transcoders that write mlp_out; narrow runs="
            )
        if other := subjects.get(target.layer):
            raise SettingError(
                f"runs= holds two transcoders of layer {target.layer}, {other.run} and {folder}; "
                "name one of each layer"
            )
        subjects[target.layer] = subject
    ordered = [subjects[layer] for layer in sorted(subjects)]
    for subject in ordered[1:]:
        if subject.store.identity != ordered[0].store.identity:
            unequal = {"store": (ordered[0].store.identity, subject.store.identity)}
            raise MismatchError(f"run {subject.run}", unequal, "Narrow runs= to one store's.")
    return ordered


def replacement(
    study: Study, subjects: Sequence[Subject], options: Options, out: Path
) -> dict[str, Any]:
    """Every figure, as plain JSON.

    Args:
        out: folder in which a stopped study leaves what it had.
    """
    layers = [Layer.of(subject) for subject in subjects]
    read = choose(subjects, options.tokens)
    lm = study.lm
    deviation = language_model.head_deviation(lm, read[0][0].ids)
    pieces = [(of_piece[0].ids, [piece.kind.tolist() for piece in of_piece]) for of_piece in read]
    key = {
        "version": VERSION,
        **study.identity,
        **model_key(study),
        "saes": [subject.digest for subject in subjects],
        "read": digest_of({"pieces": pieces}),
    }
    parts = Parts(kept.folder_of(out, "replaced", key))
    measured = spliced.measure(lm, layers, read, parts)
    rows = figures_of(measured, spliced.ways(layers))
    figures = {
        "folder": str(out.absolute()),
        "model": study.subject.store.manifest["model"]["id"],
        "model_layers": study.n_layers,
        "store": study.subject.store.name,
        "runs": [_run(subject) for subject in subjects],
        "documents": len(np.unique(measured.document)),
        "tokens": len(measured.document),
        "seed": SEED,
        "head_deviation": deviation,
        "options": vars(options),
        "clean": rows[0],
        "rows": rows[1:],
    }
    parts.remove()
    for subject in subjects:
        subject.forget()
    return {**figures, "verdict": verdict(figures, options)}


def _run(subject: Subject) -> dict[str, Any]:
    """What the page says of a transcoder."""
    return {
        "run": str(subject.run),
        "sae": subject.digest,
        "layer": subject.layer,
        "where": subject.where,
        "d_sae": subject.sae.d_sae,
        "skip": subject.sae.W_skip is not None,
    }


# -- figures ---------------------------------------------------------------------------------------


def figures_of(measured: Losses, how: Sequence[Way]) -> list[dict[str, Any]]:
    """Figures of the clean model and of every way, with intervals over documents.

    `loss_recovered` and `beside_linear` are of the ways with all layers, on the rows as trained.
    """
    (count,) = sums_by(measured.document, np.ones(len(measured.document)))
    ce = np.stack(sums_by(measured.document, *measured.ce))
    kl = np.stack(sums_by(measured.document, *measured.kl))
    rows: list[dict[str, Any]] = [ratios({"ce": (ce[0], count)})]
    index = {way: number for number, way in enumerate(how, 1)}
    every = how[0].layers
    mean = index[Way(MEAN, TRAINED, every)]
    other = index.get(Way(LINEAR, TRAINED, every))
    for way, row in index.items():
        sums = {
            "ce": (ce[row], count),
            "difference": (ce[row] - ce[0], count),
            "kl": (kl[row], count),
        }
        if way.layers == every and way.where == TRAINED:
            sums["loss_recovered"] = (ce[mean] - ce[row], ce[mean] - ce[0])
            if other is not None:
                sums["below_linear"] = (ce[other] - ce[row], count)
        largest = float(np.abs(measured.ce[row] - measured.ce[0]).max())
        rows.append({**way._asdict(), **ratios(sums), "largest_difference": largest})
    return rows


def verdict(figures: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Whether the replaced model passes, and each condition with whether it holds."""
    own = find(figures, TRANSCODERS)
    identity = find(figures, IDENTITY)
    conditions = {
        f"loss recovered is at least {options.least_recovered:.0%}": _is_at_least(
            own["loss_recovered"], options.least_recovered
        ),
        "errors added back change nothing": identity["largest_difference"] == 0,
    }
    if options.most_ce_increase is not None:
        low, high = _ends(own["difference"])
        name = f"CE is at most {options.most_ce_increase:g} nats above the model's"
        conditions[name] = bool(high <= options.most_ce_increase)
    if "below_linear" in own:
        low, high = _ends(own["below_linear"])
        conditions["linear maps cost more"] = bool(low > 0)
    return {"passes": all(conditions.values()), "conditions": conditions}


def _is_at_least(measured: Mapping[str, Any], least: float) -> bool:
    """Whether a figure is so large with its whole interval; NaN never is."""
    return bool(_ends(measured)[0] >= least)


def _ends(measured: Mapping[str, Any]) -> tuple[float, float]:
    """A figure's interval; of one document the figure itself, twice."""
    value = measured["value"]
    return measured["interval"] or (value, value)


DEFINITION = Definition(compare=compare, options=Options)
