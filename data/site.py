"""Hook points: where in a decoder rows are taken.

harvest/site.py takes them there; stores, runs and published SAEs carry their names. With x the
residual stream that enters a layer:

    resid_pre    x
    attn_out     what attention adds to it
    resid_mid    x + attn_out
    mlp_in       what the MLP reads: resid_mid behind its norm
    mlp_out      what the MLP adds to the stream, behind its own norm where a family has one
    resid_post   the output of the layer, which the next layer reads
"""

from __future__ import annotations

import re
from typing import NamedTuple

from residual_saes.data.errors import SettingError

RESID_PRE = "resid_pre"
ATTN_OUT = "attn_out"
RESID_MID = "resid_mid"
MLP_IN = "mlp_in"
MLP_OUT = "mlp_out"
RESID_POST = "resid_post"
SITES = (RESID_PRE, ATTN_OUT, RESID_MID, MLP_IN, MLP_OUT, RESID_POST)  # in the order of a layer

_NAME = re.compile(r"(?:(?P<site>[a-z_]+)_)?(?P<layer>0|[1-9]\d*)", re.ASCII)


class HookPoint(NamedTuple):
    """A site of a decoder layer."""

    layer: int  # from 0 on
    site: str = RESID_POST  # one of SITES

    @classmethod
    def of(cls, named: Point) -> HookPoint:
        """The hook point of a name, as `name` has it; a number is the resid_post of that layer.

        Raises:
            SettingError: there is no such site, or no such name.
        """
        if isinstance(named, HookPoint):
            return named
        found = _NAME.fullmatch(str(named))
        if found is None:
            raise SettingError(f"{named!r} must be a layer's number, or SITE_LAYER as in mlp_in_21")
        return cls(int(found["layer"]), require_site(found["site"] or RESID_POST))

    @property
    def name(self) -> str:
        """The name in arrays and records: `21` for resid_post, else `mlp_in_21`."""
        return str(self.layer) if self.site == RESID_POST else f"{self.site}_{self.layer}"

    @property
    def recorded(self) -> int | str:
        """What JSON and YAML hold: the layer's number for resid_post, else the name."""
        return self.layer if self.site == RESID_POST else self.name

    @property
    def record_name(self) -> str:
        """The name of what a store records of it once: `00021` for resid_post, else `mlp_in_21`."""
        return f"{self.layer:05d}" if self.site == RESID_POST else self.name

    @classmethod
    def of_record(cls, name: str) -> HookPoint | None:
        """The hook point of a `record_name`; None: it is none."""
        try:
            point = cls.of(name.lstrip("0") or "0" if name.isdecimal() else name)
        except SettingError:
            return None
        return point if point.record_name == name else None

    def __str__(self) -> str:
        """For messages: `layer 21`, or `mlp_in of layer 21`."""
        of_layer = f"layer {self.layer}"
        return of_layer if self.site == RESID_POST else f"{self.site} of {of_layer}"


Point = HookPoint | int | str  # what `HookPoint.of` takes


def require_site(site: str) -> str:
    """The site, if there is one of this name.

    Raises:
        SettingError: there is none.
    """
    if site not in SITES:
        raise SettingError(f"site={site} must be one of {', '.join(SITES)}")
    return site


def hook_name(point: Point) -> str:
    """The name that TransformerLens has for a hook point, which SAELens and Neuronpedia use.

    Its hook_mlp_out and hook_attn_out are behind a family's post-norms, as ours are. What the MLP
    reads is `mlp.hook_in` (TransformerLens 3, model_bridge/generalized_components/block.py);
    its hook_mlp_in is in front of the norm.
    """
    layer, site = HookPoint.of(point)
    return f"blocks.{layer}.{'mlp.hook_in' if site == MLP_IN else f'hook_{site}'}"


# What other programs call the sites of a layer, behind `blocks.21.` or `model.layers.21.`.
_SITES_ELSEWHERE = {
    "": RESID_POST,
    **{f"hook_{site}": site for site in SITES if site != MLP_IN},  # hook_mlp_in is before the norm
    **{"mlp.hook_in": MLP_IN, "ln2.hook_normalized": MLP_IN, "mlp": MLP_OUT},
    **{"self_attn": ATTN_OUT, "attn": ATTN_OUT},
}
_ELSEWHERE = re.compile(r"(?:[\w.]*\.)?(?:blocks|layers|h)\.(\d+)\.?([\w.]*)", re.ASCII)


def point_elsewhere(name: str) -> HookPoint | None:
    """The hook point that TransformerLens or transformers calls `name`; None: none.

    `blocks.21.hook_mlp_out`, `model.layers.21` and `transformer.h.21.mlp` are such names.
    """
    found = _ELSEWHERE.fullmatch(name)
    site = _SITES_ELSEWHERE.get(found[2]) if found else None
    return HookPoint(int(found[1]), site) if found and site else None
