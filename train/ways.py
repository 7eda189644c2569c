"""The ways that a run's computations go: measured when it begins, recorded, and then the run's own.

What can go several ways is the encoder's product (`product`: train/product.py) and, on CUDA, each
sparse kernel (train/gpu.py). Every way is right, and repeats its bits; they differ in speed, and in
how float32 is rounded. So the ways are part of the environment in a run's config.yaml. A run that
goes on takes what it has recorded, and what is not recorded goes the first way: that of runs of
earlier versions, and of dictionaries that are too small for a way to matter.

Arms that are trained together share the ways of a shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residual_saes.data import tuning
from residual_saes.data.errors import SettingError
from residual_saes.data.tuning import Choice
from residual_saes.train import gpu, product
from residual_saes.train.blocks import GPU_BLOCK_BYTES, Matmul
from residual_saes.train.kernels import Kept, group_by_latent

PRODUCT = "product"
_SECONDS = 0.2  # for each kernel: a second for all
_FEW = 8  # rows, and latents, that are computed in float64
_NEAR = 1e-5  # of the largest: 2,560 products in float32 are off by about 1e-6


class Shape(NamedTuple):
    """What decides how fast a way is."""

    d: int  # width that is read
    d_out: int  # width that is written
    d_sae: int
    k: int
    batch: int  # rows of a step, in one process


@dataclass(frozen=True)
class Ways:
    """The ways of one run."""

    taken: dict[str, str] = field(default_factory=dict)  # what a run records; {}: all the first
    choices: tuple[Choice, ...] = ()  # what was measured for them
    lines: tuple[str, ...] = ()  # for the user


_measured: dict[tuple[Shape, str, torch.device], Choice] = {}  # of kernels, in this process


def asked(value: Any, device: torch.device) -> dict[str, str] | None:
    """What the setting train.ways asks for; None: to be measured.

    Raises:
        SettingError: there is no such computation, or no such way on this device.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise SettingError(
            f"train.ways={value} must be a mapping, such as {{product:torch}}, or {{}}: the first "
            "way of all; leave it out, and the ways are measured"
        )
    there = _there(device)
    for what, name in value.items():
        if what not in there:
            raise SettingError(
                f"train.ways.{what}={name}: on this device what goes several ways is "
                f"{', '.join(there)}"
            )
        if name not in there[what]:
            raise SettingError(
                f"train.ways.{what}={name} must be one of {', '.join(there[what])} on this device"
            )
    return {str(what): str(name) for what, name in value.items()}


def settle(
    shape: Shape, device: torch.device, matmul: Matmul, known: Mapping[str, str] | None
) -> Ways:
    """Choose a run's ways and pin them in this process, until `forget`.

    Args:
        known: those that are asked for or recorded; None: they are to be measured.
    """
    taken: dict[str, str] = {}
    choices: list[Choice] = []
    lines: list[str] = []
    for what, names in _there(device).items():
        if what == PRODUCT and matmul != "fp32":
            continue  # one way goes in other precisions
        first = names[0]
        name = first if known is None else known.get(what, first)
        is_gone = name not in names
        if is_gone:
            lines.append(f"the way {name!r} of {what} is not to be had here: another is taken")
            name = first
        matters = (known is None or is_gone) and shape.d * shape.d_sae >= product.SMALL
        if matters:
            choice, is_new = _choice(what, shape, device)
            name = choice.chosen
            matters = bool(choice.trials)  # none: this shape has one way here
        if matters:
            choices.append(choice)
            lines += choice.table() if is_new else []
        name = _pin(what, shape, device, name)
        if matters or name != first or what in (known or {}):
            taken[what] = name
    return Ways(taken, tuple(choices), tuple(lines))


def take(text: str, shape: Shape, device: torch.device) -> Ways:
    """Pin the ways that another process settled, of the same shape; see `written`."""
    taken: dict[str, str] = json.loads(text)
    for what, names in _there(device).items():
        _pin(what, shape, device, taken.get(what, names[0]))
    return Ways(taken)


def written(ways: Ways) -> str:
    """What other processes `take`."""
    return json.dumps(ways.taken)


def forget() -> None:
    """Unpin all ways: no run is trained."""
    product.unpin()
    gpu.unpin()


def _there(device: torch.device) -> dict[str, list[str]]:
    """What can go several ways on a device, and those, the first way first."""
    kernels = {what: [*names] for what, names in gpu.WAYS.items()}
    return {PRODUCT: product.ways(device.type), **(kernels if device.type == "cuda" else {})}


def _pin(what: str, shape: Shape, device: torch.device, name: str) -> str:
    """Pin a way, unless one is; the one that is."""
    if what == PRODUCT:
        return product.pin(shape.d, shape.d_sae, device, name)
    return gpu.pin(what, shape.d_sae, name)


def _choice(what: str, shape: Shape, device: torch.device) -> tuple[Choice, bool]:
    """What was measured in this process, and whether it was just now."""
    if what == PRODUCT:
        known = len(product.known())
        return product.choice(shape.d, shape.d_sae, device), len(product.known()) > known
    key = (shape, what, device)
    is_new = key not in _measured
    if is_new:
        _measured[key] = measure_kernel(what, gpu.WAYS[what], shape, device)
    return _measured[key], is_new


# -- the sparse kernels ----------------------------------------------------------------------------


def measure_kernel(
    what: str, ways: Mapping[str, gpu.Way], shape: Shape, device: torch.device
) -> Choice:
    """The fastest way of a sparse kernel that agrees with float64 and repeats its bits."""
    problem = _Problem(shape, device)
    cases: dict[str, tuple[tuple[Any, ...], Callable[[Any], str | None]]] = {
        "topk": ((problem.pre, shape.k), problem.of_topk),
        "decode": ((*problem.kept, problem.W_dec), problem.of_decode),
        "values_gradient": (
            (problem.upstream, *problem.kept[1:], problem.W_dec),
            problem.of_values,
        ),
        "weight_gradient": (
            (problem.x, problem.kept.values, problem.kept.rows, *problem.bags),
            problem.of_weights,
        ),
        "latent_sums": ((problem.kept.values, *problem.bags), problem.of_sums),
    }
    given, fault = cases[what]
    candidates: dict[str, Callable[[], Any]] = {}
    for name, way in ways.items():
        candidates[name] = partial(way, *given)
    title = f"{what} of {len(problem.pre):,} rows, d_sae {shape.d_sae:,}, k {shape.k}"
    return tuning.choose(
        title, candidates, fault, seconds=_SECONDS, device=device, repeats=_same_bits
    )


class _Problem:
    """Random rows of a run's shape, what is kept of them, and what is right, in float64."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        drawn = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=drawn, device=device)
        n = max(1, min(shape.batch, GPU_BLOCK_BYTES // (4 * shape.d_sae)))
        self.pre = normal(n, shape.d_sae)
        self.x = normal(n, shape.d)
        self.upstream = normal(n, shape.d_out)
        self.W_dec = normal(shape.d_sae, shape.d_out)
        self.indices = self.pre.topk(shape.k, dim=1).indices
        self.kept = Kept.even(normal(n, shape.k), self.indices)
        self.bags = group_by_latent(self.kept.indices, shape.d_sae)
        self.k = shape.k

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Of the first rows, the kept values (few, k) and directions (few, k, d_out)."""
        values = self.kept.values.view(-1, self.k)[:_FEW]
        return values.double(), self.W_dec[self.indices[:_FEW]].double()

    def _latents(self) -> tuple[Tensor, Tensor]:
        """Some latents, of which some fire, and their dense activations (latents, n)."""
        chosen = torch.cat((self.indices[0, :_FEW], torch.arange(_FEW, device=self.x.device)))
        values = self.kept.values.view(-1, self.k).double()
        dense = [(values * (self.indices == latent)).sum(1) for latent in chosen]
        return chosen, torch.stack(dense)

    def of_topk(self, found: tuple[Tensor, Tensor]) -> str | None:
        values, columns = found
        ordered = columns.sort(dim=1).values
        if not bool((ordered[:, 1:] > ordered[:, :-1]).all()):
            return "keeps a column twice"
        few = values[:_FEW].sort(dim=1, descending=True).values
        wanted = self.pre[:_FEW].sort(dim=1, descending=True).values[:, : self.k]
        if not (torch.equal(self.pre.gather(1, columns), values) and torch.equal(few, wanted)):
            return "does not keep the largest"
        return None

    def of_decode(self, found: Tensor) -> str | None:
        values, directions = self._rows()
        return _off(found[:_FEW], (values.unsqueeze(2) * directions).sum(1))

    def of_values(self, found: Tensor) -> str | None:
        products = (self.upstream[:_FEW, None].double() * self._rows()[1]).sum(2)
        return _off(found[: products.numel()], products.view(-1))

    def of_weights(self, found: Tensor) -> str | None:
        chosen, dense = self._latents()
        return _off(found[chosen], dense @ self.x.double())

    def of_sums(self, found: Tensor) -> str | None:
        chosen, dense = self._latents()
        return _off(found[chosen], dense.sum(1))


def _off(found: Tensor, wanted: Tensor) -> str | None:
    """How far float32 sums are from those of float64; None: as near as they can be."""
    # Device sync, once a way.
    worst = float((found.double() - wanted).abs().max() / wanted.abs().max())
    return None if worst <= _NEAR else f"off by {worst:.2g} from float64"


def _same_bits(one: Any, other: Any) -> bool:
    """Whether two results are the same, bit for bit."""
    if isinstance(one, tuple):
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other)
