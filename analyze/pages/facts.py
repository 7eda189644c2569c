"""What the report says of the run, of its store and of the SAE's quality, as labelled rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from residual_saes.analyze.latents.targets import names_of
from residual_saes.analyze.stats import number, percent
from residual_saes.analyze.studies import quality
from residual_saes.analyze.subject import Subject
from residual_saes.data.foreign import reading
from residual_saes.data.rows import statistics, summary
from residual_saes.train.optim import OptimConfig
from residual_saes.train.run import CONFIG
from residual_saes.train.sae import SAEConfig

# What the model card of the public TopK SAE of layer 21 of Gemma 4 E4B states, by our figure's key.
_REFERENCE = {
    "scalar": "0.939, of one training batch",
    "mse_per_element": "about 0.181",
    "l0": "128",
    "coverage": "62.0%",
    "dead": "0 of 32,768",
}
_FILES = 3  # of a text that are named
COVERAGE_ROWS = 4096  # rows in which the reference counts coverage: one batch


def opening(subject: Subject, run: dict[str, str], store: dict[str, str]) -> str:
    """What the run is, in a sentence.

    Args:
        run, store: as `of_run` and `of_store` give them.
    """
    dictionary, model = run[subject.noun], store["model"]
    if subject.is_resid_post:
        return (
            f"A sparse autoencoder ({dictionary}) on the residual stream after layer "
            f"{subject.layer} of {model}."
        )
    if not subject.ports.is_autoencoder:
        ends = f"reads {store['reads']} and writes {store['writes']}"
        return f"A transcoder ({dictionary}) that {ends}, of {model}."
    kind = "sparse autoencoder" if subject.is_sae else "crosscoder"
    return f"A {kind} ({dictionary}) of {' and '.join(names_of(subject))}, of {model}."


def is_of_reference(model: str, place: int | str) -> bool:
    """Whether the reference SAE is of this model and of what is written there.

    Args:
        model: as a store's manifest names it.
        place: see `Subject.place`.
    """
    return place == 21 and "gemma-4-e4b" in model.lower()


def of_run(subject: Subject) -> dict[str, str]:
    """How the SAE was trained, by label."""
    way_out = "restore it, or choose another run="
    with reading(f"{subject.run / CONFIG} is not what training wrote", way_out):
        return _of_config(subject)


def name_of(subject: Subject) -> str:
    """The run's name; of another library's SAE that of its files."""
    library, _, path = subject.config.get("imported", "").partition(":")
    return f"{Path(path).name} ({library})" if library else subject.run.name


def _of_config(subject: Subject) -> dict[str, str]:
    config = subject.config
    settings = config["settings"]
    if "imported" in config:
        library, _, path = config["imported"].partition(":")
        k = f", k = {subject.sae.k}" if subject.sae.k else ""
        return {
            subject.noun: f"{subject.sae.d_sae:,} features{k}",
            "trained": f"elsewhere; read from the files of {library}, {Path(path).name}",
        }
    # A run of before a setting was there has what is now its default.
    sae = {**vars(SAEConfig()), **settings["sae"]}
    optim = {**vars(OptimConfig()), **settings["optim"]}
    kept = f"k = {sae['k']} at a time"
    on_average = "" if sae["activation"] in ("topk", "hierarchical") else " on average"
    dead_after = config.get("dead_after", sae["dead_after"])
    data_seed = settings.get("data_seed", settings["seed"])
    return {
        subject.noun: f"{sae['activation']}, {sae['d_sae']:,} features, {kept}{on_average}",
        "start": _start(sae, settings["seed"]),
        "dead features": f"after {dead_after:,} tokens: {_revival(sae)}",
        "optimizer": _optimizer(optim, config, settings),
        "trained on": f"{settings['tokens']:,} tokens in {config['steps']:,} steps, "
        f"data seed {data_seed}",
        "rows left out": statistics.told(subject.policy, config.get("left_out")),
    }


def _start(sae: dict[str, Any], seed: int) -> str:
    origins = {"rows": "rows", "kaiming": "the encoder's random directions"}
    origin = origins.get(sae["init"], "random directions")
    axes = ", in the rows' principal axes" if sae["rotate"] else ""
    return f"decoder from {origin}, seed {seed}{axes}"


def _revival(sae: dict[str, Any]) -> str:
    means = []
    if sae["aux_coef"]:
        means.append(
            f"AuxK with coefficient {sae['aux_coef']}, k_aux {sae['k_aux']}, "
            f"{sae['aux_norm']} normalisation{'' if sae['aux_relu'] else ', without ReLU'}"
        )
    if sae["resample"]:
        means.append("restarted along errors")
    return ", ".join(means) or "left alone"


def _optimizer(optim: dict[str, Any], config: dict[str, Any], settings: dict[str, Any]) -> str:
    lr = config.get("lr", optim["lr"])
    clipped = f", gradient norm at most {optim['clip_norm']:g}" if optim["clip_norm"] else ""
    return (
        f"Adam ({optim['beta1']}, {optim['beta2']}), eps {optim['eps']:g}{clipped}, "
        f"{lr:.3g} to {optim['lr_floor']:g} ({optim['decay']}), "
        f"batch {settings['batch']:,}, encoder product in {settings.get('matmul', 'fp32')}"
    )


def of_store(subject: Subject) -> dict[str, str]:
    """What the store holds, by label; names, and no digest."""
    store = subject.store
    models = [_model(each.manifest["model"]) for each in subject.stores]
    return {
        "model": " and ".join(dict.fromkeys(models)),
        **_ends(subject),
        "text": _text(store.manifest["text"]),
        "tokens": f"{store.rows:,} in rows of {store.context:,}, documents "
        f"{store.manifest['isolation']}",
        "store": "; ".join(_store(subject, index) for index in range(len(subject.stores))),
    }


def exactly(subject: Subject) -> dict[str, str]:
    """What the run is told by from others: the digests of all that it follows from."""
    rows = {"SAE": subject.digest}
    for store in subject.stores:
        of_store = f", {_name(store.name)}" if len(subject.stores) > 1 else ""
        rows[f"store{of_store}"] = store.identity
        for key in ("revision", "weights", "config", "tokenizer"):
            rows[f"model's {key}{of_store}"] = str(store.manifest["model"].get(key) or "not known")
        text = {f"text's {key}": value for key, value in store.manifest["text"].items()}
        for label, value in text.items():
            rows[f"{label}{of_store}"] = _listed(value)
    environment = subject.config["environment"]
    if environment:
        rows["trained with"] = _listed(environment)
    return rows


def _listed(value: Any) -> str:
    """A recorded value, whatever it is nested in; of a path its name."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_listed(item)}" for key, item in value.items())
    return _name(str(value))


def _name(place: str) -> str:
    """A path's own name where it begins at the root: folders are this machine's business."""
    return Path(place).name or place if place.startswith(("/", "~")) else place


def without_folders(subject: Subject, line: str) -> str:
    """A study's sentence without the folders of this machine: paths begin at the run."""
    for folder in (subject.run.absolute(), subject.run, Path.cwd()):
        line = line.replace(f"{folder}/", "")
    return line.replace(str(Path.home()), "~") if Path.home().name else line


def _text(text: dict[str, Any]) -> str:
    """A text by its name: a data set, files, or the parts of a mix."""
    if text["kind"] == "mix":
        weights = {name: part["weight"] for name, part in text["sources"].items()}
        return ", ".join(f"{name} (weight {weight:g})" for name, weight in weights.items())
    if "dataset" in text:
        parts = (_name(str(text["dataset"])), text.get("config"), text.get("split"))
        return ", ".join(str(part) for part in parts if part)
    files = list(text.get("files", []))
    named = ", ".join(files[:_FILES])
    more = f" and {len(files) - _FILES:,} more files" if len(files) > _FILES else ""
    return f"{named}{more}" if files else str(text["kind"])


def _model(model: dict[str, Any]) -> str:
    return (
        f"{_name(str(model['id']))} ({model['architecture']}, {model['n_layers']} layers, "
        f"width {model['d_model']:,}), run in {model['dtype']}"
    )


def _ends(subject: Subject) -> dict[str, str]:
    """The hook points on both sides, by label."""
    if not subject.ports.is_autoencoder:
        return {"reads": str(subject.ports.reads[0]), "writes": str(subject.ports.writes[0])}
    if not subject.is_sae:
        return {"reads and writes": ", ".join(names_of(subject))}
    point = subject.ports.reads[0].point
    return {"site": f"{point.site} of layer {point.layer}"}


def _store(subject: Subject, index: int) -> str:
    """A store, and what its codec lost."""
    store = subject.stores[index]
    lost = []
    for port in subject.ports.every:
        if port.store != index:
            continue
        share = summary.variance_lost(store, port.point)
        if share is not None:
            of_port = f" of {port.point}" if len(subject.ports.every) > 1 else ""
            lost.append(f", which lost {share:.2e} of the rows' variance{of_port}")
    codec = store.manifest["codec"]
    return f"{Path(store.name).name}, {store.units:,} units, codec {codec}{''.join(lost)}"


def of_quality(figures: dict[str, Any], dead: int | None) -> list[tuple[str, str, str]]:
    """The table of figures: label, of this run, of the reference SAE.

    Args:
        figures: of study=quality.
        dead: latents that were dead at the end of training; None: it was not done here.
    """
    rows = []
    for key, label in quality.NAMED.items():
        rows.append((label, number(figures[key]), _REFERENCE.get(key, "")))
    for point in figures["coverage"]:
        if point["rows"] == COVERAGE_ROWS:
            label = f"features that fire within {COVERAGE_ROWS:,} tokens"
            rows.append((label, percent(point["share"]), _REFERENCE["coverage"]))
    if dead is not None:
        label = "dead features at the end of training"
        rows.append((label, f"{dead:,} of {figures['d_sae']:,}", _REFERENCE["dead"]))
    density = figures["density"]
    cosine = figures["decoder_cosine"]
    others = {
        f"features silent on all {figures['rows']:,} held-out tokens": number(figures["silent"]),
        "features that fire on more than 1% of tokens": number(density["above_1_percent"]),
        "features that fire on more than 10%": number(density["above_10_percent"]),
        "cosine of each feature with its nearest other: median": number(cosine["median"]),
        "the same, largest": number(cosine["max"]),
    }
    return [*rows, *((label, value, "") for label, value in others.items())]
