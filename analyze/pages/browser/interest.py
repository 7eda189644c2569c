"""How much there is to see in a latent: a number from 0 to 1 by which the list is sorted at first.

    interest = frequency * (agreement + peakedness) / 2

frequency   1 for a latent that fires in FEW rows or more, and no more often than the average one;
            less below FEW in proportion, less above the average by the square root of the ratio.
agreement   among its strongest contexts the share with the commonest token at the peak, before it
            or behind it, whichever is largest. Tokens are compared without case and outer spaces.
peakedness  how far its largest logit stands out of the vocabulary's: z / sqrt(2 ln V) - 1, held
            between 0 and 1. z is in standard deviations; sqrt(2 ln V) is where the largest of V
            independent normal logits would be. Without logits the agreement counts alone.

It ranks what is easy to read, not what is right: `study=stability` and others test latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log, sqrt

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from residual_saes.analyze.pages.browser.contexts import Contexts, contexts_of
from residual_saes.analyze.pages.browser.pages import Name
from residual_saes.analyze.pages.browser.spread import Spread

FEW = 20  # rows
_CONTEXTS = 5  # with fewer, agreement is taken as of so many


def scores(
    block: pa.Table, name: Name, average: float, spreads: Sequence[Spread | None]
) -> NDArray[np.float64]:
    """The interest of a block's latents, (n,); NaN for one that never fires.

    Args:
        average: rows in which the average latent fires.
        spreads: of each port that the latents write to.
    """
    count = block.column("count").to_numpy().astype(np.float64)
    top = contexts_of(block, "top")
    agreement = np.array([_agreement(top, row, name) for row in range(block.num_rows)])
    peakedness = _peakedness(block, spreads)
    seen = np.where(np.isnan(peakedness), agreement, (agreement + peakedness) / 2)
    rare = np.minimum(count / FEW, 1)
    often = np.sqrt(np.minimum(average / np.maximum(count, 1), 1))
    return np.where(count > 0, rare * often * seen, np.nan)


def _agreement(top: Contexts, row: int, name: Name) -> float:
    """From 0 (no two contexts agree) to 1 (all do)."""
    contexts = top.of(row)
    commonest = 0
    for offset in (-1, 0, 1):
        tokens = []
        for context in contexts:
            span = top.span(context)
            at = span.start + int(top.columns["peak"][context]) + offset
            if span.start <= at < span.stop:
                tokens.append(str(name(int(top.tokens[at]))).strip().lower())
        commonest = max([commonest, *Counter(tokens).values()])
    return max(commonest - 1, 0) / (max(len(contexts), _CONTEXTS) - 1)


def _peakedness(block: pa.Table, spreads: Sequence[Spread | None]) -> NDArray[np.float64]:
    """(n,) from 0 to 1, of the port at which it is largest; NaN without logits."""
    first = int(block.column("feature")[0].as_py())
    best = np.full(block.num_rows, np.nan)
    for port, spread in enumerate(spreads):
        if spread is None:
            continue
        rows = slice(first, first + block.num_rows)
        z = (_largest(block, port) - spread.mean[rows]) / np.maximum(spread.std[rows], 1e-30)
        chance = sqrt(2 * log(max(spread.vocabulary, 2)))
        best = np.fmax(best, np.clip(z / chance - 1, 0, 1))
    return best


def _largest(block: pa.Table, port: int) -> NDArray[np.float64]:
    """(n,) each latent's largest logit at a port; NaN where there is none."""
    if "targets" in block.column_names:
        lists = [targets[port]["raised"] for targets in block.column("targets").to_pylist()]
    else:
        lists = block.column("raised").to_pylist()
    return np.array([logits[0]["logit"] if logits else np.nan for logits in lists], np.float64)
