"""An SAE that is there, made right for other rows: the size of its input, and b_dec.

Rows of another layer, model or text are taken for the SAE's own rows times a factor a for each hook
point, about another mean:

    y_hat'(x) = a y_hat(x / a)          b_enc, b_dec and thresholds are a times as large
    b_dec    += mean(y - y_hat')        again while the error falls

a is the factor of the least error on the first rows. b_dec moves from where it is, or from the
rows' mean, whichever ends better: without moves the mean is worse, even on the SAE's own rows, for
b_enc belongs to b_dec (docs/training.md). What fits as it is stays as it is.

Shapes: n rows, d = d_model, F = d_sae.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from residual_saes.train.columns import Columns
from residual_saes.train.kernels import Kept
from residual_saes.train.objective import Objective
from residual_saes.train.sae import SAE, Scales

ROWS = 4096  # first rows of the stream, by which all is measured
_FEW_ROWS = 1024  # of them, on which factors are tried
_COARSE = range(-8, 9, 2)  # powers of 2 that are tried as factors, ...
_STEPS = (1.0, 0.5, 0.25, 0.125)  # ... and from the best one on, those beside it
_STEPS_OF_EACH = (4.0, 2.0, *_STEPS)  # of each hook point's own, where there are several
_MOVES = 8  # of b_dec, at most
_LEAST_GAIN = 1e-3  # of a move, of the unexplained variance: the moves end there
_GAIN = 0.1  # of the unexplained variance: what gains less is left as it is
_NEAR_K = 1.5  # thresholds that keep k latents a row, within this factor, are kept
_EVEN = 1.001  # decoder norms within this factor are taken for equal

Select = Callable[[SAE, Tensor], Kept]  # the latents that are kept of rows (n, d)
Octaves = tuple[float, ...]  # of each hook point: the power of 2 that is its factor


class Refit(NamedTuple):
    """A start that is ready to be trained."""

    sae: SAE  # on scaled rows; without thresholds, the first rows set them where there are some
    as_is: SAE  # the file's function, on scaled rows
    told: str  # what was done


def refit(start: SAE, columns: Columns, first: Tensor, objective: Objective) -> Refit:
    """Make an SAE on raw rows right for other rows and another activation.

    Decoder rows get norm 1, and latents take the norms over. With thresholds that is the same
    function. TopK then keeps by activation times norm, as it will in training.

    Args:
        first: (n, c) the stream's first rows, scaled.
    """
    raw = replace(columns, scales={port: 1 / scale for port, scale in columns.scales.items()})
    as_is = start.folded(raw.folding())
    k = objective.config.k
    own = replace(as_is.unit_decoder(), k=k)
    free = replace(own, threshold=None)
    rows = _Rows.of(columns, first)
    keeps = own.threshold is not None and objective.thresholds != "none"
    if keeps and objective.thresholds == "followed":
        l0 = float((own.encode(rows.x).values > 0).sum()) / len(first)
        keeps = k / _NEAR_K <= l0 <= k * _NEAR_K
    unmoved = _Fitted(own, rows, SAE.encode) if keeps else _Fitted(free, rows, objective.kept_by_k)
    if keeps and objective.thresholds == "learned":
        search = _Search(own, columns, rows, SAE.encode)
    else:
        search = _Search(free, columns, rows, objective.kept_by_k)
    found, octaves = search.found()
    if found.unexplained < (1 - _GAIN) * unmoved.unexplained:
        sae = found.sae
        factors = ", ".join(f"{2**octave:.3g}" for octave in octaves)
        done = [f"its input is scaled by {factors}, and b_dec is moved"]
    else:
        sae = unmoved.sae
        done = ["it fits these rows as it is"]
    if sae.threshold is not None:
        done.append("its thresholds stay")
    elif objective.thresholds != "none":
        done.append(f"thresholds keep k={k} of the first rows")
    elif own.threshold is not None:
        done.append(f"its thresholds are dropped, and k={k} latents a row are kept")
    return Refit(sae, as_is, "; ".join([*done, *_about_norms(as_is)]))


def _about_norms(sae: SAE) -> Iterator[str]:
    """What is to be said of decoder norms that differ, in TopK."""
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    least, most = float(norms.amin()), float(norms.amax())
    if sae.threshold is None and most > _EVEN * least:
        yield (
            f"its decoder norms differ by a factor of {most / least:.3g}, so latents are kept by "
            "activation times norm"
        )


@dataclass(frozen=True)
class _Rows:
    """The first rows, scaled."""

    x: Tensor  # (n, d) what is read
    y: Tensor  # (n, d_out) what is written
    mean: Tensor  # (d_out,) of all training rows

    @classmethod
    def of(cls, columns: Columns, first: Tensor) -> _Rows:
        x, y = columns.split(first)
        return cls(x, y, columns.split(columns.mean)[1])

    @property
    def squares(self) -> float:
        """Sum of (y - mean)^2."""
        return float((self.y.double() - self.mean).square().sum())

    def first(self, count: int) -> _Rows:
        return _Rows(self.x[:count], self.y[:count], self.mean)


class _Fitted:
    """An SAE and its share of unexplained variance on the first rows."""

    def __init__(self, sae: SAE, rows: _Rows, select: Select) -> None:
        self.sae = sae
        self.rows = rows
        self.select = select
        error = rows.y - sae.reconstruct(rows.x, select(sae, rows.x))
        self.move = error.mean(0)  # (d_out,)
        share = float(error.double().square().sum()) / rows.squares if rows.squares else math.nan
        self.unexplained = share if math.isfinite(share) else math.inf

    def centred(self) -> _Fitted:
        """With b_dec moved by the mean error while that helps; by less where it does not."""
        best, length = self, 1.0
        for _ in range(_MOVES):
            b_dec = best.sae.b_dec + length * best.move
            moved = _Fitted(replace(best.sae, b_dec=b_dec), self.rows, self.select)
            gained = 1 - moved.unexplained / best.unexplained if best.unexplained else 0.0
            if gained > 0:
                best = moved
            else:
                length /= 2
            if 0 <= gained < _LEAST_GAIN:
                break
        return best


class _Search:
    """Factors of the hook points, from an SAE and its way to keep latents."""

    def __init__(self, sae: SAE, columns: Columns, rows: _Rows, select: Select) -> None:
        self._sae = sae
        self._columns = columns
        self._rows = rows
        self._few = rows.first(_FEW_ROWS)
        self._select = select
        self._ports = columns.ports.every
        self._means = columns.split(columns.mean.float())
        self._tried: dict[tuple[Octaves, int], float] = {}

    def found(self) -> tuple[_Fitted, Octaves]:
        """The best SAE, and its factors as powers of 2.

        One factor for all hook points is sought first, then of a crosscoder one for each. How large
        a transcoder's output is follows from its input.
        """
        alike = [(float(octave),) * len(self._ports) for octave in _COARSE]
        begins = range(2 if self._sae.b_in is None else 4)
        best = min(product(alike, begins), key=self._unexplained)
        together = [(1.0,) * len(self._ports)]
        each = [tuple(float(port == own) for port in self._ports) for own in self._ports]
        rounds = list(product(_STEPS, together))
        several = len(each) > 1 and self._sae.b_in is None
        if several:
            rounds += product(_STEPS_OF_EACH, each)
        for step, direction in rounds:
            octaves, begin = best
            near = []
            for length in (0.0, -step, step):
                moves = zip(octaves, direction, strict=True)
                near.append(tuple(octave + length * along for octave, along in moves))
            again = begins if several else [begin]
            best = min(product(near, again), key=self._unexplained)
        return self._begun(*best, self._rows).centred(), best[0]

    def _unexplained(self, candidate: tuple[Octaves, int]) -> float:
        if candidate not in self._tried:
            self._tried[candidate] = self._begun(*candidate, self._few).centred().unexplained
        return self._tried[candidate]

    def _begun(self, octaves: Octaves, begin: int, rows: _Rows) -> _Fitted:
        """The SAE for rows 2^octaves times its own.

        Args:
            begin: where b_dec is moved from: 0 as it is, 1 the rows' mean; with 2 more, b_in is the
                mean of what is read.
        """
        inverse = dict(zip(self._ports, (2**-octave for octave in octaves), strict=True))
        folding = replace(self._columns, scales=inverse).folding()
        sae = self._sae.folded(folding).unit_decoder()
        b_in, b_dec = self._means
        if begin % 2:
            sae = replace(sae, b_dec=b_dec)
        if begin >= 2:
            sae = replace(sae, b_in=b_in)
        if sae.b_in is not None:
            sae = _as_large(sae, rows, self._select)
        return _Fitted(sae, rows, self._select)


def _as_large(sae: SAE, rows: _Rows, select: Select) -> SAE:
    """A transcoder that writes rows as large as they are: <y, y_hat> / |y_hat|^2 times its own."""
    written = sae.reconstruct(rows.x, select(sae, rows.x)) - sae.b_dec
    written = written - written.mean(0)
    factor = float((written * (rows.y - rows.y.mean(0))).sum() / written.square().sum())
    if not (math.isfinite(factor) and factor > 0):
        return sae
    scaled = sae.folded(Scales(1.0, 1 / factor)).unit_decoder()
    return replace(scaled, b_dec=sae.b_dec)
