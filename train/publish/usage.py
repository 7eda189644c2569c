"""What the card says of the hook points of a dictionary, and how its code takes their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from residual_saes.data.markdown import Markdown
from residual_saes.data.site import (
    ATTN_OUT,
    MLP_IN,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    hook_name,
)
from residual_saes.train.export.format import About
from residual_saes.train.export.hooks import module
from residual_saes.train.ports import Port
from residual_saes.train.sae import SAE

_WORDS = {
    RESID_PRE: "the residual stream that enters decoder layer {}",
    ATTN_OUT: "what attention of decoder layer {} adds to the residual stream",
    RESID_MID: "the residual stream between attention and MLP of decoder layer {}",
    MLP_IN: "what the MLP of decoder layer {} reads, behind its norm",
    MLP_OUT: "what the MLP of decoder layer {} adds to the residual stream",
    RESID_POST: "residual stream, output of decoder layer {}",
}
_UNKNOWN = "PATH.OF.THE.MODULE"  # of a model whose family train/export/hooks.py does not know
_NOUNS = {"sae": "SAE", "transcoder": "transcoder", "crosscoder": "crosscoder"}


class Place(NamedTuple):
    """A module whose input or output is the rows of a hook point."""

    name: str  # of the port
    path: str  # in transformers' model
    side: str  # input or output


def specs(about: About) -> list[tuple[str, str]]:
    """The hook points in words, with their names in TransformerLens."""
    sides = {"hook": about.ports.reads}
    if not about.ports.is_autoencoder:
        sides = {"reads": about.ports.reads, "writes": about.ports.writes}
    return [(side, _words(port)) for side, ports in sides.items() for port in ports]


def _words(port: Port) -> str:
    point = port.point
    where = _WORDS[point.site].format(f"{point.layer} counted from 0")
    store = f", of store {port.store}" if port.store else ""
    return f"{where} ({point.site}; {hook_name(point)} in TransformerLens){store}"


def variables(about: About, sae: SAE, models: Sequence[str]) -> dict[str, Any]:
    """What the card's template takes.

    Args:
        models: the names that the code loads, of the first store and of the second.
    """
    transcoder = about.kind == "transcoder"
    stores = {port.store: models[port.store] for port in about.ports.every}
    return {
        "noun": _NOUNS[about.kind],
        "plain": about.kind == "sae" and about.point.site == RESID_POST,
        "title": title(about),
        "centre": Markdown("b_dec" if sae.b_in is None else "b_in"),
        "target": Markdown("y" if transcoder else "x"),
        "out": Markdown("y_hat" if transcoder else "x_hat"),
        "skip": sae.W_skip is not None,
        "models": Markdown(
            _code([[name, _places(about, store)] for store, name in stores.items()])
        ),
        "reads": Markdown(_names(about.ports.reads)),
        "writes": Markdown(_names(about.ports.writes)),
        "unknown": any(
            place.path == _UNKNOWN for store in stores for place in _places(about, store)
        ),
    }


def title(about: About) -> str:
    """The places of a dictionary in a few words: `layer 21`, `mlp_in to mlp_out of layer 21`."""
    if about.kind == "transcoder":
        return f"{about.point.site} to {about.target}"
    return " and ".join(map(str, about.ports.reads))


def _places(about: About, store: int) -> list[Place]:
    places = []
    for port in about.ports.every:
        if port.store == store:
            path, _, side = (
                module(port.point, about.architecture) or f"{_UNKNOWN}.output"
            ).rpartition(".")
            places.append(Place(port.name, path, side))
    return places


def _code(models: Sequence[Any]) -> str:
    """Models and their places as Python writes them, a line each."""
    lines = []
    for name, places in models:
        lines.append(f"    ({json.dumps(name)}, [")
        lines += [f"        {json.dumps(list(place))}," for place in places]
        lines.append("    ]),")
    return "\n".join(lines)


def _names(ports: Sequence[Port]) -> str:
    return json.dumps([port.name for port in ports])
