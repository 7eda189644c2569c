"""The rule for sizes that no setting gives: from the rows' width and their number.

    k      the power of two nearest to 2 sqrt(width): 16 at 64, 32 at 384, 128 at 2,560
    d_sae  the largest power of two that is at most 16 widths, and so small that a latent fires
           1,000 times in the run: 32,768 at width 2,560 and 1e9 rows
    k_aux  4 k
    batch  the largest power of two of which the run has 500 steps, at most 4,096

What each was measured at: docs/method.md. The learning rate's rule is `train.optim.resolved`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from residual_saes.data.settings import optional_whole
from residual_saes.train.optim import OptimConfig, resolved

SIZES = ("d_sae", "k", "k_aux")
_LATENTS = 16  # per column of a row, at most
_FIRINGS = 1_000  # of a latent in the run: with fewer it has learned little
_FEW_FIRINGS = 30  # by the user's own sizes: then training warns
_STEPS = 500  # BatchTopK's threshold is a mean over 100 batches, and lags in shorter runs
_MOST_ROWS = 4_096  # of a batch
_LEAST_ROWS = 64
_FAR = 5  # times the rule's learning rate, above or below: then training warns


def filled(
    sae: Mapping[str, Any], batch: int | None, width: int, rows: Callable[[], int]
) -> tuple[dict[str, Any], int, str]:
    """Settings of a dictionary with a value for each of `SIZES` that is None; the batch; and what
    was chosen, as a line.

    Args:
        batch: rows per optimizer step; None: by the rule, or 4,096 where no size is None.
        width: columns of the widest hook point.
        rows: counts the training rows of the run; called if a size is None.
    """
    values = dict(sae)
    if all(values[name] is not None for name in SIZES):
        return values, _MOST_ROWS if batch is None else batch, ""
    count = rows()
    if values["k"] is None:
        values["k"] = 2 ** max(1, round(math.log2(2 * math.sqrt(width))))
        if values["d_sae"] is not None:
            values["k"] = min(values["k"], max(1, values["d_sae"] // 4))
    if values["d_sae"] is None:
        most = min(_LATENTS * width, count * values["k"] // _FIRINGS)
        values["d_sae"] = max(_floor(most), 4 * _floor(2 * values["k"] - 1))
    if values["k_aux"] is None:
        values["k_aux"] = min(4 * values["k"], values["d_sae"])
    chosen = {f"sae.{name}": values[name] for name in SIZES if sae[name] is None}
    if batch is None:
        batch = min(_MOST_ROWS, max(_LEAST_ROWS, _floor(count // _STEPS)))
        chosen["batch"] = batch
    listed = " ".join(f"{name}={value}" for name, value in chosen.items())
    line = f"{listed}: for {count:,} rows of width {width:,} (docs/training.md)"
    firings = count * values["k"] // values["d_sae"]
    if sae["d_sae"] is None and firings < _FIRINGS:  # no dictionary is small enough
        line += f"; few rows: a latent fires {firings:,} times in the run, and the rule asks for "
        line += f"{_FIRINGS:,}; harvest more text"
    return values, batch, line


def provisional(sae: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that can be checked before the rows are known, whatever sizes the rule will give.

    Raises:
        SettingError: a size is no whole number.
    """
    sizes = {name: optional_whole(f"sae.{name}", sae[name]) for name in SIZES}
    k = sizes["k"] or 1
    chosen = {"k": k, "k_aux": sizes["k_aux"] or 1, "d_sae": sizes["d_sae"] or _LATENTS * k}
    return {**sae, **chosen}


def _floor(number: int) -> int:
    """The largest power of two that is at most `number`, and 1 below 1."""
    return 1 << max(0, number.bit_length() - 1)


# -- warnings --------------------------------------------------------------------------------------


def rate_warning(lr: float, d_sae: int, steps: int) -> str | None:
    """What is to be said of a learning rate that is far from the rule; None: it is near."""
    rule = float(resolved(OptimConfig(lr="auto", lr_floor=0.0), d_sae, steps).lr)
    if rule / _FAR <= lr <= rule * _FAR:
        return None
    return (
        f"optim.lr={lr:.3g} is far from {rule:.2g}, the rule for {d_sae:,} latents and "
        f"{steps:,} steps; optim.lr={rule:.2g} follows it"
    )


def size_warning(d_sae: int, k: int, rows: int) -> str | None:
    """What is to be said of a dictionary that is too large for its rows; None: it is not."""
    firings = rows * k / d_sae
    if firings >= _FEW_FIRINGS:
        return None
    return (
        f"sae.d_sae={d_sae:,} is too large for {rows:,} training rows: with sae.k={k} a latent "
        f"fires {firings:.1f} times in the run; take a smaller sae.d_sae=, or harvest more tokens="
    )


def negative_warning(records: Iterable[Mapping[str, Any]], warmup: int) -> str | None:
    """What is to be said of the first record after warm-up that explains less than nothing.

    Args:
        records: lines of metrics.jsonl, in their order.
        warmup: optimizer steps. None if there is no such record.
    """
    for record in records:
        explained = record.get("variance_explained")
        if record["step"] > warmup and explained is not None and explained < 0:
            of = "held-out rows" if record["split"] == "held_out" else "the batch"
            return (
                f"variance explained is {explained:.3g} at step {record['step']:,}, on {of}: the "
                "SAE is worse than the rows' mean. Start another run= without sae= and optim=, "
                "whose sizes and rate follow from the rows"
            )
    return None
