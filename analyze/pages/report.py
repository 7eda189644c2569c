"""One page that tells a run's story from the run's own files: no network, and nothing in it but
text and pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analyze import contexts, results
from analyze import drawing as pictures
from analyze.outcome import Outcome
from analyze.results import FOLDER, PAGE, Result
from analyze.studies import quality
from analyze.study import Definition, Study, at_least, find, model_of, modules
from analyze.subject import Subject
from data import durable
from data.errors import StoreError, differences
from data.journal import read_metrics
from data.rows import summary
from data.settings import build
from data.site import RESID_POST
from train.optim import OptimConfig
from train.run import METRICS
from train.sae import SAEConfig

FEATURES, CONTEXTS = 20, 5  # shown: latents, contexts of each
_REFERENCE = {  # what the model card of the public TopK SAE of layer 21 of Gemma 4 E4B states
    "scalar": "0.939, of one training batch",
    "mse_per_element": "about 0.181",
    "l0": "128",
    "coverage": "62.0 %",
    "dead": "0 of 32,768",
}
_COVERAGE_ROWS = 4096  # in which the reference counts coverage: one batch


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
        model_path: where the model's tokenizer is; None: where the store's own record leads.
    """
    if not (subject.run / METRICS).is_file():
        raise StoreError(
            f"{subject.run} was not trained here and has no curves to report; study=quality measures it"
        )
    done = results.current(subject.run, subject.digest)
    figures = _figures(subject, limit, done)
    metrics = read_metrics(subject.run / METRICS)
    final = [record for record in metrics if record["split"] == "held_out"][-1]
    environment = Environment(
        loader=PackageLoader("analyze.pages"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html").render(
        name=subject.run.name,
        run=_run_facts(subject),
        store=_store_facts(subject),
        figures=figures,
        quality=_quality(figures, final),
        final=final,
        pictures={
            name: Markup(svg) for name, svg in _pictures(figures, metrics).items()
        },  # ours, no foreign text
        features=_features(subject, limit, model_path),
        studies=_studies(subject, done),
        sweep=_sweep(subject),
    )
    path = subject.run / "report.html"
    durable.write(path, [page.encode()])
    return path


def _figures(subject: Subject, limit: int, done: dict[str, Result]) -> dict[str, Any]:
    """What study=quality found of the run's present SAE; measured now if it was not done."""
    if measured := done.get("quality"):
        return measured.outcome.figures
    nothing_asked = {"path": None, "dtype": None}
    model = model_of(subject, nothing_asked, subject.device)
    return Study("quality", subject, {"rows": limit}, model).perform(quality.DEFINITION).figures


def _run_facts(subject: Subject) -> dict[str, Any]:
    config, settings = subject.config, subject.config["settings"]
    # Runs from before a setting was there have what is now its default.
    sae, optim = (
        {**vars(SAEConfig()), **settings["sae"]},
        {**vars(OptimConfig()), **settings["optim"]},
    )
    start = f"decoder from {'rows' if sae['init'] == 'rows' else 'random directions'}, seed {settings['seed']}"
    if sae["rotate"]:
        start += ", in the rows' principal axes"
    aux = f"AuxK with coefficient {sae['aux_coef']}, k_aux {sae['k_aux']}, {sae['aux_norm']} normalisation"
    revived = [aux if sae["aux_coef"] else "", "restarted along errors" if sae["resample"] else ""]
    kept = "" if sae["activation"] == "topk" else " on average"
    dead_after, lr = config.get("dead_after", sae["dead_after"]), config.get("lr", optim["lr"])
    data_seed = settings.get("data_seed", settings["seed"])
    return {
        "SAE": f"{sae['activation']}, {sae['d_sae']:,} latents, k = {sae['k']}{kept}",
        "start": start,
        "dead latents": f"after {dead_after:,} tokens: {', '.join(filter(None, revived)) or 'left alone'}",
        "optimizer": f"Adam ({optim['beta1']}, {optim['beta2']}), {lr:.3g} to {optim['lr_floor']:g} "
        f"({optim['decay']}), batch {settings['batch']:,}, encoder product in {settings.get('matmul', 'fp32')}",
        "trained on": f"{settings['tokens']:,} tokens in {config['steps']:,} steps, data seed {data_seed}",
        "rows left out": ("BOS" if subject.policy.drop_bos else "no BOS")
        + (", and others above ten median norms" if subject.policy.drop_outliers else ""),
        "environment": ", ".join(f"{key} {value}" for key, value in config["environment"].items()),
    }


def _store_facts(subject: Subject) -> dict[str, Any]:
    manifest = subject.store.manifest
    model = manifest["model"]
    text = manifest["text"]
    lost = summary.variance_lost(subject.store, subject.layer)
    return {
        "model": f"{model['id']} ({model['architecture']}, {model['n_layers']} layers, width {model['d_model']}), "
        f"run in {model['dtype']}",
        "weights": model["weights"],
        "site": f"{RESID_POST} of layer {subject.layer}",
        "text": ", ".join(
            f"{key} {value}" for key, value in text.items() if not isinstance(value, dict)
        ),
        "tokens": f"{subject.store.rows:,} in rows of {subject.store.context:,}, documents {manifest['isolation']}",
        "store": f"{subject.store.name}, {subject.store.units} units, codec {manifest['codec']}"
        + ("" if lost is None else f", which lost {lost:.2e} of the rows' variance"),
    }


def _quality(figures: dict[str, Any], final: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, of this run, of the reference SAE)."""
    rows = [
        (label, f"{figures[key]:.4f}", _REFERENCE.get(key, ""))
        for key, label in quality.NAMED.items()
    ]
    if seen := [point["share"] for point in figures["coverage"] if point["rows"] == _COVERAGE_ROWS]:
        label = f"latents that fire within {_COVERAGE_ROWS:,} tokens"
        rows.append((label, f"{100 * seen[0]:.1f} %", _REFERENCE["coverage"]))
    dead = f"{final['dead']:,} of {figures['d_sae']:,}"
    rows.append(("dead latents at the end of training", dead, _REFERENCE["dead"]))
    often, cosine = figures["density"], figures["decoder_cosine"]
    return [
        *rows,
        (
            f"latents silent on all {figures['rows']:,} held-out tokens",
            f"{figures['silent']:,}",
            "",
        ),
        ("latents that fire on more than 1 % of tokens", f"{often['above_1_percent']:,}", ""),
        ("latents that fire on more than 10 %", f"{often['above_10_percent']:,}", ""),
        ("cosine of each latent with its nearest other: median", f"{cosine['median']:.3f}", ""),
        ("the same, largest", f"{cosine['max']:.3f}", ""),
    ]


def _pictures(figures: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, str]:
    train = [record for record in metrics if record["split"] == "train"]
    held = [record for record in metrics if record["split"] == "held_out"]
    ve, tokens = "variance_explained", "training tokens"
    drawn = {
        "variance_explained": pictures.curves(
            {
                "training batches": [(r["tokens"], r[ve]) for r in train],
                "held out": [(r["tokens"], r[ve]) for r in held],
            },
            tokens,
            "variance explained",
        ),
        "mse": pictures.curves(
            {"training batches": [(r["tokens"], r["mse"]) for r in train]}, tokens, "MSE"
        ),
        "dead": pictures.curves(
            {"dead": [(r["tokens"], 100 * r["dead_share"]) for r in train]},
            tokens,
            "dead latents, %",
        ),
        "lr": pictures.curves(
            {"lr": [(r["tokens"], r["lr"]) for r in train]}, tokens, "learning rate"
        ),
        "coverage": pictures.curves(
            {"fired": [(p["rows"], 100 * p["share"]) for p in figures["coverage"]]},
            "held-out rows",
            "latents that fired, %",
            log=True,
        ),
        "position": pictures.bars(
            [_span(group) for group in figures["by_position"]],
            [group["centred"] for group in figures["by_position"]],
            "position in the document",
            "variance explained",
        ),
        "norm": pictures.bars(
            [f"{number}" for number in range(1, len(figures["by_norm_decile"]) + 1)],
            [group["centred"] for group in figures["by_norm_decile"]],
            "decile of the row's norm",
            "variance explained",
        ),
    }
    if density := figures["density"]["log10"]:
        drawn["density"] = pictures.histogram(
            **density, x_label="log10 of the share of rows", y_label="latents"
        )
    if activations := figures["activations"]:
        drawn["activations"] = pictures.histogram(
            **activations, x_label="log10 of the activation", y_label="kept values"
        )
    return drawn


def _studies(subject: Subject, done: dict[str, Result]) -> dict[str, dict[str, Any]]:
    """What the run's studies found, in the order of their definitions."""
    known = modules()
    definitions = {name: find(name) for name in done if name in known and name != "quality"}
    shown = {}
    for name, definition in sorted(definitions.items(), key=lambda item: (item[1].order, item[0])):
        outcome = done[name].outcome
        pictures = [(picture.caption, Markup(picture.svg)) for picture in outcome.pictures.values()]
        shown[name] = {
            "finds": definition.finds and outcome.summary,
            "summary": outcome.summary,
            "tables": outcome.tables,
            "pictures": pictures,
            "file": f"{FOLDER}/{name}/{name}.json",
            "page": _page(subject, name),
            "variants": _variants(subject, done[name]),
        }
    return shown


def _variants(subject: Subject, shown: Result) -> list[dict[str, Any]]:
    """The study's other results of this SAE: how their settings differ, and what they say."""
    variants = []
    for result in results.of_study(subject.run, shown.name)[1:]:
        if result.settings.get("sae") != subject.digest:
            continue
        unequal = differences(shown.settings, result.settings)
        settings = ", ".join(f"{key}={theirs}" for key, (_, theirs) in unequal.items())
        file = result.folder.relative_to(subject.run) / f"{shown.name}.json"
        first = next(iter(result.outcome.summary), "")
        variants.append({"settings": settings, "says": first, "file": file.as_posix()})
    return variants


def _page(subject: Subject, name: str) -> str | None:
    """Where the study's own pages are, if it has some."""
    page = f"{FOLDER}/{name}/{PAGE}"
    return page if (subject.run / page).is_file() else None


def _sweep(subject: Subject) -> dict[str, Any] | None:
    """What `study=sweep` said of the sweep that the run is an arm of; None if it is none, or was
    not compared.
    """
    from analyze.studies.sweep import words as sweep_page

    run = subject.run.absolute()
    found = sweep_page.read(run.parent, subject.layer)
    if found is None or found.saes.get(run.name) != subject.digest:
        return None
    return {
        "verdict": found.verdict,
        "picture": (found.caption, Markup(found.svg)),
        "file": f"../{sweep_page.JSON}",
        "page": f"../{sweep_page.PAGE}",
    }


def _span(group: dict[str, Any]) -> str:
    return str(group["from"]) if group["from"] == group["to"] else f"{group['from']}-{group['to']}"


def _features(subject: Subject, limit: int, model_path: str | None) -> dict[str, Any]:
    """Latents with their contexts, tokens as text where the tokenizer is at hand, each with its
    shade from 0 to 1.
    """
    fired = contexts.firing_counts(subject, limit)
    chosen = contexts.choose(fired, FEATURES)
    found = contexts.top_contexts(subject, chosen, CONTEXTS, limit)
    say = contexts.token_names(subject, model_path)
    shown = []
    for latent in chosen:
        peak = max((context.peak for context in found[latent]), default=1.0)
        lines = [
            {
                "document": context.document,
                "peak": context.peak,
                "tokens": [
                    {
                        "text": say(token) if say else f"{token} ",
                        "value": value,
                        "shade": value / peak,
                    }
                    for token, value in zip(context.tokens, context.activations, strict=True)
                ],
            }
            for context in found[latent]
        ]
        shown.append({"latent": latent, "rows": int(fired[latent]), "contexts": lines})
    return {"latents": shown, "as_ids": say is None}


DEFINITION = Definition(run, options=Options, fresh=True)
