"""What a run reads: the hook points that layer=, site= and store= ask for.

What layer= leaves open, the store decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residual_saes.data.errors import SettingError
from residual_saes.data.rows.source import Source
from residual_saes.data.settings import whole
from residual_saes.data.site import MLP_OUT, RESID_POST, HookPoint, require_site
from residual_saes.data.store import retention
from residual_saes.data.store.store import Store
from residual_saes.train.ports import KINDS, Ports, default_site, ports_of
from residual_saes.train.sae import SAEConfig


@dataclass(frozen=True)
class Asked:
    """Hook points as the settings name them."""

    kind: str  # of the dictionary
    layers: tuple[int, ...] | None  # None: as the store has them
    sites: tuple[str, ...]
    target: str | None  # of a transcoder, as `SAEConfig` has it
    stores: int = 1

    @classmethod
    def of(cls, layer: Any, site: Any, stores: int, sae: SAEConfig) -> Asked:
        """What the values of layer= and site= ask for.

        Args:
            layer: a layer, a list, or one of these by the kind of dictionary, for multiruns.
            stores: how many store= names.

        Raises:
            SettingError: a value is wrong, or no such dictionary reads those hook points.
        """
        if isinstance(layer, Mapping):
            if unknown := sorted(map(str, layer.keys() - set(KINDS))):
                raise SettingError(f"layer={layer}: {unknown[0]} must be one of {', '.join(KINDS)}")
            layer = layer.get(sae.kind)
        layers = None if layer is None else tuple(_layer(one) for one in _listed("layer", layer))
        named = default_site(sae.kind) if site is None else site
        sites = tuple(require_site(str(one)) for one in _listed("site", named))
        asked = cls(sae.kind, layers, sites, sae.target, stores)
        if layers is not None or asked.needs_one_layer:
            asked.ports(layers or (0,))
        return asked

    @property
    def needs_one_layer(self) -> bool:
        """Whether one layer is enough for such a dictionary."""
        return self.kind != "crosscoder" or len(self.sites) * self.stores > 1

    def ports(self, layers: Sequence[int]) -> Ports:
        """What is read and written of some layers; raises SettingError as `ports_of` does."""
        return ports_of(self.kind, layers, self.sites, self.target, self.stores)

    def points(self, layers: Sequence[int]) -> list[HookPoint]:
        """The hook points that each store must have, in the order of the columns."""
        return list(dict.fromkeys(port.point for port in self.ports(layers).every))

    def layers_in(self, stores: Sequence[Store]) -> tuple[int, ...]:
        """The layers that are read of some stores.

        Where layer= is open they are the first layer with all the hook points, and of a crosscoder
        of one site of one store every layer with it.

        Raises:
            SettingError: there is no such layer.
        """
        if self.layers is not None:
            return self.layers
        there = [set(_points(store)) for store in stores]
        found = self._layers_with(set.intersection(*there))
        if found:
            return tuple(found[:1] if self.needs_one_layer else found)
        names = " and ".join(store.name for store in stores)
        if not all(there):
            raise SettingError(
                f"{names} has no layer yet; finish it with `python -m harvest store={names}`"
            )
        wanted = ",".join(dict.fromkeys(point.site for point in self._points_of(0)))
        raise SettingError(
            f"no layer of {names} has site={wanted}; there are "
            f"{', '.join(map(str, sorted(set.union(*there))))}; "
            f"`python -m harvest site=[{wanted}] layer=... store={stores[0].name}` adds one"
        )

    def _layers_with(self, points: Collection[HookPoint]) -> list[int]:
        """The layers of which all that is read and written is among some hook points."""
        layers = sorted({point.layer for point in points})
        return [layer for layer in layers if set(self._points_of(layer)) <= set(points)]

    def _points_of(self, layer: int) -> list[HookPoint]:
        sites = [*self.sites, *([self.target or MLP_OUT] if self.kind == "transcoder" else [])]
        return [HookPoint(layer, site) for site in sites]

    def sources(self, stores: Sequence[Store], layers: Sequence[int]) -> tuple[Source, ...]:
        """The columns of a batch."""
        return tuple(Source(stores[port.store], port.point) for port in self.ports(layers).every)

    def name(self, layers: Sequence[int]) -> str:
        """Of the hook points in the name of a run: `L21`, `L21_27`, `mlp_in_21`."""
        sites = "L" if self.sites == (RESID_POST,) else "_".join((*self.sites, ""))
        return sites + "_".join(map(str, layers))


def stem(stores: Sequence[Store]) -> str:
    """Of the stores in the name of a run."""
    return "_".join(Path(store.name).stem for store in stores)


def _points(store: Store) -> Sequence[HookPoint]:
    """What a store has, or will have if it is a ring."""
    return retention.read(store.place).points or store.points


def _layer(value: Any) -> int:
    layer = whole("layer", value)
    if layer < 0:
        raise SettingError(f"layer={layer} must be at least 0")
    return layer


def _listed(name: str, value: Any) -> list[Any]:
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise SettingError(f"{name}=[] names nothing; leave it out, or name one")
    return listed
