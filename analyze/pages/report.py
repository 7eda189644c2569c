"""One page that tells a run's story from the run's own files, and asks the network for nothing.

Its only scripts compare the studies that it shows with those that are there now, which
studies/index.js names: see `results.write_index`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from residual_saes.analyze import drawing, results
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.pages import answers, examples, facts, findings
from residual_saes.analyze.pages.findings import Measured
from residual_saes.analyze.pages.script import loaded
from residual_saes.analyze.pages.template import rendered, sha256_of
from residual_saes.analyze.reconstruction import TRAINED
from residual_saes.analyze.results import FEATURES, FOLDER, PAGE, Result
from residual_saes.analyze.stats import resampled
from residual_saes.analyze.studies import quality
from residual_saes.analyze.study import Definition, Study, at_least, find, model_of, modules
from residual_saes.analyze.subject import Subject
from residual_saes.data import digests
from residual_saes.data.errors import differences
from residual_saes.data.settings import build
from residual_saes.train.run import metrics_of

_VALUE_LENGTH = 40  # characters of a setting's value in the list of variants


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/report.yaml."""

    rows: int = 500_000  # held-out rows at most, in which contexts are looked for

    def __post_init__(self) -> None:
        at_least("study.rows", self.rows, 1)


def run(study: Study) -> Outcome:
    """Write run/report.html."""
    limit = build(Options, "study", study.options).rows
    asked = None if study.model.path == study.subject.model_path(None) else study.model.path
    path = report(study.subject, limit, asked)
    return Outcome({}, [f"wrote {path}: open it in a browser"])


def report(subject: Subject, limit: int, model_path: str | None) -> Path:
    """Write run/report.html; measure the quality first if that was not done.

    Args:
        limit: held-out rows to look for contexts in, and to measure on.
        model_path: where the model's tokenizer is; None: the model that the manifest names.
    """
    done = results.current(subject.run, subject.digest)
    figures = _figures(subject, limit, done)
    # An SAE of another library has no curves.
    metrics = [] if "imported" in subject.config else metrics_of(subject.run)
    measured = Measured(figures, metrics)
    model = str(subject.store.manifest["model"]["id"])
    run, store = facts.of_run(subject), facts.of_store(subject)
    catalogue = done["catalogue"].path(FEATURES) if "catalogue" in done else None
    studies = _studies(subject, done)
    shown = results.shown(subject.run)
    script = resources.files("residual_saes.analyze.pages").joinpath("templates/report.js")
    content = rendered(
        "report.html",
        name=facts.name_of(subject),
        opening=facts.opening(subject, run, store),
        subject=subject,
        run=run,
        store=store,
        exactly=facts.exactly(subject),
        warnings=findings.warnings(subject, measured),
        good=findings.quality(measured, subject.noun),
        dead=findings.dead(measured),
        unknown=findings.unknown(studies, store["text"]),
        questions=answers.QUESTIONS,
        figures=figures,
        quality=facts.of_quality(figures, measured.dead),
        has_reference=facts.is_of_reference(model, subject.place),
        subsets=quality.subset_rows(figures),
        definitions=quality.SUBSET_HEADER,
        of_kind=quality.tables_of_kind(figures),
        notes=[resampled(figures["documents"], "document"), quality.ABOUT, quality.COVERAGE],
        left_out=quality.left_out(figures["variance_explained"][TRAINED]),
        curves=_curves(metrics) if metrics else {},
        pictures=_pictures(figures),
        examples=examples.of(subject, catalogue, limit, model_path, _interest(done)),
        browser=studies.get("browser", {}).get("page"),
        studies=studies,
        quality_variants=_variants(subject, "quality", done),
        sweep=_sweep(subject),
        shown=json.dumps(shown),
        script=Markup(script.read_text()),  # our own file
        source=sha256_of(script.read_text()),
    )
    results.write_beside(subject.run, "report", {results.REPORT: content}, shown=shown)
    results.write_index(subject.run)
    return subject.run / results.REPORT


def _interest(done: Mapping[str, Result]) -> list[float | None] | None:
    """Each latent's interest as the browser's list shows it; None without a browser."""
    path = done["browser"].path("data/table.js") if "browser" in done else None
    return loaded(path.read_bytes())["columns"]["interest"] if path else None


def _figures(subject: Subject, limit: int, done: Mapping[str, Result]) -> dict[str, Any]:
    """What study=quality found of the run's present SAE; measured now if it was not done."""
    if measured := done.get("quality"):
        return measured.outcome.figures
    model = model_of(subject, {"path": None, "dtype": None}, subject.device)
    return Study("quality", subject, {"rows": limit}, model).perform(quality.DEFINITION).figures


# -- pictures --------------------------------------------------------------------------------------


def _curves(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """Curves of the training."""
    trained = [record for record in metrics if record["split"] == "train"]
    held_out = [record for record in metrics if record["split"] == "held_out"]

    def points(records: list[dict[str, Any]], key: str, factor: float = 1) -> list[Any]:
        return [(record["tokens"], factor * record[key]) for record in records]

    drawn = {
        "variance_explained": (
            {
                "training batches": points(trained, "variance_explained"),
                "held out": points(held_out, "variance_explained"),
            },
            "variance explained",
        ),
        "mse": ({"training batches": points(trained, "mse")}, "squared error per number"),
        "dead": ({"dead": points(trained, "dead_share", 100)}, "dead features, %"),
        "lr": ({"lr": points(trained, "lr")}, "learning rate"),
    }
    curves = {}
    for name, (series, label) in drawn.items():
        curves[name] = drawing.curves(series, "training tokens", label)
    return curves


def _pictures(figures: dict[str, Any]) -> dict[str, str]:
    """Pictures of the quality's figures."""
    coverage = [(point["rows"], 100 * point["share"]) for point in figures["coverage"]]
    # Rows that are all the same have no variance to explain.
    spans = [span for span in figures["by_position"] if _is_known(span["centred"])]
    deciles = [span for span in figures["by_norm_decile"] if _is_known(span["centred"])]
    drawn = {
        "coverage": drawing.curves(
            {"fired": coverage}, "held-out rows", "features that fired, %", log=True
        ),
    }
    if spans:
        drawn["position"] = drawing.bars(
            [_span(span) for span in spans],
            [span["centred"] for span in spans],
            "position in the document",
            "variance explained",
        )
    if deciles:
        drawn["norm"] = drawing.bars(
            [f"{decile['to']:.3g}" for decile in deciles],
            [decile["centred"] for decile in deciles],
            "the row's norm, tenths up to",
            "variance explained",
        )
    if density := figures["density"]["log10"]:
        drawn["density"] = drawing.histogram(
            **density, x_label="log10 of the share of rows", y_label="features"
        )
    if activations := figures["activations"]:
        drawn["activations"] = drawing.histogram(
            **activations, x_label="log10 of the activation", y_label="kept values"
        )
    return drawn


def _is_known(value: float | None) -> bool:
    """Whether a figure, fresh or as JSON has it, is a number."""
    return value is not None and not math.isnan(value)


def _span(group: dict[str, Any]) -> str:
    if group["from"] == group["to"]:
        return str(group["from"])
    return f"{group['from']}-{group['to']}"


# -- studies ---------------------------------------------------------------------------------------


def _studies(subject: Subject, done: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """What the run's studies found, in the order of their definitions."""
    known = modules()
    definitions = {name: find(name) for name in done if name in known and name != "quality"}
    shown = {}
    for name, definition in sorted(definitions.items(), key=lambda item: (item[1].order, item[0])):
        outcome = done[name].outcome
        pictures = [(picture.caption, picture.svg) for picture in outcome.pictures.values()]
        shown[name] = {
            "finds": definition.finds and outcome.summary,
            "answer": answers.answer(name, outcome.figures),
            "date": _date(done[name].folder / digests.FILE),
            "summary": [facts.without_folders(subject, line) for line in outcome.summary],
            "tables": outcome.tables,
            "pictures": pictures,
            "file": f"{FOLDER}/{name}/{name}.json",
            "page": f"{FOLDER}/{name}/{PAGE}" if done[name].path(PAGE) else None,
            "variants": _variants(subject, name, done),
        }
    return shown


def _date(file: Path) -> str:
    """When a result was finished."""
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _variants(subject: Subject, name: str, done: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The other results of a study of this SAE.

    Of each the settings that differ from those of the result that is shown, as (name, its value,
    the value shown), its first sentence, and its file.
    """
    if name not in done:
        return []
    shown = done[name].settings
    variants = []
    for result in results.of_study(subject.run, name):
        if result.settings == shown or result.settings.get("sae") != subject.digest:
            continue
        settings = []
        for key, (here, there) in differences(shown, result.settings).items():
            settings.append((_setting(key), _shortened(there), _shortened(here)))
        file = result.folder.relative_to(subject.run) / f"{name}.json"
        verdict = next(iter(result.outcome.summary), "")
        variants.append({"settings": settings, "verdict": verdict, "file": file.as_posix()})
    return variants


def _setting(key: str) -> str:
    """A recorded setting as the command line has it."""
    return f"study.{key.removeprefix('options.')}" if key.startswith("options.") else key


def _shortened(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 1] + "…"


def _sweep(subject: Subject) -> dict[str, Any] | None:
    """What study=sweep found of the sweep that the run is an arm of; None: no such comparison.

    This is the core's one door to analyze/studies/sweep.
    """
    from residual_saes.analyze.studies.sweep import page as sweep_page

    run = subject.run.absolute()
    compared = sweep_page.read(run.parent, subject.place)
    if compared is None or compared.saes.get(run.name) != subject.digest:
        return None
    return {
        "verdict": compared.verdict,
        "picture": (compared.caption, compared.svg),
        "file": f"../{sweep_page.JSON}",
        "page": f"../{sweep_page.PAGE}",
    }


DEFINITION = Definition(run, options=Options, fresh=True)
