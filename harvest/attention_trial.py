"""The choice of a way to attend in packed rows: of those that are proven at the start, the fastest.

The proof goes layer by layer. Packed rows by SDPA were proven to be those of the pieces alone
(harvest/selfcheck.py). What each layer's attention gives in that pass is kept, in float32, of
queries, keys and values that are rounded to the run's type. Another way gets the same ones in the
run's type, and must give the same; the pass then goes on with what was kept, so that no layer
amplifies the rounding of another. Other tokens in a neighbour must change nothing.

The choice depends on a clock and on what is installed, and bits depend on it. So the store's
manifest records it: every later start and every other process takes what stands there.

Shapes: B rows, T context, d d_model; b, t, h, w as in harvest/attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from residual_saes.data import tuning
from residual_saes.data.errors import SettingError, StoreError, first_line
from residual_saes.data.journal import heartbeat, tell
from residual_saes.harvest.attention import (
    SDPA,
    Attention,
    Call,
    by_sdpa,
    installed,
    version_here,
)
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.forward import batch_residuals
from residual_saes.harvest.isolation import attention_mask, forward_inputs
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.precise import in_float32
from residual_saes.harvest.selfcheck import SAME_ROW, Trial, same, trial_of, trial_rows, worst

# Tokens below which `auto` stays with SDPA: compiling FlexAttention takes longer than it saves.
WORTH_TRYING = 2**24
_SECONDS = 3.0  # of timing, after each way was compiled
_PIECE = 512  # tokens of a piece in the batch that is timed, on average


def settle_attention_(
    lm: LanguageModel, config: HarvestConfig, begun: Mapping[str, Any] | None
) -> None:
    """Give the model its way to attend: the store's, the one that is asked for, or the fastest.

    Args:
        begun: manifest of the store; None: there is none.

    Raises:
        SettingError: a way is asked for that is not right here.
        StoreError: the store's way is not right here.
    """
    if begun is not None:
        recorded = Attention.of(begun.get("attention"))
        if config.attention in ("auto", recorded.kind):
            _take_again_(lm, config, recorded)
            return
    asked = config.attention
    is_tried = _on_gpu(lm) and config.tokens >= WORTH_TRYING
    if asked == "sdpa" or (asked == "auto" and not is_tried):
        return

    # Prove each way that is here.
    here = [Attention(name, (), version_here(name)) for name in (*installed(), "flex")]
    ways: dict[str, Attention] = {}
    if reason := _only_sdpa(lm):
        left_out = {"all but sdpa": reason}
    else:
        tried = [way for way in here if asked in ("auto", way.kind)]
        with heartbeat("trying ways to attend in packed rows"):
            ways, left_out = proven(lm, config, tried)
    if asked != "auto" and not ways:
        reasons = "; ".join(left_out.values()) or "no FlashAttention that runs here is installed"
        raise SettingError(f"attention={asked} cannot be had: {reasons}; take attention=auto")
    for name, reason in left_out.items():
        tell(f"attention: left out is {name}: {reason}")
    if ways:
        _take_fastest_(lm, config, {"sdpa": SDPA, **ways} if asked == "auto" else ways)


def _on_gpu(lm: LanguageModel) -> bool:
    return lm.config.device.startswith("cuda")


def _take_again_(lm: LanguageModel, config: HarvestConfig, recorded: Attention) -> None:
    """Take the way that a store was begun with, once it is proven here too."""
    if recorded == SDPA:
        return
    reason = _only_sdpa(lm)
    if reason is None:
        reason = proven(lm, config, [recorded])[1].get(recorded.way)
    if reason is not None:
        raise StoreError(
            f"{config.store} was begun with attention={recorded.way}, which is not right here "
            f"({reason}); go on where it was begun, or harvest into another store="
        )
    lm.attend_by_(recorded)
    tell(f"attention: {recorded.way}, as the store was begun")


def _only_sdpa(lm: LanguageModel) -> str | None:
    """Why no other way comes into question; None: others do."""
    config: Any = lm.decoder.config
    family = type(lm.decoder).__name__
    if lm.isolation != "packed":
        return f"pieces run {lm.isolation}"
    if config._attn_implementation != "sdpa":
        has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
        what = "a softcap" if has_softcap else "its own attention, such as sinks"
        return f"{family} has {what}"
    if attention_mask(config, torch.zeros(1, 1, dtype=torch.int64)) is None:
        return f"{family} has layers that are neither full nor sliding attention"
    return None


# -- the proof -------------------------------------------------------------------------------------


def proven(
    lm: LanguageModel, config: HarvestConfig, ways: Sequence[Attention]
) -> tuple[dict[str, Attention], dict[str, str]]:
    """The right ways with the head widths that they take, and why the others are left out.

    Args:
        ways: one with widths must take each of these that comes, e.g. as a store records them; one
            without takes those that it can.
    """
    right: dict[str, Attention] = {}
    left_out: dict[str, str] = {}
    trial = trial_of(lm, config.context)
    former = lm.attention
    dtype: torch.dtype = getattr(torch, lm.config.dtype)
    reference = _Reference(dtype)
    try:
        with in_float32(lm.blocks):
            lm.attend_by_(reference)
            try:
                trial_rows(lm, trial, trial.tokens, config.points)
                if not reference.kept:
                    raise TypeError("its code calls no attention that can be exchanged")
            except Exception as error:  # of `_attend`, the family's code, or an allocator
                return {}, dict.fromkeys((way.way for way in ways), first_line(error))
            for way in ways:
                found = _widths(lm, config, trial, way, reference)
                if isinstance(found, str):
                    left_out[way.way] = found
                else:
                    right[way.way] = replace(way, widths=found)
    finally:
        lm.attend_by_(former)
    return right, left_out


def _widths(
    lm: LanguageModel, config: HarvestConfig, trial: Trial, way: Attention, reference: _Reference
) -> tuple[int, ...] | str:
    """The head widths that a way takes, or why it is left out."""
    of_trial = torch.from_numpy(trial.kept).to(lm.config.device)
    compared = _Compared(way, reference, torch.ones_like(of_trial))
    for tokens, kept in ((trial.tokens, compared.rows), (trial.neighbour, of_trial)):
        compared.rows = kept
        compared.calls = 0
        lm.attend_by_(compared)
        trial_rows(lm, trial, tokens, config.points)
    widths = way.widths or tuple(sorted(compared.widths - compared.failed.keys()))
    failed = next(iter(compared.failed.values()), "")
    # Fewer layers than the store's first ones may lack some of its widths.
    return compared.wrong or (failed if way.widths or not widths else "") or widths


class _Reference:
    """Attends by SDPA, and keeps what it gives."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of the run
        self.kept: list[torch.Tensor] = []  # (b, t, h, w) a layer

    def attend(self, call: Call) -> torch.Tensor:
        out = by_sdpa(call.rounded(self.dtype).rounded(call.query.dtype))
        self.kept.append(out)
        return out


class _Compared:
    """Attends by a way, compares, and gives what the reference gave."""

    def __init__(self, way: Attention, reference: _Reference, rows: torch.Tensor) -> None:
        self.rows = rows  # (b*t,) bool: those that count
        self.calls = 0
        self.widths: set[int] = set()  # that came
        self.failed: dict[int, str] = {}  # widths that it does not take: why
        self.wrong = ""
        self._way = way
        self._reference = reference
        # Sums of values with weights, each rounded once or twice: 2^-6 in bfloat16. A key too many
        # among 512 gives 2^-5.
        self._most = max(SAME_ROW, 2 * torch.finfo(reference.dtype).eps)

    def attend(self, call: Call) -> torch.Tensor:
        expected = self._reference.kept[self.calls]
        self.calls += 1
        width = call.query.shape[-1]
        if width in self.failed or (self._way.widths and width not in self._way.widths):
            return expected
        self.widths.add(width)
        asked = call.rounded(self._reference.dtype)
        try:
            out = replace(self._way, widths=(width,)).attend(asked).to(expected.dtype)
        except Exception as error:  # a kernel that is not made for this card may raise anything
            name = type(error).__name__
            self.failed[width] = f"at head width {width} {name}: {first_line(error)}"[:200]
            return expected
        rows, right = (x.flatten(0, 1).flatten(1)[self.rows] for x in (out, expected))
        off = worst(rows, right)  # (n, h * w) each
        if not off <= self._most and not self.wrong:
            self.wrong = f"a row of the attention of layer {self.calls - 1} differs by {off:.2%}"
        return expected


# -- the choice ------------------------------------------------------------------------------------


def _take_fastest_(lm: LanguageModel, config: HarvestConfig, ways: Mapping[str, Attention]) -> None:
    """Time the ways on a batch of the harvest's shape, and take the fastest."""
    shape = (config.batch, config.context)
    rng = np.random.default_rng(0)
    tokens = rng.choice(lm.ordinary_tokens, shape).astype(np.uint32)
    starts = rng.random(shape) < 1 / _PIECE
    starts[:, 0] = True
    tokens[starts] = lm.tokenizer.bos
    passes = forward_inputs(tokens, starts, "packed")
    points = [max(config.points)]

    def runs(way: Attention) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            lm.attend_by_(way)
            return batch_residuals(lm, passes, points)[points[0]]

        return run

    def fault(rows: torch.Tensor) -> str | None:
        again = batch_residuals(lm, passes, points)[points[0]]  # by the way that was just run
        return None if same(rows, again) else "a second run gives other bits"

    what = f"attention in {config.batch} rows of {config.context:,} tokens"
    candidates = {name: runs(way) for name, way in ways.items()}
    with heartbeat("timing ways to attend in packed rows"):
        choice = tuning.choose(what, candidates, fault, seconds=_SECONDS, device=lm.config.device)
    lm.attend_by_(ways[choice.chosen])
    tell(*choice.table())
