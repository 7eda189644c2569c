"""The model card: every figure in it is from the run's own files, and what they lack is said to be
absent.

Names, study texts and tokens in it are other people's words: all that the template prints goes
through `escaped`.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import torch
import yaml
from jinja2 import Environment, StrictUndefined

from data.site import RESID_POST
from train.export.formats import About
from train.sae import SAE

ABSENT = "not recorded"
_TABLE_ROWS = 50  # of a study shown; its JSON has them all
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

Rows = list[tuple[str, str]]


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


class Markdown(str):
    """Text that is Markdown already."""


def card(facts: Facts, files: Sequence[str]) -> str:
    """README.md for the Hub; `files` are those beside it."""
    environment = Environment(
        finalize=_finalized, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["in_html"] = _in_html
    template = environment.from_string(resources.files(__package__).joinpath("card.md").read_text())
    hub = _HUB_ID.fullmatch(facts.about.model)
    return template.render(
        front=Markdown(_front_matter(facts.about)),
        name=facts.name,
        repo=Markdown(facts.repo),
        about=facts.about,
        code_model=Markdown(json.dumps(facts.about.model if hub else "FOLDER/OF/THE/MODEL")),
        topk=facts.sae.threshold is None,
        kind=_kind(facts),
        d_sae=f"{facts.sae.d_sae:,}",
        last=_of(facts.config, "source.n_layers") == facts.about.layer + 1,
        drop_bos=_of(facts.config, "settings.policy.drop_bos"),
        specs=_specs(facts),
        final=_final(facts.held_out),
        definitions=_definitions(facts.quality) if facts.quality else None,
        figures=_figures(facts.quality) if facts.quality else None,
        everything=_said(_of(facts.quality, "variance_explained.all rows.centred"), ".4f"),
        lost=_said(facts.config.get("store_variance_lost"), ".2e"),
        absent=ABSENT,
        studies=_studies(facts.studies),
        files=files,
        provenance=_provenance(facts),
    )


# -- escaping --------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Foreign text as one line of Markdown that shows it as it is: no mark, link, cell, formula or
    HTML comes of it.
    """
    line = re.sub(
        r"[`*~|]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", _in_html(text)
    )  # inside a word _ is plain
    line = re.sub(
        r"^([-+=](?=[-+=\s]|$)|[#\[])", r"\\\g<0>", line
    )  # of lists, rules, headings, what brackets link to
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def _in_html(text: str) -> Markdown:
    """The same inside an HTML element: Markdown's own marks mean nothing there, the Hub's formulas
    and links do.
    """
    line = " ".join(text.split())
    line = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )
    line = html.escape(line, quote=False)
    for mark, entity in (
        ("\\", "&#92;"),
        ("$", "&#36;"),
        ("@", "&#64;"),
        ("://", "&#58;//"),
        ("](", "&#93;("),
    ):
        line = line.replace(mark, entity)
    return Markdown(re.sub(r"(?i)\bwww\.", lambda found: f"{found[0][:-1]}&#46;", line))


def _finalized(value: Any) -> Any:
    return value if isinstance(value, Markdown | int) else escaped(str(value))


def _front_matter(about: About) -> str:
    """The Hub refuses a card with ids that cannot be: a folder's name is left out."""
    head: dict[str, Any] = {"license": "apache-2.0", "library_name": "saelens"}
    head["tags"] = ["sparse-autoencoder", "sae", "interpretability", "mechanistic-interpretability"]
    if _HUB_ID.fullmatch(about.model):
        head["base_model"] = about.model
    if _HUB_ID.fullmatch(about.text):
        head["datasets"] = [about.text]
    return yaml.safe_dump(head, sort_keys=False).strip()


# -- tables ----------------------------------------------------------------------------------------


def _of(found: Any, path: str) -> Any:
    """The value at a dotted path of nested mappings, or None."""
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _said(value: Any, form: str = "") -> str:
    """A value as text; `ABSENT` for one that is not there or not of the kind that `form` takes."""
    try:
        return ABSENT if value is None else format(value, form)
    except (ValueError, TypeError):
        return ABSENT


def _kind(facts: Facts) -> str:
    named = {
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "jumprelu": "JumpReLU",
        "matryoshka": "Matryoshka",
    }
    default = "TopK" if facts.sae.threshold is None else "thresholded"
    return named.get(str(_of(facts.config, "settings.sae.activation")), default)


def _specs(facts: Facts) -> Rows:
    about, found, sae = facts.about, facts.config, facts.sae

    def said(path: str, form: str = "") -> str:
        return _said(_of(found, path), form)

    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    left_out = {
        "drop_bos": "the first token of each document's piece",
        "drop_outliers": "rows of ten median norms",
    }
    policy = _of(found, "settings.policy")
    dropped = [text for key, text in left_out.items() if _of(policy, key)]
    return [
        ("base model", about.model),
        (
            "hook",
            f"residual stream, output of decoder layer {about.layer} counted from 0 ({RESID_POST})",
        ),
        ("d_model", f"{sae.d_model:,}"),
        ("d_sae", f"{sae.d_sae:,} ({sae.d_sae / sae.d_model:.3g} times d_model)"),
        (
            "k (active latents per token)",
            f"{sae.k:,}" + ("" if sae.threshold is None else " on average, in training"),
        ),
        ("text", f"{about.text}, in contexts of {about.context:,} tokens"),
        ("training tokens", f"{said('settings.tokens', ',')} in {said('steps', ',')} steps"),
        ("batch", f"{said('settings.batch', ',')} tokens"),
        ("rows left out", ABSENT if policy is None else ", ".join(dropped) or "none"),
        (
            "optimizer",
            f"Adam ({said('settings.optim.beta1')}, {said('settings.optim.beta2')}), learning rate {said('lr', '.3g')} "
            f"to {said('settings.optim.lr_floor', '.3g')} ({said('settings.optim.decay')})",
        ),
        (
            "loss on dead latents (AuxK)",
            f"coefficient {said('settings.sae.aux_coef')}, k_aux {said('settings.sae.k_aux', ',')}, "
            f"normalisation {said('settings.sae.aux_norm')}",
        ),
        ("dead after", f"{said('dead_after', ',')} tokens without firing"),
        ("decoder directions' norms", f"{norms.min():.6f} to {norms.max():.6f}"),
        ("precision", f"float32, operands of the encoder product {said('settings.matmul')}"),
        ("device", said("environment.device")),
        ("seeds", f"weights {said('settings.seed')}, order of rows {said('settings.data_seed')}"),
    ]


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
    return [(label, _said(record.get(key), form)) for key, (label, form) in named.items()]


def _definitions(quality: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, definition and value of every variance explained."""
    subsets = quality.get("variance_explained") or {}
    rows = [
        (
            f"centred, {name}",
            "1 - sum |e|² / sum |x - μ|², the figure to quote",
            _centred(subsets[name]),
        )
        for name in subsets
    ]
    others = {
        "batch_mean": "1 - sum |e|² / sum |x - mean of its batch|² (sparsify)",
        "mean_of_ratios": "mean of 1 - |e|² / |x - mean of its batch|² (SAELens' legacy figure)",
        "variance_of_error": "1 - sum of Var(e_j) / sum of Var(x_j) (dictionary_learning; forgives a constant)",
        "scalar": "1 - mean(e²) / Var(all elements of x) (many published cards; nearly uncentred)",
    }
    return [
        *rows,
        *(
            (key.replace("_", " "), text, _said(quality.get(key), ".4f"))
            for key, text in others.items()
        ),
    ]


def _centred(subset: Any) -> str:
    low, high = _of(subset, "centred_95") or (None, None)
    rows = _said(_of(subset, "rows"), ",")
    return f"{_said(_of(subset, 'centred'), '.4f')} [{_said(low, '.4f')}, {_said(high, '.4f')}] ({rows} rows)"


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
    rows = [(label, _said(quality.get(key), form)) for key, (label, form) in named.items()]
    spans = quality.get("coverage") or []
    fired = [(_said(_of(span, "rows"), ","), _said(_of(span, "share"), ".1%")) for span in spans]
    return [*rows, *((f"latents that fired within {count} rows", share) for count, share in fired)]


def _studies(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "summary": study["summary"],
            "tables": [
                {
                    "caption": caption,
                    "header": header,
                    "rows": rows[:_TABLE_ROWS],
                    "more": len(rows[_TABLE_ROWS:]),
                }
                for caption, header, rows in study["tables"]
            ],
        }
        for name, study in found.items()
    ]


def _provenance(facts: Facts) -> Rows:
    environment = facts.config.get("environment") or {}
    return [
        ("run", facts.name),
        ("xxh3_128 of sae_final.pt", facts.digest),
        ("identity of the activation store", _said(_of(facts.config, "settings.store.identity"))),
        ("language model's revision", _said(_of(facts.config, "source.revision"))),
        ("digest of its weights", _said(_of(facts.config, "source.weights"))),
        *((key, _said(value)) for key, value in environment.items()),
    ]
