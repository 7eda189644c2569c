"""The model card. Every figure in it is from the run's own files; what they lack is `ABSENT`.

Names, study texts and tokens are foreign text: all that the template prints goes through `escaped`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any, NamedTuple

import torch
import yaml
from jinja2 import Environment, StrictUndefined
from safetensors.torch import load

from residual_saes.data.markdown import Markdown, escaped, in_html, table_lines
from residual_saes.data.rows import statistics
from residual_saes.data.rows.split import Policy
from residual_saes.data.site import RESID_POST
from residual_saes.train.export import golden
from residual_saes.train.export.format import About
from residual_saes.train.publish import picture, usage
from residual_saes.train.publish.vector import Vector
from residual_saes.train.sae import SAE

ABSENT = "not recorded"
TABLE_ROWS = 50  # of a study's table that are shown; its JSON has them all
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_KINDS = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka": "Matryoshka",
    "hierarchical": "HierarchicalTopK",
    "gated": "Gated",
}

Rows = list[tuple[str, str]]  # of a table: label and value


class Facts(NamedTuple):
    """What the card is made from."""

    name: str  # of the run
    repo: str  # OWNER/NAME on the Hub
    about: About
    config: Mapping[str, Any]  # config.yaml
    sae: SAE  # on raw rows
    digest: str  # xxh3_128 of sae_final.pt
    held_out: Mapping[str, Any]  # the last held-out record of metrics.jsonl
    quality: Mapping[str, Any] | None  # quality.json
    studies: Mapping[str, Mapping[str, Any]]  # by name: settings, summary, tables
    steering: Vector | None = None  # None: none was measured


def card(facts: Facts, files: Sequence[str]) -> str:
    """README.md for the Hub; `files` are those beside it."""
    environment = Environment(
        finalize=_finalized, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["in_html"] = in_html
    environment.filters["code"] = Markdown  # of names that were checked
    template = environment.from_string(resources.files(__package__).joinpath("card.md").read_text())
    about = facts.about
    usable = [_usable(about.model), _usable(about.second or "")]
    return template.render(
        table=_table,
        front=Markdown(_front_matter(about)),
        picture=picture.FILE,
        width=f"{facts.sae.d_model:,}",
        loads_text=all(port.store == 0 for port in about.ports.every),
        pushed=_pushed(facts),
        **_citation(facts),
        saelens=any(file.startswith("saelens/") for file in files),
        name=facts.name,
        repo=Markdown(facts.repo),
        about=about,
        of_model=Markdown("" if usable[0] == about.model else f', model="{usable[0]}"'),
        code_model=Markdown(json.dumps(usable[0])),
        topk=facts.sae.threshold is None,
        kind=_kind(facts),
        d_sae=f"{facts.sae.d_sae:,}",
        **usage.variables(about, facts.sae, usable),
        last=value_at(facts.config, "source.n_layers") == about.layer + 1,
        drop_bos=value_at(facts.config, "settings.policy.drop_bos"),
        specs=_specs(facts),
        final=[
            *_final(facts.held_out),
            ("rows left out", _without(facts.config, "settings.policy")),
        ],
        definitions=_definitions(facts.quality) if facts.quality else None,
        figures=_figures(facts.quality) if facts.quality else None,
        everything=_formatted(facts.quality, "variance_explained.all rows.centred", ".4f"),
        lost=_formatted(facts.config, "store_variance_lost", ".2e"),
        absent=ABSENT,
        studies=[_study(name, study) for name, study in facts.studies.items()],
        steering=facts.steering,
        steering_said=facts.studies["steering"]["summary"] if facts.steering else [],
        files=files,
        provenance=_provenance(facts),
    )


class Pushed(NamedTuple):
    """A latent for the code that steers."""

    latent: int
    activation: str  # a number
    why: str  # what it is, as a sentence


def _pushed(facts: Facts) -> Pushed | None:
    """The middle one of those that the catalogue shows, else one of a golden row.

    None if the dictionary is no SAE of a layer's output.
    """
    if facts.about.kind != "sae" or facts.about.point.site != RESID_POST:
        return None
    for _, header, rows in facts.studies.get("catalogue", {}).get("tables", ()):
        shown = [dict(zip(header, row, strict=False)) for row in rows]
        fires = [row for row in shown if re.fullmatch(r"[\d.]+", str(row.get("mean")))]
        if fires:
            row = fires[len(fires) // 2]
            peaks = dict.fromkeys(re.findall(r"`[^`]*`", row.get("strongest at", "")))
            tokens = f", strongest at {' '.join(peaks)}" if peaks else ""
            why = f"Latent {row['latent']} fires in {row['density']} of rows{tokens}."
            return Pushed(
                int(row["latent"]), row["mean"], f"{why} Its mean there is {row['mean']}."
            )
    rows = load(golden.of(facts.sae))
    latent, value = int(rows["latent"][0]), float(rows["value"][0])
    return Pushed(latent, f"{value:.3g}", f"Latent {latent} is an example, chosen by nobody.")


def _citation(facts: Facts) -> dict[str, Any]:
    owner, name = facts.repo.split("/")
    titled = (
        f"{_kind(facts)} {facts.about.kind} of {usage.title(facts.about)} of {facts.about.model}"
    )
    return {
        "owner": _bibtex(owner),
        "cite_key": Markdown(re.sub(r"[^A-Za-z0-9-]", "-", name)),
        "cite_title": _bibtex(titled),
        "year": datetime.now(UTC).year,
    }


def _bibtex(text: str) -> Markdown:
    """Text as BibTeX has it in a block of code: without signs that mean something there."""
    return Markdown(re.sub(r"[^\w ./-]", " ", text).replace("_", "\\_"))


def _usable(model: str) -> str:
    """A model's name as code may load it."""
    return model if _HUB_ID.fullmatch(model) else "FOLDER/OF/THE/MODEL"


# -- escaping --------------------------------------------------------------------------------------


def _finalized(value: Any) -> Any:
    return value if isinstance(value, Markdown | int) else escaped(str(value))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    return Markdown("\n".join(table_lines(header, rows)))


def _front_matter(about: About) -> str:
    """The card's YAML. The Hub refuses ids that cannot be, so a folder's name is left out."""
    fields: dict[str, Any] = {"license": "apache-2.0", "library_name": "saelens"}
    fields["tags"] = [
        "sparse-autoencoder",
        about.kind,
        "interpretability",
        "mechanistic-interpretability",
    ]
    if _HUB_ID.fullmatch(about.model):
        fields["base_model"] = about.model
    if _HUB_ID.fullmatch(about.text):
        fields["datasets"] = [about.text]
    return yaml.safe_dump(fields, sort_keys=False).strip()


# -- figures ---------------------------------------------------------------------------------------


def value_at(record: Any, path: str) -> Any:
    """The value at a dotted path of nested mappings, or None."""
    value = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _formatted(record: Any, path: str, form: str = "") -> str:
    """The value at a dotted path as text; `ABSENT` without one, or if `form` does not take it."""
    value = value_at(record, path)
    try:
        return ABSENT if value is None else format(value, form)
    except (ValueError, TypeError):
        return ABSENT


def _labelled(record: Mapping[str, Any], named: Mapping[str, tuple[str, str]]) -> Rows:
    """Rows of a table: by key of `record` a label and a format."""
    rows = []
    for key, (label, form) in named.items():
        rows.append((label, _formatted(record, key, form)))
    return rows


# -- tables ----------------------------------------------------------------------------------------


def _kind(facts: Facts) -> str:
    otherwise = "TopK" if facts.sae.threshold is None else "thresholded"
    return _KINDS.get(str(value_at(facts.config, "settings.sae.activation")), otherwise)


def _specs(facts: Facts) -> Rows:
    about = facts.about
    sae = facts.sae
    on_average = "" if sae.threshold is None else " on average, in training"
    return [
        ("base model", about.model),
        *usage.specs(about),
        ("width that it reads", f"{sae.d_model:,}"),
        ("width that it writes", f"{sae.d_out:,}"),
        ("d_sae", f"{sae.d_sae:,} ({sae.d_sae / sae.d_model:.3g} times the width that it reads)"),
        ("k (active latents per token)", f"{sae.k:,}{on_average}"),
        ("text", f"{about.text}, in contexts of {about.context:,} tokens"),
        *_training_specs(facts),
    ]


def _training_specs(facts: Facts) -> Rows:
    def setting(path: str, form: str = "") -> str:
        return _formatted(facts.config, path, form)

    tokens = setting("settings.tokens", ",")
    betas = f"{setting('settings.optim.beta1')}, {setting('settings.optim.beta2')}"
    norm = value_at(facts.config, "settings.optim.clip_norm")
    clipped = f", gradient norm at most {norm:g}" if norm else ""
    relu = ", without ReLU" if value_at(facts.config, "settings.sae.aux_relu") is False else ""
    floor = f"{setting('settings.optim.lr_floor', '.3g')} ({setting('settings.optim.decay')})"
    aux = f"coefficient {setting('settings.sae.aux_coef')}"
    k_aux = setting("settings.sae.k_aux", ",")
    norms = torch.linalg.vector_norm(facts.sae.W_dec, dim=1)
    seeds = f"weights {setting('settings.seed')}, order of rows {setting('settings.data_seed')}"
    return [
        ("training tokens", f"{tokens} in {setting('steps', ',')} steps"),
        ("batch", f"{setting('settings.batch', ',')} tokens"),
        ("rows left out", _without(facts.config, "settings.policy")),
        ("optimizer", f"Adam ({betas}){clipped}, learning rate {setting('lr', '.3g')} to {floor}"),
        (
            "loss on dead latents (AuxK)",
            f"{aux}, k_aux {k_aux}, normalisation {setting('settings.sae.aux_norm')}{relu}",
        ),
        ("dead after", f"{setting('dead_after', ',')} tokens without firing"),
        ("decoder directions' norms", f"{norms.min():.6f} to {norms.max():.6f}"),
        ("precision", f"float32, operands of the encoder product {setting('settings.matmul')}"),
        ("device", setting("environment.device")),
        ("seeds", seeds),
    ]


def _without(record: Any, policy: str = "policy") -> str:
    """What the policy at a dotted path leaves out, with the shares under `left_out`."""
    recorded = value_at(record, policy)
    if recorded is None:
        return ABSENT
    return statistics.told(Policy.of(recorded), value_at(record, "left_out"))


def _final(record: Mapping[str, Any]) -> Rows:
    named = {
        "variance_explained": ("variance explained, centred per dimension", ".4f"),
        "variance_explained_scalar": ("variance explained, scalar definition", ".4f"),
        "mse": ("MSE per element", ".4g"),
        "l0": ("L0", ".4g"),
        "coverage": ("share of latents that fired", ".4f"),
        "dead": ("dead latents", ",d"),
        "rows": ("held-out rows", ",d"),
    }
    return _labelled(record, named)


def _definitions(quality: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, definition and value of every variance explained."""
    formulas = {
        "centred": "1 - sum |e|² / sum |x - μ|², the figure to quote",
        "batch_mean": "1 - sum |e|² / sum |x - mean of its batch|² (sparsify)",
        "mean_of_ratios": "mean of 1 - |e|² / |x - mean of its batch|² (SAELens' legacy figure)",
        "variance_of_error": "1 - sum of Var(e_j) / sum of Var(x_j) "
        "(dictionary_learning; forgives a constant)",
        "scalar": "1 - mean(e²) / Var(all elements of x) (many published cards; nearly uncentred)",
    }
    rows = []
    for key, formula in formulas.items():
        for name, subset in (quality.get("variance_explained") or {}).items():
            value = _centred(subset) if key == "centred" else _formatted(subset, key, ".4f")
            rows.append((f"{key.replace('_', ' ')}, {name}", formula, value))
    return rows


def _centred(subset: Any) -> str:
    """A subset's headline with its interval, its rows, and what it leaves out."""
    low, high = value_at(subset, "centred_95") or (None, None)
    bounds = {"low": low, "high": high}
    interval = f"[{_formatted(bounds, 'low', '.4f')}, {_formatted(bounds, 'high', '.4f')}]"
    if low is None:
        interval = "[no interval]"
    rows = f"{_formatted(subset, 'rows', ',')} rows; left out: {_without(subset)}"
    return f"{_formatted(subset, 'centred', '.4f')} {interval} ({rows})"


def _figures(quality: Mapping[str, Any]) -> Rows:
    named = {
        "rows": ("held-out rows", ",d"),
        "documents": ("held-out documents", ",d"),
        "mse_per_element": ("MSE per element", ".4g"),
        "l0": ("L0", ".4g"),
        "cosine": ("cosine of row and reconstruction", ".4f"),
        "l2_ratio": ("norm of the reconstruction over the row's", ".4f"),
        "shrinkage": ("shrinkage (1 is none)", ".4f"),
        "silent": ("latents silent on all these rows", ",d"),
    }
    rows = _labelled(quality, named)
    for name, target in (quality.get("targets") or {}).items():
        value = _formatted(target, "variance_explained.as trained.centred", ".4f")
        rows.append((f"variance explained of {name}, centred", value))
    for name, baseline in (quality.get("baselines") or {}).items():
        explains, more = (_formatted(baseline, f"{of}.value", ".4f") for of in ("explains", "more"))
        rows.append(
            (f"without latents, {name} explains", f"{explains}; the transcoder {more} more")
        )
    for span in quality.get("coverage") or []:
        label = f"latents that fired within {_formatted(span, 'rows', ',')} rows"
        rows.append((label, _formatted(span, "share", ".1%")))
    return rows


def _study(name: str, study: Mapping[str, Any]) -> dict[str, Any]:
    """A study as the template takes it; long tables are cut."""
    tables = []
    for caption, header, rows in study["tables"]:
        more = max(0, len(rows) - TABLE_ROWS)
        tables.append(
            {"caption": caption, "header": header, "rows": rows[:TABLE_ROWS], "more": more}
        )
    return {"name": name, "summary": study["summary"], "tables": tables}


def _provenance(facts: Facts) -> Rows:
    config = facts.config
    rows = [
        ("run", facts.name),
        ("xxh3_128 of sae_final.pt", facts.digest),
        ("identity of the activation store", _formatted(config, "settings.store.identity")),
        ("language model's revision", _formatted(config, "source.revision")),
        ("digest of its weights", _formatted(config, "source.weights")),
    ]
    environment = config.get("environment") or {}
    for key in environment:
        rows.append((key, _formatted(environment, key)))
    return rows
