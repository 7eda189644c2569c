"""What the model loses when the SAE's reconstruction takes the place of its residual stream.

Pieces of held-out documents are read alone, with the stream of the SAE's layer replaced row by row:

    identity   by itself, through the same path: must change nothing, exactly
    sae        by its reconstruction
    random     by itself plus noise of the reconstruction error's own length, in a random direction: the error's null
               (Gurnee, "SAE reconstruction errors are (empirically) pathological", 2024)
    mean       by the training rows' mean
    zero       by nothing

once at all positions, and once only at those whose rows the SAE was trained on (without BOS and
outliers, by the run's policy), the others left as they are. With CE the mean cross entropy of the
next token, in nats:

    loss recovered   (CE_zero - CE) / (CE_zero - CE_clean), and the same with mean in the place of zero
    KL               KL(clean || replaced) per token, nats
    KL score         1 - KL / KL_zero

Ablations are of the same positions as the row they are compared with. Every interval is from
resampling documents, each with all its rows: differences are paired.

Shapes: b sequences, t positions, n tokens that are predicted, R replacements, d d_model, V
    vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyze import language_model, pieces
from analyze.drawing import Line, bands, whiskers
from analyze.language_model import Prediction, batches, edited
from analyze.outcome import Outcome, Picture, Table
from analyze.pieces import Piece
from analyze.stats import Floats, bootstrap_ratios, figure, formatted, sums_by
from analyze.study import Definition, Study
from analyze.subject import Subject
from data.errors import SettingError, StopRequest, StoreError
from data.journal import Progress
from data.settings import build
from data.store.kinds import NON_FINITE
from harvest.model import LanguageModel
from train.sae import SAE

SEED = 0  # of the random directions and of every interval
CLEAN = "clean"
ALL, TRAINED = "all positions", "rows as trained"
_SPANS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 2**62)  # of positions


@dataclass(frozen=True)
class Options:
    """How much is read."""

    tokens: int = 100_000  # held-out tokens at most, in whole pieces

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise SettingError(
                f"study.tokens={self.tokens} must be at least 2: the BOS and a token to predict"
            )


class Replacement(NamedTuple):
    """What takes the place of which rows."""

    name: str
    where: str  # ALL or TRAINED
    rows: Callable[[Tensor], Tensor]  # (n, d) float32 to what takes their place


class Losses(NamedTuple):
    """What each predicted token cost: row 0 of the model as it is, then a row for every
    replacement.
    """

    document: NDArray[np.int64]  # (n,)
    position: NDArray[np.int64]  # (n,) of the token that is predicted, since the BOS, which is 0
    ce: NDArray[np.float64]  # (1 + R, n) nats
    kl: NDArray[np.float64]  # (1 + R, n) nats


# -- the pass --------------------------------------------------------------------------------------


def choose(subject: Subject, tokens: int) -> list[Piece]:
    """The first held-out pieces of at most `tokens` together, at least one, that have something to
    predict.

    Pieces with a row that is not finite are left out: their loss is none.

    Raises:
        StoreError: there is none.
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
    """All rows of the table but the clean one. Each random one draws anew in every batch."""
    sae = subject.sae
    mean = subject.mean.float()
    found = [Replacement("identity", ALL, lambda rows: rows)]
    for where in (ALL, TRAINED):
        found += [
            Replacement("sae", where, sae),
            Replacement("random", where, _random(sae, subject.device)),
            Replacement("mean", where, mean.expand_as),
            Replacement("zero", where, torch.zeros_like),
        ]
    return found


def _random(sae: SAE, device: torch.device) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator(device).manual_seed(SEED)

    def noisy(rows: Tensor) -> Tensor:
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
) -> Losses:
    """Losses of every token behind a BOS, clean and with each replacement at `layer`.

    Args:
        kinds: of the rows that the SAE was trained on.
    """
    parts: list[tuple[NDArray[Any], ...]] = []
    progress, done = Progress(), 0
    with StopRequest() as stop:
        for numbers, ids in batches([piece.ids for piece in read]):
            stop.check()
            lengths = torch.tensor([len(read[number].ids) for number in numbers])
            trained = torch.zeros(ids.shape, dtype=torch.bool)
            for mask, number in zip(trained, numbers, strict=True):
                mask[: len(read[number].ids)] = torch.from_numpy(np.isin(read[number].kind, kinds))
            row, at = torch.nonzero(
                torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1, as_tuple=True
            )
            there, device = ids.to(lm.config.device), lm.config.device
            masks = {ALL: torch.ones_like(there, dtype=torch.bool), TRAINED: trained.to(device)}
            finals = []
            for edit in (None, *(_edit(one.rows, masks[one.where]) for one in how)):
                with nullcontext() if edit is None else edited(lm.blocks[layer], edit):
                    states = lm.decoder(input_ids=there, use_cache=False).last_hidden_state
                finals.append(states[row.to(device), at.to(device)])
            ce, kl = _losses(lm, finals, ids[row, at + 1].to(device))
            document = np.array([read[number].document for number in numbers])[row.numpy()]
            parts.append((document, at.numpy() + 1, ce, kl))
            progress.show(
                f"{(done := done + len(numbers))}/{len(read)} pieces", last=done == len(read)
            )
    return Losses._make(np.concatenate(column, -1) for column in zip(*parts, strict=True))


def _edit(replace: Callable[[Tensor], Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The stream (b, t, d) with what `replace` makes of it where `mask` (b, t) is set."""

    def edit(stream: Tensor) -> Tensor:
        assert stream.shape[:2] == mask.shape, "the whole sequence goes through every layer"
        put = replace(stream.reshape(-1, stream.shape[-1]).float())
        return torch.where(mask[..., None], put.to(stream.dtype).view_as(stream), stream)

    return edit


def _losses(lm: LanguageModel, finals: Sequence[Tensor], targets: Tensor) -> tuple[Floats, Floats]:
    """CE and KL to the first, (1 + R, m) each, of final states (m, d) that have gone through the
    final norm.
    """
    ce, kl = (targets.new_empty(len(finals), len(targets), dtype=torch.float32) for _ in range(2))
    for part in language_model.blocks(lm, len(targets)):
        clean = Prediction.of_states(lm, finals[0][part], normed=True)
        for number, states in enumerate(finals):
            replaced = Prediction.of_states(lm, states[part], normed=True)
            ce[number, part] = replaced.cross_entropy(targets[part])
            kl[number, part] = clean.kl(replaced)
    return ce.double().cpu().numpy(), kl.double().cpu().numpy()


# -- figures ---------------------------------------------------------------------------------------


def figures_of(losses: Losses, how: Sequence[Replacement]) -> list[dict[str, Any]]:
    """A row of figures for the clean model and for every replacement, each with its interval over
    documents.
    """
    count = sums_by(losses.document, np.ones(len(losses.document)))[0]
    ce, kl = (np.stack(sums_by(losses.document, *values)) for values in (losses.ce, losses.kl))
    number = {(one.name, one.where): at for at, one in enumerate(how, 1)}
    rows: list[dict[str, Any]] = [{"name": CLEAN, "where": "", **_ratios({"ce": (ce[0], count)})}]
    for (name, where), at in number.items():
        zero, mean, random = (number[other, where] for other in ("zero", "mean", "random"))
        ratios = {
            "ce": (ce[at], count),
            "difference": (ce[at] - ce[0], count),
            "loss_recovered": (ce[zero] - ce[at], ce[zero] - ce[0]),
            "loss_recovered_of_mean": (ce[mean] - ce[at], ce[mean] - ce[0]),
            "kl": (kl[at], count),
            "kl_score": (kl[zero] - kl[at], kl[zero]),
            "kl_of_random": (kl[at], kl[random]),
        }
        largest = float(np.abs(losses.ce[at] - losses.ce[0]).max())
        rows.append(
            {"name": name, "where": where, **_ratios(ratios), "largest_difference": largest}
        )
    return rows


def _ratios(sums: Mapping[str, tuple[Floats, Floats]]) -> dict[str, dict[str, Any]]:
    """Ratios of sums over documents, by name, from the same resamples. NaN where what is divided by
    is not positive.
    """
    above, below = (np.stack(column, 1) for column in zip(*sums.values(), strict=True))
    below = np.where(
        below.sum(0) > 0, below, np.nan
    )  # an ablation that costs nothing is no measure
    values, intervals = above.sum(0) / below.sum(0), bootstrap_ratios(above, below, seed=SEED)
    return {
        name: figure(value, interval)
        for name, value, interval in zip(sums, values, intervals, strict=True)
    }


def by_position(losses: Losses, at: int) -> list[dict[str, Any]]:
    """What replacement number `at` of `Losses` costs by the position of the predicted token, in
    spans that double.
    """
    found = []
    for low, high in pairwise(_SPANS):
        inside = (losses.position >= low) & (losses.position < high)
        if inside.any():
            cost, count = sums_by(
                losses.document[inside],
                losses.ce[at, inside] - losses.ce[0, inside],
                np.ones(inside.sum()),
            )
            to = int(losses.position[inside].max())
            found.append(
                {
                    "from": low,
                    "to": to,
                    "tokens": int(inside.sum()),
                    **_ratios({"difference": (cost, count)}),
                }
            )
    return found


# -- the study -------------------------------------------------------------------------------------


def splice(study: Study) -> Outcome:
    """CE and KL with the SAE in place, beside identity, random errors of the same length, and
    ablations.
    """
    options, subject, lm = build(Options, "study", study.options), study.subject, study.lm
    read = choose(subject, options.tokens)
    deviation = language_model.head_deviation(lm, read[0].ids)
    how = replacements(subject)
    losses = measure(lm, subject.layer, read, subject.policy.kinds, how)
    kinds = np.concatenate([piece.kind for piece in read])
    figures = {
        "pieces": len(read),
        "documents": len(np.unique(losses.document)),
        "tokens": len(losses.document),
        "replaced": {ALL: len(kinds), TRAINED: int(np.isin(kinds, subject.policy.kinds).sum())},
        "seed": SEED,
        "head_deviation": deviation,
        "rows": figures_of(losses, how),
        "by_position": {
            f"{one.name}, {one.where}": by_position(losses, at)
            for at, one in enumerate(how, 1)
            if one.name in ("sae", "random")
        },
    }
    return Outcome(figures, _summary(figures, subject), [_table(figures)], _pictures(figures))


def _summary(figures: dict[str, Any], subject: Subject) -> list[str]:
    row = {(one["name"], one["where"]): one for one in figures["rows"]}
    clean, moved = row[CLEAN, ""], row["identity", ALL]["largest_difference"]
    found = []
    for where in (ALL, TRAINED):
        sae, random = row["sae", where], row["random", where]
        found.append(
            f"With the SAE's reconstruction in place of layer {subject.layer}'s residual at {where}, "
            f"{figures['replaced'][where]:,} of {figures['replaced'][ALL]:,}, the model loses "
            f"{formatted(sae['difference'], '.4f')} nats per token: loss recovered {formatted(sae['loss_recovered'], '.2%')} of "
            f"zero ablation's, {formatted(sae['loss_recovered_of_mean'], '.2%')} of mean ablation's, KL score "
            f"{formatted(sae['kl_score'], '.2%')}. A random error of the same length costs "
            f"{formatted(random['difference'], '.4f')}; the SAE's KL is {formatted(sae['kl_of_random'], '.2f')} times that one's."
        )
    exact = (
        "The identity splice changes no token's loss, exactly."
        if moved == 0
        else f"The identity splice, which must change nothing, moves a token's loss by up to {moved:.1e} nats: no "
        "figure here is better than that."
    )
    found[0] += f" {exact}"
    return [
        *found,
        f"The model itself has {formatted(clean['ce'], '.4f')} nats on these {figures['tokens']:,} tokens of "
        f"{figures['documents']} documents. Brackets are 95 % intervals, paired, over documents.",
    ]


def _table(figures: dict[str, Any]) -> Table:
    header = (
        "stream",
        "where",
        "CE (nats)",
        "difference",
        "loss recovered",
        "of mean ablation",
        "KL (nats)",
        "KL score",
    )
    forms = {
        "ce": ".4f",
        "difference": "+.4f",
        "loss_recovered": ".2%",
        "loss_recovered_of_mean": ".2%",
        "kl": ".4f",
        "kl_score": ".2%",
    }
    rows = [
        (
            row["name"],
            row["where"],
            *(formatted(row[key], form) if key in row else "" for key, form in forms.items()),
        )
        for row in figures["rows"]
    ]
    return Table("The model with each stream, nats per token", header, rows)


def _pictures(figures: dict[str, Any]) -> dict[str, Picture]:
    rows = figures["rows"]
    ce = [row["ce"] for row in rows]
    names = [f"{row['name']}, {row['where']}".removesuffix(", ") for row in rows]
    bars = whiskers(
        names, [one["value"] for one in ce], [one["interval"] for one in ce], "CE, nats per token"
    )
    lines = {
        name: Line(
            [span["from"] for span in spans],
            [span["difference"]["value"] for span in spans],
            [span["difference"]["interval"] for span in spans],
        )
        for name, spans in figures["by_position"].items()
    }
    by = bands(lines, "position of the predicted token, from", "CE more than clean, nats", log=True)
    return {
        "splice": Picture("Cross entropy with each stream in place of the residual", bars),
        "splice_position": Picture("What the replacement costs by position in the piece", by),
    }


DEFINITION = Definition(splice, options=Options, order=10)
