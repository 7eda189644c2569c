"""The loss of every token of held-out text, clean and with edits of the forward pass.

Pieces of documents are read alone. Every interval is from resampling documents, each with all its
rows: differences are paired.

Shapes: b sequences, t positions, n tokens that are predicted, R edits, V vocabulary.

Losses of a batch are kept on the host, so it waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze import language_model, pieces
from residual_saes.analyze.language_model import Prediction, batches
from residual_saes.analyze.parts import NOWHERE, Arrays, Parts
from residual_saes.analyze.pieces import Piece
from residual_saes.analyze.stats import Floats, bootstrap_ratios, figure
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import StopRequest, StoreError
from residual_saes.data.journal import Progress, note
from residual_saes.data.site import HookPoint
from residual_saes.data.store.kinds import NON_FINITE
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import tap

SEED = 0  # of every interval
CLEAN = "clean"
ALL, TRAINED = "all positions", "rows as trained"

Taken = Mapping[HookPoint, Tensor]  # (b, t, d) states of the clean model


class Losses(NamedTuple):
    """The loss of each predicted token: of the clean model, then with every edit."""

    document: NDArray[np.int64]  # (n,)
    position: NDArray[np.int64]  # (n,) of the predicted token, since the BOS, which is 0
    ce: NDArray[np.float64]  # (1 + R, n) nats
    kl: NDArray[np.float64]  # (1 + R, n) nats: KL(clean || edited)


class Batch(NamedTuple):
    """Pieces that go through the model together."""

    pieces: Sequence[tuple[Piece, ...]]  # with the kinds of each subject's rows
    ids: Tensor  # (b, t), padded on the right
    predicts: Tensor  # (b, t) positions that have a next token

    @classmethod
    def of(cls, chosen: Sequence[tuple[Piece, ...]], ids: Tensor) -> Batch:
        """A batch of pieces with their padded ids (b, t)."""
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        for sequence, (piece, *_) in enumerate(chosen):
            predicts[sequence, : len(piece.ids) - 1] = True
        return cls(chosen, ids, predicts)

    def mask(self, where: str, kinds: Sequence[int], subject: int = 0) -> Tensor:
        """(b, t) the positions that an edit is at: ALL, or TRAINED, which are those of `kinds`.

        Args:
            subject: number of the one whose rows count.
        """
        if where == ALL:
            return torch.ones(self.ids.shape, dtype=torch.bool)
        trained = torch.zeros(self.ids.shape, dtype=torch.bool)
        for sequence, of_piece in enumerate(self.pieces):
            piece = of_piece[subject]
            trained[sequence, : len(piece.ids)] = torch.from_numpy(np.isin(piece.kind, kinds))
        return trained


class Edit(NamedTuple):
    """One change of the forward pass."""

    said: str  # for the line of progress
    opened: AbstractContextManager[Any]  # while it is open, the model is changed


Edits = Callable[[Batch, Taken], Iterable[Edit]]


def choose(subjects: Sequence[Subject], tokens: int) -> list[tuple[Piece, ...]]:
    """The first held-out pieces of two tokens or more, of at most `tokens` together, at least one.

    Pieces with a row that is not finite are left out: their loss would be NaN.

    Args:
        subjects: of one store; a piece is given once for each, with the kinds of its rows.

    Raises:
        StoreError: there is no such piece.
    """
    chosen: list[tuple[Piece, ...]] = []
    left = tokens
    for of_piece in zip(*map(pieces.held_out, subjects), strict=True):
        length = len(of_piece[0].ids)
        if length < 2 or any((piece.kind == NON_FINITE).any() for piece in of_piece):
            continue
        if chosen and length > left:
            break
        chosen.append(of_piece)
        left -= length
    if not chosen:
        raise StoreError(
            f"{subjects[0].store.name} holds out no piece of two finite rows; harvest more"
        )
    return chosen


@torch.inference_mode()
def measure(
    lm: LanguageModel,
    read: Sequence[tuple[Piece, ...]],
    points: Sequence[HookPoint],
    edits: Edits,
    parts: Parts = NOWHERE,
    stop: StopRequest | None = None,
) -> Losses:
    """Losses of every token behind a BOS, clean and with each edit.

    Args:
        points: whose states of the clean model `edits` is given.
        edits: those of a batch.
        parts: where the losses of each batch are kept.
        stop: of the caller, whose signals it gets; None: its own.
    """
    found: list[Losses] = []
    done = 0
    progress = Progress()
    with nullcontext(stop) if stop else StopRequest() as stop:
        every = batches([piece.ids for piece, *_ in read], language_model.batch_tokens(lm))
        for index, (numbers, ids) in enumerate(every):
            stop.check()
            batch = Batch.of([read[number] for number in numbers], ids)
            said = f"{done}/{len(read)} pieces"

            def make(batch: Batch = batch, said: str = said) -> Arrays:
                return _measured(lm, batch, points, edits, said, stop)._asdict()

            found.append(Losses(**parts.of(index, make)))
            done += len(numbers)
            progress.show(f"{done}/{len(read)} pieces", last=done == len(read))
    return Losses._make(np.concatenate(column, -1) for column in zip(*found, strict=True))


def _measured(
    lm: LanguageModel,
    batch: Batch,
    points: Sequence[HookPoint],
    edits: Edits,
    said: str,
    stop: StopRequest,
) -> Losses:
    """The losses of one batch.

    Args:
        said: how far the study is, for the line of progress.
    """
    device = lm.config.device
    row, position = torch.nonzero(batch.predicts, as_tuple=True)
    inputs = batch.ids.to(device)

    def final(opened: AbstractContextManager[Any]) -> Tensor:
        stop.check()
        with opened:
            states = lm.decoder(input_ids=inputs, use_cache=False).last_hidden_state
        kept: Tensor = states[row.to(device), position.to(device)]
        return kept

    # Final states of the clean model, then with each edit.
    note(f"{said}, {CLEAN}")
    with tap(lm, points) as taken:
        finals = [final(nullcontext())]
    for edit in edits(batch, taken):
        note(f"{said}, {edit.said}")
        finals.append(final(edit.opened))

    note(f"{said}, losses")
    ce, kl = _losses(lm, finals, batch.ids[row, position + 1].to(device), stop)
    document = np.array([piece.document for piece, *_ in batch.pieces])[row.numpy()]
    return Losses(document, position.numpy() + 1, ce, kl)


def _losses(
    lm: LanguageModel, finals: Sequence[Tensor], targets: Tensor, stop: StopRequest
) -> tuple[Floats, Floats]:
    """CE, and KL(clean || edited), (1 + R, m) each.

    Args:
        finals: (m, d) final states behind the final norm, of the clean model first.
        targets: (m,) next tokens.
    """
    ce = targets.new_empty(len(finals), len(targets), dtype=torch.float32)
    kl = torch.empty_like(ce)
    for part in language_model.blocks(lm, len(targets)):
        stop.check()
        clean = Prediction.of_states(lm, finals[0][part], normed=True)
        for number, states in enumerate(finals):
            edited = Prediction.of_states(lm, states[part], normed=True)
            ce[number, part] = edited.cross_entropy(targets[part])
            kl[number, part] = clean.kl(edited)
    return ce.double().cpu().numpy(), kl.double().cpu().numpy()


def ratios(sums: Mapping[str, tuple[Floats, Floats]]) -> dict[str, dict[str, Any]]:
    """Ratios of sums over documents, by name, from the same resamples.

    NaN where the denominator is not positive: an ablation that costs nothing is no measure.
    """
    numerators = np.stack([numerator for numerator, _ in sums.values()], 1)
    denominators = np.stack([denominator for _, denominator in sums.values()], 1)
    denominators = np.where(denominators.sum(0) > 0, denominators, np.nan)
    values = numerators.sum(0) / denominators.sum(0)
    intervals = bootstrap_ratios(numerators, denominators, seed=SEED)
    return dict(zip(sums, map(figure, values, intervals), strict=True))
