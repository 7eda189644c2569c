"""The place that an SAE of another library says it is of, and how libraries name such places."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from residual_saes.data.site import MLP_IN, MLP_OUT, RESID_POST, SITES, HookPoint
from residual_saes.train.export import hooks
from residual_saes.train.ports import Port, Ports

# TransformerLens, which SAELens uses: blocks.5.hook_resid_post, blocks.5.attn.hook_z.
_LENS = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<site>(?:\w+\.)*hook_\w+)")
# dictionary_learning: resid_post_layer_5.
_SUBMODULE = re.compile(r"(?P<site>\w+?)_layer_?(?P<layer>\d+)")
# Hugging Face's modules, by which sparsify names folders: layers.5, model.layers.5.mlp, h.5.
_MODULE = re.compile(
    r"(?:\w+\.)*(?:layers|h|blocks)[._](?P<layer>\d+)(?:\.(?P<site>\w+(?:\.\w+)*))?"
)
# Names of sites that are not ours with `hook_` before them. TransformerLens' hook_mlp_in is in
# front of the norm, so it is none of ours.
_OTHER_NAMES = {
    "output": RESID_POST,
    "hook_out": RESID_POST,  # TransformerLens 3
    "mlp.hook_in": MLP_IN,
    "hook_mlp_in": "hook_mlp_in",
}
# What the MLP's module gives: mlp_out in families without a post-norm.
_MLP_MODULE = {"mlp", "mlp.hook_out"}


class Origin(NamedTuple):
    """What an SAE's files say of it. None: they do not say it."""

    hook: str | None = None  # in the library's words
    site: str | None = None  # by our name, see data/site.py; a hook of no known form is its own
    layer: int | None = None  # of the model, from 0
    model: str | None = None  # hub id, or the library's name of it
    context: int | None = None  # tokens
    hook_out: str | None = None  # of a transcoder: what it writes, in the library's words
    several: Ports | None = None  # what it reads and writes, where files say it by names of ours
    scales: Mapping[str, float] | None = None  # what rows were multiplied by in training, by port

    def ports(self, architecture: str | None = None) -> Ports | None:
        """What it reads and writes; None if the files do not say it, or not by names of ours.

        Args:
            architecture: the model's class, for names that mean other places in other families.
        """
        if self.several is not None:
            return self.several
        read = _point(self.site, self.layer, architecture)
        written = read
        if self.hook_out is not None:
            out = of_hook(self.hook_out)
            written = _point(out.site, out.layer, architecture)
        if read is None or written is None:
            return None
        return Ports((Port(0, read),), (Port(0, written),))


def _point(site: str | None, layer: int | None, architecture: str | None) -> HookPoint | None:
    if site in _MLP_MODULE and hooks.has_plain_mlp(architecture):
        site = MLP_OUT
    return HookPoint(layer, site) if site in SITES and layer is not None else None


def of_hook(name: str) -> Origin:
    """The site and the layer of a hook's name.

    A module of a layer is a site of its own. The layer itself is its output, resid_post.
    """
    for form in (_LENS, _SUBMODULE, _MODULE):
        found = form.fullmatch(name)
        if found:
            site = found["site"] or RESID_POST
            site = _OTHER_NAMES.get(site, site.removeprefix("hook_"))
            return Origin(name, site, int(found["layer"]))
    return Origin(name, name)
