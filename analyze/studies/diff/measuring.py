"""Two passes over held-out rows: where classes of latents fire, and what they explain of targets.

Latent scaling (Minder et al., arXiv 2504.02922, section 3): with f a latent's activations, u its
direction in the target that it is said to be own of, and z rows of target m, the least-squares

    beta_m = sum f (z . u) / sum f^2 |u|^2

says how much of u is in z where the latent fires. z, in scaled rows, is once m's error, with what
the latent itself adds to m put back, and once m's reconstruction, without b_dec. Over the beta of
the own target,

    nu_error            near 1: the other target has the direction, and the crosscoder leaves it in
                        the error ("complete shrinkage")
    nu_reconstruction   near 1: other latents write it to the other target ("latent decoupling")

and both near 0: it is the own target's indeed. Of several other targets the largest |nu| counts.

Shapes: n rows, F latents, T targets, C classes, D documents, q places: a latent in a document.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze.latents.encoding import Unit, taken
from residual_saes.analyze.stats import Floats
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import StopRequest, StoreError
from residual_saes.data.journal import Progress
from residual_saes.train import kernels
from residual_saes.train.kernels import Kept

NU_ERROR = 0.2  # a latent survives below both
NU_RECONSTRUCTION = 0.5
_ROWS = 4096  # decoded at a time


class Fired(NamedTuple):
    """What the first pass finds."""

    rows: int
    fires: NDArray[np.int64]  # (F,) rows in which each latent fires
    total: Floats  # (F,) sum of its activations


class Explained(NamedTuple):
    """Sums over the rows of each document."""

    rows: Floats  # (D,)
    fires: Floats  # (D, C) latents of each class that fire
    about_mean: Floats  # (D, T) |y - mu|^2
    error: Floats  # (D, T) |y - y_hat|^2
    without: Floats  # (D, C, T) the same where a class adds its mean alone


class Scaling(NamedTuple):
    """Sums of f (z . u) over the rows of a place, with z of each target."""

    latent: NDArray[np.int64]  # (q,)
    document: NDArray[np.int64]  # (q,) number from 0 on
    rows: Floats  # (q, T) z = y - b_dec
    reconstruction: Floats  # (q, T) z = y_hat - b_dec
    itself: Floats  # (q, T) z what the latent adds to y_hat

    @property
    def error(self) -> Floats:
        """(q, T) z the error, with what the latent adds put back."""
        return self.rows - self.reconstruction + self.itself


def fired(subject: Subject, limit: int, stop: StopRequest) -> Fired:
    """The first pass.

    Raises:
        StoreError: no row passes the run's policy.
    """
    features = subject.sae.d_sae
    rows = 0
    count = np.zeros(features, np.int64)
    total = np.zeros(features)
    for firings in subject.firings(limit):
        stop.check()
        rows += len(firings.rows)
        count += np.bincount(firings.latent, minlength=features)
        total += np.bincount(firings.latent, firings.value, minlength=features)
    if not rows:
        raise StoreError(f"no held-out row of {subject.store.name} passes the run's policy")
    return Fired(rows, count, total)


class Measuring:
    """The second pass."""

    def __init__(self, subject: Subject, classes: NDArray[np.int64], fired: Fired) -> None:
        """Prepare.

        Args:
            classes: (F,) of each latent; below T that of a target's own.
        """
        self._subject = subject
        self._columns = [subject.columns(port) for port in subject.ports.writes]
        self._classes = torch.from_numpy(classes).to(subject.device)
        # All is in scaled rows: a target whose rows are longer has no more of a direction.
        W_dec = self._W_dec = subject.scaled(subject.sae.W_dec)
        mean = torch.from_numpy(fired.total / fired.rows).to(W_dec)
        self._count = len(self._columns) + 2
        self._means = [mean * (self._classes == c) @ W_dec for c in range(self._count)]
        widths = {part.stop - part.start for part in self._columns}
        # Directions of different widths have no product: then nothing is scaled.
        self._own = torch.zeros(len(W_dec), widths.pop() if len(widths) == 1 else 0).to(W_dec)
        if self._own.shape[1]:
            for target, part in enumerate(self._columns):
                mine = self._classes == target
                self._own[mine] = W_dec[mine, part]
        self._documents: list[tuple[NDArray[np.int64], Floats]] = []
        self._places: list[tuple[NDArray[np.int64], Floats]] = []

    @torch.inference_mode()
    def run(self, limit: int, stop: StopRequest) -> tuple[Explained, Scaling | None]:
        """The sums of all rows; None: the targets have different widths."""
        progress = Progress()
        for unit in self._subject.rows(limit):
            rows = self._subject.text_rows(unit)
            for start in range(0, len(rows), _ROWS):
                stop.check()
                self._add(unit, rows[start : start + _ROWS])
            progress.show(f"unit {unit.number}: {len(rows):,} rows explained")
        return self._explained(), self._scaling()

    def _add(self, unit: Unit, rows: NDArray[np.int64]) -> None:
        subject = self._subject
        chosen = torch.from_numpy(rows).to(subject.device)
        kept = taken(subject.encoded(unit), chosen)
        y = unit.targets[chosen]
        decoded = kernels.decode(kept, self._W_dec)
        centred = subject.scaled(y - subject.sae.b_dec)
        error = centred - decoded
        class_of = self._classes[kept.indices]
        columns = [torch.ones(len(rows), 1, dtype=torch.float64, device=y.device)]
        without = []
        for number, mean in enumerate(self._means):
            part = kept._replace(values=kept.values * (class_of == number))
            columns.append(part.active().double()[:, None])
            without.append(self._squares(error + kernels.decode(part, self._W_dec) - mean))
        about_mean = subject.scaled(y.double() - subject.mean)
        columns += [self._squares(about_mean), self._squares(error)]
        document = unit.document[rows].astype(np.int64)
        sums = torch.cat([*columns, *without], dim=1).cpu().numpy()
        self._documents.append(_sums_by(document, sums))
        if self._own.shape[1]:
            self._scale(kept, centred, decoded, document)

    def _squares(self, rows: Tensor) -> Tensor:
        """(n, T) squared norm in each target's columns."""
        squares = [rows[:, part].double().square().sum(1) for part in self._columns]
        return torch.stack(squares, dim=1)

    def _scale(
        self, kept: Kept, centred: Tensor, decoded: Tensor, document: NDArray[np.int64]
    ) -> None:
        own = (self._classes < len(self._columns))[kept.indices] & (kept.values > 0)
        rows = kept.rows[own]
        starts = kernels.starts_of(rows, len(centred))
        pairs = Kept(kept.values[own], kept.indices[own], rows, starts)
        f = pairs.values.double()
        of_rows, of_reconstruction, of_itself = [], [], []
        for part in self._columns:
            present = kernels.values_gradient(centred[:, part].contiguous(), pairs, self._own)
            written = kernels.values_gradient(decoded[:, part].contiguous(), pairs, self._own)
            added = (self._W_dec[:, part] * self._own).sum(1)[pairs.indices]
            of_rows.append(f * present)
            of_reconstruction.append(f * written)
            of_itself.append(f * f * added)
        sums = torch.stack([*of_rows, *of_reconstruction, *of_itself], dim=1).cpu().numpy()
        features = len(self._own)
        place = document[rows.cpu().numpy()] * features + pairs.indices.cpu().numpy()
        self._places.append(_sums_by(place, sums))

    def _explained(self) -> Explained:
        _, sums = _joined(self._documents)
        targets = len(self._columns)
        ends = np.cumsum([1, self._count, targets, targets])
        rows, fires, about_mean, error, without = np.split(sums, ends, axis=1)
        shape = (len(sums), self._count, targets)
        return Explained(rows[:, 0], fires, about_mean, error, without.reshape(shape))

    def _scaling(self) -> Scaling | None:
        if not self._own.shape[1]:
            return None
        place, sums = _joined(self._places)
        document, latent = np.divmod(place, len(self._own))
        _, number = np.unique(document, return_inverse=True)
        return Scaling(latent, number, *np.hsplit(sums, 3))


def _sums_by(group: NDArray[np.int64], values: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The groups that occur, and the rows of `values` (n, columns) summed by group (n,)."""
    groups, dense = np.unique(group, return_inverse=True)
    sums = np.zeros((len(groups), values.shape[1]))
    for column in range(values.shape[1]):
        sums[:, column] = np.bincount(dense, values[:, column], minlength=len(groups))
    return groups, sums


def _joined(parts: list[tuple[NDArray[np.int64], Floats]]) -> tuple[NDArray[np.int64], Floats]:
    groups, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _sums_by(groups, values)


# -- latent scaling --------------------------------------------------------------------------------


class Nu(NamedTuple):
    """Latent scaling of each latent; NaN of what is no target's own, or adds nothing to it."""

    error: Floats  # (F,)
    reconstruction: Floats  # (F,)

    @property
    def survives(self) -> NDArray[np.bool_]:
        """(F,) whether it is the own latent of its target indeed."""
        return (np.abs(self.error) < NU_ERROR) & (np.abs(self.reconstruction) < NU_RECONSTRUCTION)


def nu(scaling: Scaling, classes: NDArray[np.int64]) -> Nu:
    """The ratios of each latent, by the sums over all documents.

    Args:
        classes: (F,) as `Measuring` has them.
    """
    return Nu(
        _ratio(scaling.latent, scaling.error, classes),
        _ratio(scaling.latent, scaling.reconstruction, classes),
    )


def _ratio(latent: NDArray[np.int64], sums: Floats, classes: NDArray[np.int64]) -> Floats:
    """(F,) the other targets' sum of largest size over that of the own target."""
    targets = sums.shape[1]
    total = np.zeros((len(classes), targets))
    for target in range(targets):
        total[:, target] = np.bincount(latent, sums[:, target], minlength=len(classes))
    is_own = classes < targets
    every = np.arange(len(classes))
    mine = np.where(is_own, classes, 0)
    own = total[every, mine]
    total[every, mine] = 0
    strongest = total[every, np.abs(total).argmax(1)]
    known = is_own & (own > 0)
    ratio: Floats = np.divide(strongest, own, out=np.full(len(classes), np.nan), where=known)
    return ratio


def permuted(
    scaling: Scaling, classes: NDArray[np.int64], draws: int, seed: int, stop: StopRequest
) -> NDArray[np.int64]:
    """(draws, T) own latents of each target that survive where targets change places at random.

    Whose rows are whose is permuted in each document; activations and reconstructions stay. Were
    the targets the same but for chance, nobody could tell the rows from permuted ones.
    """
    rng = np.random.default_rng(seed)
    targets = scaling.rows.shape[1]
    documents = int(scaling.document.max(initial=-1)) + 1
    found = np.zeros((draws, targets), np.int64)
    for draw in range(draws):
        stop.check()
        order = rng.permuted(np.tile(np.arange(targets), (documents, 1)), axis=1)
        rows = np.take_along_axis(scaling.rows, order[scaling.document], axis=1)
        found[draw] = survivors(nu(scaling._replace(rows=rows), classes), classes, targets)
    return found


def survivors(found: Nu, classes: NDArray[np.int64], targets: int) -> NDArray[np.int64]:
    """(T,) own latents of each target that survive."""
    return np.bincount(classes[found.survives], minlength=targets)[:targets]
