"""What a dictionary reads and what it writes, as hook points of the stores of its run.

    sae          reads one hook point and writes the same one
    transcoder   reads one hook point, mlp_in by default, and writes another one of the same layer
    crosscoder   reads several hook points, of one store or of two, and writes them all

A batch holds the rows of all of them side by side, in the order of `Ports.every`: of a transcoder
[read | written], of a crosscoder one hook point behind the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from residual_saes.data.errors import SettingError
from residual_saes.data.settings import whole
from residual_saes.data.site import MLP_IN, MLP_OUT, RESID_POST, HookPoint

KINDS = ("sae", "transcoder", "crosscoder")


class Port(NamedTuple):
    """A hook point of one of the run's stores."""

    store: int  # number of the store among those of store=, from 0 on
    point: HookPoint

    @classmethod
    def of(cls, name: str) -> Port:
        """The hook point of a `name`. Raises SettingError: there is none."""
        store, slash, point = name.rpartition("/")
        if slash and not store.isdecimal():
            raise SettingError(f"{name!r} must be a hook point, or STORE/HOOK_POINT as in 1/21")
        return cls(int(store) if slash else 0, HookPoint.of(point))

    @property
    def name(self) -> str:
        """In records and figures: `21`, `mlp_in_21`; of the second store `1/21`."""
        return f"{self.store}/{self.point.name}" if self.store else self.point.name

    def __str__(self) -> str:
        """For messages."""
        return f"{self.point} of store {self.store}" if self.store else str(self.point)


@dataclass(frozen=True)
class Ports:
    """The hook points on both sides of a dictionary."""

    reads: tuple[Port, ...]
    writes: tuple[Port, ...]

    @property
    def every(self) -> tuple[Port, ...]:
        """Each hook point once: the columns of a batch, from left to right."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))

    @property
    def is_autoencoder(self) -> bool:
        """Whether it writes what it reads."""
        return self.reads == self.writes


def default_site(kind: str) -> str:
    """The site that a kind of dictionary reads where none is named."""
    return MLP_IN if kind == "transcoder" else RESID_POST


def ports_of(
    kind: str, layers: Sequence[int], sites: Sequence[str], target: str | None, stores: int = 1
) -> Ports:
    """The hook points of a run.

    Args:
        kind: one of `KINDS`.
        layers, sites: each of the layers at each of the sites is read.
        target: the site that a transcoder writes; None: mlp_out.
        stores: how many; a crosscoder reads the same hook points of each.

    Raises:
        SettingError: a kind cannot read that many, or one is named twice.
    """
    points = [HookPoint(layer, site) for layer, site in product(layers, sites)]
    reads = tuple(Port(store, point) for store, point in product(range(stores), points))
    if len(set(reads)) != len(reads):
        raise SettingError(
            f"layer={list(layers)} site={list(sites)} names a hook point twice; name each once"
        )
    named = ", ".join(map(str, reads))
    if kind == "crosscoder":
        if len(reads) < 2:
            raise SettingError(
                f"a crosscoder reads several hook points, and this is {named} alone; give "
                "layer=[21,27], several of site=, or two stores as store=[A,B]"
            )
        return Ports(reads, reads)
    if len(reads) > 1:
        way_out = "take -m layer=21,27 for one each"
        if kind == "sae":
            way_out += ", or sae=crosscoder_32k for one dictionary of all of them"
        raise SettingError(
            f"sae.kind={kind} reads one hook point, and these are {named}; {way_out}"
        )
    if kind == "sae":
        return Ports(reads, reads)
    written = Port(0, HookPoint(points[0].layer, target or MLP_OUT))
    if written in reads:
        raise SettingError(
            f"sae.target={target} is what the transcoder reads; take sae=topk_32k for an "
            "autoencoder, or another sae.target="
        )
    return Ports(reads, (written,))


def recorded_ports(settings: Mapping[str, Any]) -> Ports:
    """The hook points of a run, by the settings that it recorded.

    Raises:
        SettingError, KeyError, TypeError: they are not what training records.
    """
    layers = settings["layer"]
    sites = settings.get("site", RESID_POST)
    of_sae = settings.get("sae", {})
    return ports_of(
        of_sae.get("kind", "sae"),
        [whole("layer", layer) for layer in (layers if isinstance(layers, list) else [layers])],
        [sites] if isinstance(sites, str) else sites,
        of_sae.get("target"),
        whole("stores", settings.get("stores", 1)),
    )
