"""What the language model loses when the SAE's reconstruction replaces its residual stream.

Pieces of held-out documents are read alone. The stream behind the SAE's layer is replaced:

    identity   by itself, through the same code: must change nothing, exactly
    sae        by its reconstruction
    random     by itself plus noise as long as the reconstruction error, in a random direction: the
               error's null (Gurnee, "SAE reconstruction errors are (empirically)
               pathological", 2024)
    mean       by the training rows' mean
    zero       by zeros

Each replacement is made twice: at all positions, and only at those whose rows the SAE was trained
on (by the run's policy, as a rule without BOS and outliers). With CE the mean cross entropy of
the next token, in nats:

    loss recovered   (CE_zero - CE) / (CE_zero - CE_clean), and the same with mean in place of zero
    KL               KL(clean || replaced) per token, nats
    KL score         1 - KL / KL_zero

A row is compared with ablations at the same positions. Every interval is from resampling documents,
each with all its rows: differences are paired.

Shapes: b sequences, t positions, n tokens that are predicted, R replacements, d d_model, V
    vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyze import language_model, pieces
from analyze.answering import model_key
from analyze.drawing import Line, bands, whiskers
from analyze.language_model import Prediction, batches, edited
from analyze.outcome import Outcome, Picture, Table
from analyze.parts import NOWHERE, Arrays, Parts
from analyze.pieces import Piece
from analyze.results import digest_of
from analyze.stats import Floats, bootstrap_ratios, figure, formatted, resampled, sums_by
from analyze.study import Definition, Study
from analyze.subject import Subject
from data import durable
from data.errors import SettingError, StopRequest, StoreError
from data.journal import Progress, note
from data.settings import build
from data.store.kinds import NON_FINITE
from harvest.model import LanguageModel
from train.sae import SAE

VERSION = 1  # of the kept losses: raise it when the same pieces give other ones
SEED = 0  # of the random directions and of every interval
CLEAN = "clean"
ALL, TRAINED = "all positions", "rows as trained"
_SPANS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 2**62)  # of positions


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/splice.yaml."""

    tokens: int = 100_000  # held-out tokens at most, in whole pieces

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise SettingError(
                f"study.tokens={self.tokens} must be at least 2: the BOS and a token to predict"
            )


class Replacement(NamedTuple):
    """One way to replace the stream."""

    name: str
    where: str  # ALL or TRAINED
    rows: Callable[[Tensor], Tensor]  # from (n, d) float32 rows to those that replace them


class Losses(NamedTuple):
    """The loss of each predicted token: of the clean model, then of every replacement."""

    document: NDArray[np.int64]  # (n,)
    position: NDArray[np.int64]  # (n,) of the predicted token, since the BOS, which is 0
    ce: NDArray[np.float64]  # (1 + R, n) nats
    kl: NDArray[np.float64]  # (1 + R, n) nats


# -- the pass --------------------------------------------------------------------------------------


def choose(subject: Subject, tokens: int) -> list[Piece]:
    """The first held-out pieces of two tokens or more, of at most `tokens` together, at least one.

    Pieces with a row that is not finite are left out: their loss would be NaN.

    Raises:
        StoreError: there is no such piece.
    """
    chosen: list[Piece] = []
    left = tokens
    for piece in pieces.held_out(subject):
        if len(piece.ids) < 2 or (piece.kind == NON_FINITE).any():
            continue
        if chosen and len(piece.ids) > left:
            break
        chosen.append(piece)
        left -= len(piece.ids)
    if not chosen:
        raise StoreError(
            f"{subject.store.name} holds out no piece of two finite rows; harvest more"
        )
    return chosen


def replacements(subject: Subject) -> list[Replacement]:
    """All replacements."""
    sae = subject.sae
    mean = subject.mean.float()
    every = [Replacement("identity", ALL, lambda rows: rows)]
    for where in (ALL, TRAINED):
        every += [
            Replacement("sae", where, sae),
            Replacement("random", where, random_error(sae, subject.device)),
            Replacement("mean", where, mean.expand_as),
            Replacement("zero", where, torch.zeros_like),
        ]
    return every


def random_error(sae: SAE, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that adds noise as long as the SAE's error to rows (n, d).

    The same rows get the same noise: a study that was stopped goes on with what it would have had.
    """

    def noisy(rows: Tensor) -> Tensor:
        seed = int(durable.digest(b"splice %d" % SEED, rows.cpu().numpy().tobytes())[:15], 16)
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(rows.shape, generator=generator, device=device)
        length = torch.linalg.vector_norm(sae(rows) - rows, dim=1, keepdim=True)
        noise *= length / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
        return rows + noise

    return noisy


@torch.inference_mode()
def measure(
    lm: LanguageModel,
    layer: int,
    read: Sequence[Piece],
    kinds: Sequence[int],
    how: Sequence[Replacement],
    parts: Parts = NOWHERE,
) -> Losses:
    """Losses of every token behind a BOS, clean and with each replacement at `layer`.

    Args:
        kinds: of the rows that the SAE was trained on.
        parts: where the losses of each batch are kept.
    """
    found: list[Losses] = []
    done = 0
    progress = Progress()
    with StopRequest() as stop:
        every = batches([piece.ids for piece in read], language_model.batch_tokens(lm))
        for index, (numbers, ids) in enumerate(every):
            stop.check()
            batch = _Batch.of([read[number] for number in numbers], ids, kinds)
            said = f"{done}/{len(read)} pieces"

            def make(batch: _Batch = batch, said: str = said) -> Arrays:
                return _measured(lm, layer, batch, how, said, stop)._asdict()

            found.append(Losses(**parts.of(index, make)))
            done += len(numbers)
            progress.show(f"{done}/{len(read)} pieces", last=done == len(read))
    return Losses._make(np.concatenate(column, -1) for column in zip(*found, strict=True))


class _Batch(NamedTuple):
    """Pieces that go through the model together."""

    pieces: Sequence[Piece]
    ids: Tensor  # (b, t), padded on the right
    predicts: Tensor  # (b, t) positions that have a next token
    trained: Tensor  # (b, t) positions whose rows the SAE was trained on

    @classmethod
    def of(cls, chosen: Sequence[Piece], ids: Tensor, kinds: Sequence[int]) -> _Batch:
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        trained = torch.zeros(ids.shape, dtype=torch.bool)
        for sequence, piece in enumerate(chosen):
            predicts[sequence, : len(piece.ids) - 1] = True
            trained[sequence, : len(piece.ids)] = torch.from_numpy(np.isin(piece.kind, kinds))
        return cls(chosen, ids, predicts, trained)


def _measured(
    lm: LanguageModel,
    layer: int,
    batch: _Batch,
    how: Sequence[Replacement],
    said: str,
    stop: StopRequest,
) -> Losses:
    """The losses of one batch.

    Args:
        said: how far the study is, for the line of progress.
    """
    # Final states of the clean model, then with each replacement.
    device = lm.config.device
    row, position = torch.nonzero(batch.predicts, as_tuple=True)
    inputs = batch.ids.to(device)
    masks = {ALL: torch.ones_like(inputs, dtype=torch.bool), TRAINED: batch.trained.to(device)}
    finals = []
    for replacement in (None, *how):
        stop.check()
        hook: AbstractContextManager[None] = nullcontext()
        if replacement is None:
            note(f"{said}, {CLEAN}")
        else:
            note(f"{said}, {replacement.name}, {replacement.where}")
            edit = _edit(replacement.rows, masks[replacement.where])
            hook = edited(lm.blocks[layer], edit)
        with hook:
            states = lm.decoder(input_ids=inputs, use_cache=False).last_hidden_state
        finals.append(states[row.to(device), position.to(device)])

    note(f"{said}, losses")
    ce, kl = _losses(lm, finals, batch.ids[row, position + 1].to(device), stop)
    document = np.array([piece.document for piece in batch.pieces])[row.numpy()]
    return Losses(document, position.numpy() + 1, ce, kl)


def _edit(replace: Callable[[Tensor], Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that replaces the rows of the stream (b, t, d) where `mask` (b, t) is set."""

    def edit(stream: Tensor) -> Tensor:
        assert stream.shape[:2] == mask.shape, "the whole sequence goes through every layer"
        replaced = replace(stream.reshape(-1, stream.shape[-1]).float())
        return torch.where(mask[..., None], replaced.to(stream.dtype).view_as(stream), stream)

    return edit


def _losses(
    lm: LanguageModel, finals: Sequence[Tensor], targets: Tensor, stop: StopRequest
) -> tuple[Floats, Floats]:
    """CE, and KL(clean || replaced), (1 + R, m) each.

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
            replaced = Prediction.of_states(lm, states[part], normed=True)
            ce[number, part] = replaced.cross_entropy(targets[part])
            kl[number, part] = clean.kl(replaced)
    return ce.double().cpu().numpy(), kl.double().cpu().numpy()


# -- figures ---------------------------------------------------------------------------------------


def figures_of(losses: Losses, how: Sequence[Replacement]) -> list[dict[str, Any]]:
    """Figures of the clean model and of every replacement, with intervals over documents."""
    (count,) = sums_by(losses.document, np.ones(len(losses.document)))
    ce = np.stack(sums_by(losses.document, *losses.ce))
    kl = np.stack(sums_by(losses.document, *losses.kl))
    index = {}  # of each replacement in the rows of `ce` and `kl`
    for row, replacement in enumerate(how, 1):
        index[replacement.name, replacement.where] = row
    rows: list[dict[str, Any]] = [{"name": CLEAN, "where": "", **_ratios({"ce": (ce[0], count)})}]
    for (name, where), row in index.items():
        zero = index["zero", where]
        mean = index["mean", where]
        random = index["random", where]
        ratios = {
            "ce": (ce[row], count),
            "difference": (ce[row] - ce[0], count),
            "loss_recovered": (ce[zero] - ce[row], ce[zero] - ce[0]),
            "loss_recovered_of_mean": (ce[mean] - ce[row], ce[mean] - ce[0]),
            "kl": (kl[row], count),
            "kl_score": (kl[zero] - kl[row], kl[zero]),
            "kl_of_random": (kl[row], kl[random]),
        }
        largest = float(np.abs(losses.ce[row] - losses.ce[0]).max())
        rows.append(
            {"name": name, "where": where, **_ratios(ratios), "largest_difference": largest}
        )
    return rows


def _ratios(sums: Mapping[str, tuple[Floats, Floats]]) -> dict[str, dict[str, Any]]:
    """Ratios of sums over documents, by name, from the same resamples.

    NaN where the denominator is not positive: an ablation that costs nothing is no measure.
    """
    numerators = np.stack([numerator for numerator, _ in sums.values()], 1)
    denominators = np.stack([denominator for _, denominator in sums.values()], 1)
    denominators = np.where(denominators.sum(0) > 0, denominators, np.nan)
    values = numerators.sum(0) / denominators.sum(0)
    intervals = bootstrap_ratios(numerators, denominators, seed=SEED)
    return dict(zip(sums, map(figure, values, intervals), strict=True))


def by_position(losses: Losses, row: int) -> list[dict[str, Any]]:
    """The cost of a replacement by the position of the predicted token, in spans that double.

    Args:
        row: of `Losses.ce`.
    """
    spans = []
    for low, high in pairwise(_SPANS):
        inside = (losses.position >= low) & (losses.position < high)
        if inside.any():
            more = losses.ce[row, inside] - losses.ce[0, inside]
            cost, count = sums_by(losses.document[inside], more, np.ones(inside.sum()))
            spans.append(
                {
                    "from": low,
                    "to": int(losses.position[inside].max()),
                    "tokens": int(inside.sum()),
                    **_ratios({"difference": (cost, count)}),
                }
            )
    return spans


# -- the study -------------------------------------------------------------------------------------


def splice(study: Study) -> Outcome:
    """CE and KL with the SAE in place, beside the identity, random errors, and ablations."""
    options = build(Options, "study", study.options)
    subject = study.subject
    lm = study.lm
    read = choose(subject, options.tokens)
    deviation = language_model.head_deviation(lm, read[0].ids)
    how = replacements(subject)
    key = {
        "version": VERSION,
        **study.identity,
        **model_key(study),
        "read": digest_of({"pieces": [(piece.ids, piece.kind.tolist()) for piece in read]}),
    }
    parts = subject.parts("spliced", key)
    losses = measure(lm, subject.layer, read, subject.policy.kinds, how, parts)
    kinds = np.concatenate([piece.kind for piece in read])
    positions = {}
    for row, replacement in enumerate(how, 1):
        if replacement.name in ("sae", "random"):
            name = f"{replacement.name}, {replacement.where}"
            positions[name] = by_position(losses, row)
    figures = {
        "pieces": len(read),
        "documents": len(np.unique(losses.document)),
        "tokens": len(losses.document),
        "replaced": {ALL: len(kinds), TRAINED: int(np.isin(kinds, subject.policy.kinds).sum())},
        "seed": SEED,
        "head_deviation": deviation,
        "rows": figures_of(losses, how),
        "by_position": positions,
    }
    return Outcome(figures, _summary(figures, subject), [_table(figures)], _pictures(figures))


def _summary(figures: dict[str, Any], subject: Subject) -> list[str]:
    rows = {(row["name"], row["where"]): row for row in figures["rows"]}
    replaced = figures["replaced"]
    lines = []
    for where in (ALL, TRAINED):
        sae = rows["sae", where]
        random = rows["random", where]
        lines.append(
            f"With the SAE's reconstruction in place of layer {subject.layer}'s residual at "
            f"{where}, {replaced[where]:,} of {replaced[ALL]:,}, the model loses "
            f"{formatted(sae['difference'], '.4f')} nats per token: loss recovered "
            f"{formatted(sae['loss_recovered'], '.2%')} of zero ablation's, "
            f"{formatted(sae['loss_recovered_of_mean'], '.2%')} of mean ablation's, KL score "
            f"{formatted(sae['kl_score'], '.2%')}. A random error of the same length costs "
            f"{formatted(random['difference'], '.4f')}; the SAE's KL is "
            f"{formatted(sae['kl_of_random'], '.2f')} times that one's."
        )
    moved = rows["identity", ALL]["largest_difference"]
    if moved == 0:
        lines[0] += " The identity splice changes no token's loss, exactly."
    else:
        lines[0] += (
            " The identity splice, which must change nothing, moves a token's loss by up to "
            f"{moved:.1e} nats: no figure here is better than that."
        )
    lines.append(
        f"The model itself has {formatted(rows[CLEAN, '']['ce'], '.4f')} nats on these "
        f"{figures['tokens']:,} tokens of {figures['documents']} documents. "
        f"{resampled(figures['documents'], 'document')} Differences are paired."
    )
    return lines


_COLUMNS = {  # of the table: figure, head and form
    "ce": ("CE (nats)", ".4f"),
    "difference": ("difference", "+.4f"),
    "loss_recovered": ("loss recovered", ".2%"),
    "loss_recovered_of_mean": ("of mean ablation", ".2%"),
    "kl": ("KL (nats)", ".4f"),
    "kl_score": ("KL score", ".2%"),
}


def _table(figures: dict[str, Any]) -> Table:
    header = ("stream", "where", *(head for head, _ in _COLUMNS.values()))
    rows = []
    for row in figures["rows"]:
        cells = [row["name"], row["where"]]
        for key, (_, form) in _COLUMNS.items():
            cells.append(formatted(row[key], form) if key in row else "")
        rows.append(tuple(cells))
    return Table("The model with each stream, nats per token", header, rows)


def _pictures(figures: dict[str, Any]) -> dict[str, Picture]:
    names = [f"{row['name']}, {row['where']}".removesuffix(", ") for row in figures["rows"]]
    values = [row["ce"]["value"] for row in figures["rows"]]
    intervals = [row["ce"]["interval"] for row in figures["rows"]]
    lines = {}
    for name, spans in figures["by_position"].items():
        lines[name] = Line(
            [span["from"] for span in spans],
            [span["difference"]["value"] for span in spans],
            [span["difference"]["interval"] for span in spans],
        )
    x_label = "position of the predicted token, from"
    return {
        "splice": Picture(
            "Cross entropy with each stream in place of the residual",
            whiskers(names, values, intervals, "CE, nats per token"),
        ),
        "splice_position": Picture(
            "What the replacement costs by position in the piece",
            bands(lines, x_label, "CE more than clean, nats", log=True),
        ),
    }


DEFINITION = Definition(splice, version=2, options=Options, order=10)
