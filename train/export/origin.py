"""The place that an SAE of another library says it is of, and how libraries name such places."""

from __future__ import annotations

import re
from typing import NamedTuple

from data.site import RESID_POST

# TransformerLens, which SAELens uses: blocks.5.hook_resid_post, blocks.5.attn.hook_z.
_LENS = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<site>(?:\w+\.)*hook_\w+)")
# dictionary_learning: resid_post_layer_5.
_SUBMODULE = re.compile(r"(?P<site>\w+?)_layer_?(?P<layer>\d+)")
# Hugging Face's modules, by which sparsify names folders: layers.5, model.layers.5.mlp, h.5.
_MODULE = re.compile(
    r"(?:\w+\.)*(?:layers|h|blocks)[._](?P<layer>\d+)(?:\.(?P<site>\w+(?:\.\w+)*))?"
)


class Origin(NamedTuple):
    """What an SAE's files say of it. None: they do not say it."""

    hook: str | None = None  # in the library's words
    site: str | None = None  # by our name, see data/site.py; a hook of no known form is its own
    layer: int | None = None  # of the model, from 0
    model: str | None = None  # hub id, or the library's name of it
    context: int | None = None  # tokens


def of_hook(name: str) -> Origin:
    """The site and the layer of a hook's name.

    A module of a layer is a site of its own. The layer itself is its output, resid_post.
    """
    for form in (_LENS, _SUBMODULE, _MODULE):
        found = form.fullmatch(name)
        if found:
            site = found["site"] or RESID_POST
            if site in ("output", "hook_out"):  # a layer's: as we write it, and TransformerLens 3
                site = RESID_POST
            return Origin(name, site.removeprefix("hook_"), int(found["layer"]))
    return Origin(name, name)
