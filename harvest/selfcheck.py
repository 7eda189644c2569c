"""Checks at every start: documents stay apart, rows are the model's, stored bits recur.

The measure is each piece run alone, as transformers runs it when it is told nothing but the ids.
It waits for the device at every comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data.errors import PipelineError, SettingError, StoreError, first_line
from residual_saes.data.journal import Progress, tell
from residual_saes.data.machine import is_out_of_memory
from residual_saes.data.site import RESID_POST, HookPoint, Point
from residual_saes.data.store import retention
from residual_saes.data.store.store import Store
from residual_saes.harvest.attention import SDPA
from residual_saes.harvest.decoder import require_residuals
from residual_saes.harvest.forward import batch_residuals, prepared, scatter, unit_residuals, upload
from residual_saes.harvest.isolation import Isolation, forward_inputs
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.precise import in_float32
from residual_saes.harvest.proof import prove
from residual_saes.harvest.site import DeepestReached, tap

# Largest error of a row against its piece alone, both in float32. One rounding of a stored value
# is 2^-8 (bfloat16). Right ways stay below 2^-18 in every family of docs/families.md. Wrong ones
# (ignored masks, positions, neighbours) give more than 2^-7.
SAME_ROW = 2.0**-10
# Length of the first piece of a row: below every threshold that is in use (windows, chunks, first
# lengths), and odd, so that no chunk of a recurrent layer ends with it.
_FIRST_TOKENS = 5


class Trial(NamedTuple):
    """A batch that is run in every way: a row of one piece, and a row of two."""

    tokens: NDArray[np.uint32]  # (2, T)
    starts: NDArray[np.bool_]  # (2, T)
    neighbour: NDArray[np.uint32]  # (2, T) other tokens in the second row's first piece
    kept: NDArray[np.bool_]  # (2 * T,) all tokens but those of that piece


def check(store: Store, lm: LanguageModel, points: Sequence[HookPoint]) -> None:
    """Recompute one committed unit of the store, if there is any.

    Raises:
        StoreError: the recomputed unit has other bits than the stored one.
    """
    have = {point: store.committed(point) for point in points}
    some = np.flatnonzero(np.any(list(have.values()), axis=0)).tolist()
    kept = retention.read(store.place)  # others may be freed while this one is recomputed
    unit = next((unit for unit in some if kept.stays(unit)), None)
    if unit is not None:
        require_same(store, lm, unit, [point for point in points if have[point][unit]])


def choose_isolation(
    lm: LanguageModel, wanted: Sequence[Point], context: int, first: Isolation = "packed"
) -> Isolation:
    """How pieces stay apart in this model, found by trying: the fastest way whose rows are right.

    A way is right if every row of the hook points is that of its piece alone, and if other tokens
    in a neighbour change nothing. Both are judged in float32 (harvest/precise.py). The pieces are
    as long as the context allows, so that they cross the thresholds in the model's configuration:
    windows, chunks, the first length of `longrope`. Before that, sites inside a layer are proven
    (harvest/proof.py).

    Args:
        wanted: the hook points.
        context: T, tokens of a packed row.
        first: is tried first, e.g. as a store was begun.

    Raises:
        SettingError: no way is right, or a layer has no such site.
    """
    points = list(map(HookPoint.of, wanted))
    trial = trial_of(lm, context)
    former = lm.isolation
    lm.attend_by_(SDPA)
    reasons: list[str] = []
    try:
        with in_float32(lm.blocks), _progress(lm):
            prove(lm, points, torch.from_numpy(trial.tokens.astype(np.int64)))
            expected = _alone(lm, trial, points)
            for way in dict.fromkeys((first, *get_args(Isolation))):
                lm.isolation = way
                reason = _wrong(lm, trial, points, expected)
                if reason is None:
                    because = f" ({'; '.join(reasons)})" if reasons else ""
                    tell(f"isolation: pieces run {way}, each as if alone{because}")
                    return lm.isolation
                reasons.append(f"{way}: {reason}")
    finally:
        lm.isolation = former
    raise SettingError(
        f"{type(lm.decoder).__name__} gives a piece other rows than the piece alone "
        f"({'; '.join(reasons)}); take another model, or another version of transformers"
    )


@contextmanager
def _progress(lm: LanguageModel) -> Iterator[None]:
    """While open, say how far the self-check is, once it has taken 5 s."""
    progress = Progress(quiet_s=5.0)
    layers = 0

    def show(*_: object) -> None:
        nonlocal layers
        layers += 1
        progress.show(
            f"self-check: comparing pieces alone and in batches, {layers} layers computed"
        )

    handles = [block.register_forward_hook(show) for block in lm.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        progress.close()


def trial_of(lm: LanguageModel, context: int) -> Trial:
    """Random pieces behind BOS, of ordinary tokens: some families look at padding tokens."""
    rng = np.random.default_rng(0)
    shape = (2, context)
    tokens, neighbour = rng.choice(lm.ordinary_tokens, (2, *shape)).astype(np.uint32)
    starts = np.zeros(shape, np.bool_)
    starts[:, 0] = True
    first = min(_FIRST_TOKENS, context // 2)
    starts[1, first] = True
    kept = np.ones(shape, np.bool_)
    kept[1, :first] = False
    neighbour[kept] = tokens[kept]
    tokens[starts] = lm.tokenizer.bos
    neighbour[starts] = lm.tokenizer.bos
    return Trial(tokens, starts, neighbour, kept.ravel())


def _alone(
    lm: LanguageModel, trial: Trial, points: Sequence[HookPoint]
) -> dict[HookPoint, torch.Tensor]:
    """(2 * T, d) float32 rows a point, each piece run alone with nothing said beside its ids.

    The shortest piece comes first, and the longest in a harvest: a family that remembers the
    longest piece so far (dynamic NTK) then differs.

    Raises:
        SettingError: the decoder fails, or its layers give no residual stream.
    """
    rows = _empty(lm, trial, points)
    last = lm.n_layers - 1
    # What enters a layer is followed too where a site inside it, or its input, is wanted.
    layers = {point.layer for point in points}
    layers |= {p.layer - 1 for p in points if p.layer and p.site != RESID_POST}
    ends = max(layers) == last  # else the pass ends where the next layer is entered
    # No layer reads what the last one gives, so the one below it is followed in its place.
    followed = sorted({*layers, last - 1} if ends and last else layers)
    tapped = list(dict.fromkeys((*map(HookPoint, followed), *points)))
    for inputs in reversed(forward_inputs(trial.tokens, trial.starts, "alone")):
        here = upload(inputs, lm.config.device)
        with tap(lm, tapped, ends=ends) as taken, _entered(lm, followed) as read:
            _run_alone(lm, here.ids)
        for layer in followed:
            states = taken.get(HookPoint(layer))
            shape = None if states is None else tuple(states.shape)
            expected = (*here.ids.shape, lm.d_model)
            require_residuals(type(lm.decoder).__name__, layer, shape, expected)
            assert states is not None
            if layer in read and not same(read[layer].to(states.dtype), states):
                raise SettingError(
                    f"layer {layer + 1} of {type(lm.decoder).__name__} reads other states than "
                    f"layer {layer} gives; take another model"
                )
        for point in points:
            scatter(taken[point], here, rows[point])
    for point in points:
        if not bool(torch.isfinite(rows[point]).all(1).any()):
            raise SettingError(
                f"{point} of {type(lm.decoder).__name__} gives NaN or infinity in every row; "
                "take model.dtype=float32, or another model"
            )
    return rows


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN to NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _empty(
    lm: LanguageModel, trial: Trial, points: Sequence[HookPoint]
) -> dict[HookPoint, torch.Tensor]:
    """Memory for (2 * T, d) float32 a point."""
    shape = (trial.tokens.size, lm.d_model)
    return {point: torch.empty(shape, device=lm.config.device) for point in points}


@contextmanager
def _entered(lm: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """While open, each forward pass leaves what the layer behind each of `layers` reads.

    The pass ends where the layer behind the deepest one is entered. A module list may hold half a
    layer (XLM), whose output is not the residual stream.
    """
    read: dict[int, torch.Tensor] = {}

    def note(layer: int) -> Any:
        def on_input(_module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            values = [*inputs, *options.values()]
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            read[layer] = tensors[0].clone()  # a layer that changes it in place is found out
            if layer == max(layers):
                raise DeepestReached

        return on_input

    handles: list[Any] = []
    for layer in layers:
        if layer + 1 < lm.n_layers:
            hook = lm.blocks[layer + 1].register_forward_pre_hook
            # Before the hooks that give the layer float32 weights: it may have none.
            handles.append(hook(note(layer), with_kwargs=True, prepend=True))
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _run_alone(lm: LanguageModel, ids: torch.Tensor) -> None:
    """One piece (1, t), with transformers' defaults.

    A cache is among them: a family that gives other states without one must not pass. Some families
    cannot make a cache for few layers (Bamba), and run without one.

    Raises:
        SettingError: the decoder fails.
    """
    options: dict[str, Any] = {}
    while True:
        try:
            with torch.inference_mode(), suppress(DeepestReached):
                lm.decoder(input_ids=ids, **options)
            return
        except Exception as error:  # the family's own code may raise anything
            if options or is_out_of_memory(error):
                raise _fails(lm, error) from error
        options["use_cache"] = False


def _fails(lm: LanguageModel, error: Exception) -> PipelineError:
    """A decoder that cannot run one piece: the memory's fault, or the family's."""
    if is_out_of_memory(error):
        return SettingError(
            f"one piece does not fit in the memory of device={lm.config.device}; lower context="
        )
    return SettingError(
        f"{type(lm.decoder).__name__} cannot run a single piece of text "
        f"({type(error).__name__}: {first_line(error)}); take another model"
    )


def _wrong(
    lm: LanguageModel,
    trial: Trial,
    points: Sequence[HookPoint],
    expected: dict[HookPoint, torch.Tensor],
) -> str | None:
    """What is wrong with the rows as `lm.isolation` makes them; None: nothing."""
    try:
        rows = trial_rows(lm, trial, trial.tokens, points)
        beside_others = trial_rows(lm, trial, trial.neighbour, points)
    except Exception as error:  # the family's own code may raise anything
        if is_out_of_memory(error):
            raise _fails(lm, error) from error
        return f"{type(error).__name__}"
    kept = torch.from_numpy(trial.kept).to(lm.config.device)
    for point in points:
        moved = worst(beside_others[point][kept], rows[point][kept])
        if not moved <= SAME_ROW:
            return f"a neighbour changes a row of {point} by {moved:.2%}"
        off = worst(rows[point], expected[point])
        if not off <= SAME_ROW:
            return f"a row of {point} differs by {off:.2%}"
    return None


def trial_rows(
    lm: LanguageModel, trial: Trial, tokens: NDArray[np.uint32], points: Sequence[HookPoint]
) -> dict[HookPoint, torch.Tensor]:
    """(2 * T, d) float32 rows a point, as the harvest makes them, at the most padding."""
    passes = forward_inputs(tokens, trial.starts, lm.isolation, one_pass=True)
    return batch_residuals(lm, passes, points, _empty(lm, trial, points))


def worst(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of a row relative to its norm; both (n, d). NaN if a row holds it wrongly.

    Row by row: in a common sum, one attention sink at 1000 times the norm hides all others. Rows
    that must hold NaN or infinity are left out.
    """
    finite = torch.isfinite(expected).all(1)
    difference = (rows - expected).norm(dim=1)
    # A site's row may be zero, unlike the stream's.
    errors = torch.where(difference == 0, 0.0, difference / expected.norm(dim=1))
    return float(errors[finite].max()) if bool(finite.any()) else 0.0


def require_same(store: Store, lm: LanguageModel, unit: int, points: Sequence[HookPoint]) -> None:
    """Recompute one committed unit.

    Raises:
        StoreError: the store holds other bits.
    """
    for point in points:
        residuals = unit_residuals(store, lm, unit, [point], store.batch_of(point, unit))
        again = prepared(store, unit, residuals)[point]
        wrong = int((store.residuals(point, unit) != again.stored).any(1).sum())
        if wrong:
            raise StoreError(
                f"unit {unit} of {point} in {store.name} differs in {wrong} of "
                f"{len(again.stored)} rows when recomputed here; go on where the store was begun, "
                "or harvest into another store="
            )
