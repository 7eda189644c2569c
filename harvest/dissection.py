"""Finding where a decoder's layers read and write the residual stream.

By structure: a small pass is followed (harvest/flow.py). From a layer's input to its output the
stream is a chain of sums, and each sum adds what some module gave. By behaviour: of what is added,
the MLP's share at a token depends on nothing but what the MLP reads at that token. Attention, or
whatever mixes tokens in its place, does not pass that test. So no name of a family, of a module or
of an argument decides anything. Done once, at the start: it waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from residual_saes.data.site import ATTN_OUT, MLP_IN, MLP_OUT, RESID_MID, HookPoint
from residual_saes.harvest.anatomy import INSIDE, Anatomy, LayerAnatomy, Reader, Term
from residual_saes.harvest.decoder import find_blocks, meta_decoder
from residual_saes.harvest.flow import PRODUCTS, SAME, SUMS, Call, Flow, follow, matrices
from residual_saes.harvest.precise import in_float32
from residual_saes.harvest.site import DeepestReached, editing, taking

# Largest difference of an MLP's rows, relative to their norm in float32, where it reads the same
# rows in another order. In every second family of docs/families.md MLPs were below 2^-23, and what
# mixes tokens above 2^-5.
_SAME_ROW = 2.0**-10
# Largest share of the weights of a layer's heaviest module that a norm has.
_OF_A_NORM = 1 / 64


class Read(NamedTuple):
    """A value that modules with weights read."""

    value: int  # its number in the pass
    readers: tuple[Reader, ...]


class Part(NamedTuple):
    """What one module gives to the stream."""

    term: Term
    value: int  # number of what it gives, in the order of the pass
    step: int  # which of the layer's sums adds it
    reads: tuple[Read, ...]  # by the first modules with weights behind the stream
    sees: frozenset[int]  # how many sums the stream has been through where it is read


class Chain(NamedTuple):
    """A layer's stream, from its input to its output."""

    parts: tuple[Part, ...] = ()
    middles: tuple[Reader | None, ...] = ()  # who reads the stream behind each sum
    scale: tuple[float | torch.Tensor, ...] = ()  # that the stream is multiplied by behind the sums
    reason: str = ""  # why there is none


def dissect(decoder: nn.Module, blocks: nn.ModuleList, deepest: int, ids: torch.Tensor) -> Anatomy:
    """The anatomy of a decoder up to layer `deepest`, by two passes of a few tokens.

    Args:
        ids: (b, t) ordinary tokens on the decoder's device, b at least 2.

    Raises:
        Exception: whatever the family's own code raises.
    """
    with in_float32(blocks):
        flow = follow(decoder, blocks, deepest, ids, use_cache=False)
        chains = [_Chains(flow, layer).chain() for layer in range(deepest + 1)]
        of_mlp = _tokenwise(decoder, blocks, chains, ids)
    family = type(decoder).__name__
    return Anatomy(family, tuple(map(_sites, chains, of_mlp)))


def require_foreseen(text: Any, points: Sequence[HookPoint]) -> None:
    """Refuse sites that the decoder's code shows a layer not to have, before any weight is read.

    The decoder is followed without memory. What cannot be followed so passes: it is tried with its
    weights. So does what depends on which output is the MLP's; here the second sum's is taken.

    Args:
        text: configuration of the text decoder.

    Raises:
        SettingError: a layer has no such site.
    """
    inside = [point for point in points if point.site in INSIDE]
    if not inside:
        return
    decoder = meta_decoder(text)
    blocks = find_blocks(decoder)
    deepest = max(point.layer for point in inside)
    ids = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    try:
        # With a cache, as by default: without one transformers looks at the positions' values.
        flow = follow(decoder, blocks, deepest, ids)
        layers = [_guessed(_Chains(flow, layer).chain()) for layer in range(deepest + 1)]
    except Exception:  # the family's own code may raise anything
        return
    anatomy = Anatomy(type(decoder).__name__, tuple(layers))
    for point in inside:
        layer = layers[point.layer]
        if not layer.places or (layer.is_parallel and point.site == RESID_MID):
            anatomy.require([point])


def _guessed(chain: Chain) -> LayerAnatomy:
    """A layer's sites where no value is known: the last of the first two sums has the MLP."""
    last = max((part.value for part in chain.parts if part.step <= 1), default=-1)
    return _sites(chain, [part.value == last for part in chain.parts])


def _sites(chain: Chain, is_mlp: Sequence[bool]) -> LayerAnatomy:
    """A layer's sites, from its stream and from which of its parts are of an MLP."""
    mlp = [part for part, yes in zip(chain.parts, is_mlp, strict=True) if yes]
    several = "it adds the outputs of several MLPs" if len({part.step for part in mlp}) > 1 else ""
    if reason := chain.reason or several:
        return LayerAnatomy(refused=dict.fromkeys(INSIDE, reason))
    rest = [part for part, yes in zip(chain.parts, is_mlp, strict=True) if not yes]
    step = mlp[0].step if mlp else len(chain.middles)
    sees = frozenset[int]().union(*(part.sees for part in mlp))
    places: dict[str, Any] = {}
    refused: dict[str, str] = {}

    if not mlp:
        refused[MLP_OUT] = "it adds nothing that, like an MLP's output, depends on one token alone"
    else:
        places[MLP_OUT] = _summed(mlp)
        if len(reads := _merged(mlp)) == 1:
            places[MLP_IN] = reads[0].readers
    refused[MLP_IN] = refused.get(MLP_OUT, "parts of its MLP read different states")

    before = [part for part in rest if part.step < step] or [p for p in rest if p.step == step]
    steps = {part.step for part in before}
    is_parallel = bool(mlp) and max(sees) <= min(steps, default=-1)
    if not before:
        refused[ATTN_OUT] = "no attention adds to the stream before an MLP does"
    elif len(steps) > 1 or (not mlp and len(chain.middles) > 1):
        refused[ATTN_OUT] = "it adds several outputs before that of an MLP"
    else:
        places[ATTN_OUT] = _summed(before)

    middle = chain.middles[step - 1] if 0 < step <= len(chain.middles) and mlp else None
    if is_parallel:
        refused[RESID_MID] = "its attention and its MLP read the same stream"
    elif ATTN_OUT not in places or MLP_OUT not in places or middle is None:
        refused[RESID_MID] = "it has no stream between attention and an MLP"
    else:
        places[RESID_MID] = (middle,)
    others = _summed(part for part in rest if part not in before or ATTN_OUT not in places)
    refused = {site: reason for site, reason in refused.items() if site not in places}
    return LayerAnatomy(places, refused, others, chain.scale, is_parallel)


def _merged(parts: Iterable[Part]) -> list[Read]:
    """What the parts read, each value once with all its readers."""
    readers: dict[int, list[Reader]] = {}
    for part in parts:
        for read in part.reads:
            known = readers.setdefault(read.value, [])
            known += [reader for reader in read.readers if reader not in known]
    return [Read(value, tuple(them)) for value, them in readers.items()]


def _summed(parts: Iterable[Part]) -> tuple[Term, ...]:
    """Parts as the terms of a sum, in the order of the pass."""
    return tuple(part.term for part in sorted(parts, key=lambda part: part.value))


# -- by structure ----------------------------------------------------------------------------------


class _Chains:
    """One layer of a followed pass."""

    def __init__(self, flow: Flow, layer: int) -> None:
        self._made = flow.made
        self._changed = flow.changed
        calls = [call for call in flow.calls if call.layer == layer]
        self._whole = next(call for call in calls if not call.path)
        self._calls = [call for call in calls if call.path]
        times: dict[int, int] = {}
        for call in flow.calls:
            times[id(call.module)] = times.get(id(call.module), 0) + 1
        self._times = times  # calls of each module in the whole pass
        sizes = [(call.module, map(matrices, call.module.modules())) for call in self._calls]
        self._sizes = {id(module): sum(its) for module, its in sizes}  # of matrices with weights
        self._input = self._whole.inputs[0][1] if self._whole.inputs else -1
        self._width = self._made[self._input].value.shape[-1]
        self._before: dict[int, int] = {}  # of each value of the stream: the one before it
        self._parameters = {id(tensor) for tensor in _weights(self._whole.module)}

    def chain(self) -> Chain:
        """The layer's stream."""
        if not self._whole.outputs or self._input < 0:
            return Chain(reason="it gives no stream")
        self._extend()
        last = self._root(self._whole.outputs[0][1])
        if last not in self._before:
            return Chain(reason="its output is not its input with something added to it")
        values = [last]
        while values[-1] != self._input:
            values.append(self._before[values[-1]])
        values.reverse()

        # The sums of the chain, and the factors behind them.
        sums = [value for value in values[1:] if self._made[value].name in SUMS]
        factors = [value for value in values[1:] if self._made[value].name in PRODUCTS]
        if not sums:
            return Chain(reason="it adds nothing to its input")
        if factors and min(factors) < max(sums):
            return Chain(reason="it multiplies the stream before it adds to it")
        scale = tuple(factor for value in factors if (factor := self._factor(value)) is not None)

        # What each of them adds.
        position: dict[int, int] = {}  # of each value of the chain: sums that it has been through
        for value in values:
            position[value] = sum(added <= value for added in sums)
        outer = [call for call in self._calls if self._is_outermost(call, sums)]
        parts: list[Part] = []
        for step, value in enumerate(sums):
            added = next(v for v in self._made[value].inputs if self._root(v) not in self._before)
            terms = self._terms(added)
            if terms is None:
                return Chain(reason="it adds something that no module of it gives")
            for term, made in terms:
                reads, sees = self._read(made, outer, position)
                parts.append(Part(term, made, step, reads, sees))
        middles = tuple(self._reader(value) for value in sums)
        return Chain(tuple(parts), middles, scale)

    def _root(self, value: int) -> int:
        """The value that this one is, in another shape or type."""
        while self._made[value].name in SAME and value not in self._before:
            value = self._made[value].inputs[0]
        return value

    def _extend(self) -> None:
        """Find all values that are the layer's input, with something added to or multiplied."""
        self._before = {self._input: -1}
        for value in range(self._whole.begin, self._whole.end):
            made = self._made[value]
            roots = [self._root(read) for read in made.inputs]
            of_stream = [root for root in roots if root in self._before]
            if len(of_stream) != 1 or self._is_shifted(value):
                continue
            is_sum = made.name in SUMS and len(roots) == 2
            if is_sum or (made.name in PRODUCTS and self._factor(value) is not None):
                self._before[value] = of_stream[0]

    def _is_shifted(self, value: int) -> bool:
        """Whether a value has another width than the stream."""
        shape = self._made[value].value.shape
        return not shape or shape[-1] != self._width

    def _factor(self, value: int) -> float | torch.Tensor | None:
        """The number or the weight that a product multiplies by; None: it is something else."""
        made = self._made[value]
        if len(made.inputs) == 1:
            return made.number
        weights = [self._made[read].value for read in made.inputs]
        weights = [weight for weight in weights if id(weight) in self._parameters]
        return weights[0] if len(weights) == 1 else None

    def _is_outermost(self, call: Call, sums: Sequence[int]) -> bool:
        """Whether a call with weights neither adds to the stream nor norms what it reads first.

        And whether it lies in calls alone that do.
        """

        def is_open(call: Call | None) -> bool:
            if call is None or any(call.begin <= value < call.end for value in sums):
                return True
            return self._is_heavy(call) and not self._reads_with_weights(call)

        above = call.parent
        while above is not None and is_open(above):
            above = above.parent
        return above is None and self._is_heavy(call) and not is_open(call)

    def _is_heavy(self, call: Call) -> bool:
        """Whether a call is no norm or activation: by its module's matrices of weights.

        The norms of some families have small ones, of a gate.
        """
        size = self._sizes[id(call.module)]
        is_wide = all(self._made[v].value.shape[-1:] == (self._width,) for _, v in call.outputs)
        return size > (max(self._sizes.values()) * _OF_A_NORM if is_wide else 0)

    def _reads_with_weights(self, call: Call) -> bool:
        """Whether a matrix of a call's module is applied to what the call is told."""
        told = {self._root(value) for _, value in call.inputs}
        within = [c for c in self._calls if call.begin <= c.begin and c.end <= call.end]
        read = [value for inner in within if matrices(inner.module) for _, value in inner.inputs]
        return any(self._root(value) in told for value in read)

    def _terms(self, added: int) -> list[tuple[Term, int]] | None:
        """A value as a sum of modules' outputs, each with the value that its module gave."""
        for call in self._calls:  # the outermost first
            for place, value in call.outputs:
                if value == added and self._times[id(call.module)] == 1:
                    copied = value in self._changed
                    return [(Term(call.path, place or 0, (), copied), value)]
        made = self._made[added]
        if made.name in SAME:
            return self._terms(made.inputs[0])
        if made.name in SUMS and len(made.inputs) == 2:
            first, second = (self._terms(read) for read in made.inputs)
            return None if first is None or second is None else first + second
        factor = self._factor(added) if made.name in PRODUCTS else None
        if factor is None:
            return None
        read = next(v for v in made.inputs if id(self._made[v].value) not in self._parameters)
        multiplied: list[tuple[Term, int]] = []
        for term, value in self._terms(read) or ():
            multiplied.append((term._replace(factors=(*term.factors, factor)), value))
        return multiplied or None

    def _read(
        self, made: int, outer: Sequence[Call], position: dict[int, int]
    ) -> tuple[tuple[Read, ...], frozenset[int]]:
        """Who first reads the stream with weights to make this value, and where in the stream."""
        gave = {value for call in outer for _, value in call.outputs}
        region = self._behind(made, position)
        calls = [call for call in outer if any(value in region for _, value in call.outputs)]
        readers: dict[int, list[Reader]] = {}
        sees: set[int] = set()
        for call in calls:
            for key, value in call.inputs:
                behind = self._behind(value, position)
                root = self._root(value)
                seen = {position[v] for v in behind if v in position}
                if not seen or any(v in gave for v in behind):
                    continue
                sees |= seen
                copied = value in self._changed
                readers.setdefault(root, []).append(Reader(call.path, key, copied))
        found = tuple(Read(root, tuple(them)) for root, them in readers.items())
        modules = [call.module for call in calls]
        usable = all(self._times[id(module)] == 1 for module in modules)
        return (found if usable else ()), frozenset(sees)

    def _behind(self, value: int, position: dict[int, int]) -> set[int]:
        """All values that one was made from, itself too, back to the stream."""
        found: set[int] = set()
        waiting = [value]
        while waiting:
            value = waiting.pop()
            is_outside = value < self._whole.begin and value not in position
            if value in found or is_outside:
                continue
            found.add(value)
            if value not in position:
                waiting += self._made[value].inputs
        return found

    def _reader(self, value: int) -> Reader | None:
        """The first module's argument that is a value of the stream."""
        for call in self._calls:
            for key, read in call.inputs:
                if self._root(read) == value and self._times[id(call.module)] == 1:
                    return Reader(call.path, key, read in self._changed)
        return None


def _weights(block: nn.Module) -> list[torch.Tensor]:
    return [*block.parameters(), *block.buffers()]


# -- by behaviour ----------------------------------------------------------------------------------


def _tokenwise(
    decoder: nn.Module, blocks: nn.ModuleList, chains: Sequence[Chain], ids: torch.Tensor
) -> list[list[bool]]:
    """Of each layer's parts: whether a row depends on nothing but the row that is read for it.

    In one pass every part reads, in the second text, the rows of the first text in the opposite
    order; but at the first token it reads that text's own row. Where it is an MLP it gives the
    first text's rows in the opposite order. Attention sees the first token, in either direction.
    """
    given: dict[tuple[int, int], torch.Tensor] = {}
    handles: list[Any] = []
    for layer, chain in enumerate(chains):
        for read in _merged(chain.parts):
            handles += editing(blocks[layer], read.readers, reversed_first)
        for number, part in enumerate(chain.parts):
            handles += taking(blocks[layer], (part.term,), _keeper(given, (layer, number)))
    handles.append(blocks[len(chains) - 1].register_forward_hook(_leave))
    try:
        with torch.inference_mode(), suppress(DeepestReached):
            decoder(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[bool]] = []
    for layer, chain in enumerate(chains):
        of_layer: list[bool] = []
        for number, part in enumerate(chain.parts):
            of_layer.append(bool(part.reads) and is_reversed(given[layer, number]))
        found.append(of_layer)
    return found


def _keeper(given: dict[tuple[int, int], torch.Tensor], key: tuple[int, int]) -> Any:
    return lambda values: given.update({key: values.float()})


def _leave(*_: object) -> None:
    raise DeepestReached


def reversed_first(values: torch.Tensor) -> torch.Tensor:
    """(b, t, d) with the first text's rows, in the opposite order, in the place of the second's.

    The first token keeps its own row.
    """
    edited = values.clone()
    edited[1, 1:] = values[0].flip(0)[1:]
    return edited


def is_reversed(values: torch.Tensor) -> bool:
    """Whether the second text's rows behind its first are the first's in the opposite order."""
    rows, expected = values[1, 1:], values[0].flip(0)[1:]
    error = (rows - expected).norm(dim=-1)
    return bool((error <= _SAME_ROW * expected.norm(dim=-1)).all())
