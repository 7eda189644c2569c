"""What the language model loses when a reconstruction replaces the values of a hook point.

Pieces of held-out documents are read alone. What an SAE reads is replaced; of a transcoder what it
writes, such as the MLP's output; of a crosscoder each of its targets, one at a time:

    identity   by itself, through the same code: must change nothing, exactly
    sae        by its reconstruction (transcoder, crosscoder: by theirs, from what they read in the
               clean model)
    random     by itself plus noise as long as the reconstruction error, in a random direction: the
               error's null (Gurnee, "SAE reconstruction errors are (empirically)
               pathological", 2024)
    skip       of a transcoder: by what it writes if no latent fires
    linear     of a transcoder: by a linear map of what it reads (analyze/linear.py)
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

Shapes: b sequences, t positions, n tokens that are predicted, R replacements, d the width that is
    read, d_out that of what is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from residual_saes.analyze import language_model, linear, losses, refusals
from residual_saes.analyze.drawing import Line, bands, whiskers
from residual_saes.analyze.losses import (
    ALL,
    CLEAN,
    SEED,
    TRAINED,
    Batch,
    Edit,
    Losses,
    Taken,
    choose,
    ratios,
)
from residual_saes.analyze.outcome import Outcome, Picture, Table
from residual_saes.analyze.parts import NOWHERE, Parts
from residual_saes.analyze.pieces import Piece
from residual_saes.analyze.questions.answering import model_key
from residual_saes.analyze.results import digest_of
from residual_saes.analyze.stats import formatted, resampled, sums_by
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import SettingError
from residual_saes.data.settings import build
from residual_saes.data.site import ATTN_OUT, RESID_MID, HookPoint
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import edited_at
from residual_saes.train.ports import Port

VERSION = 1  # of the kept losses: raise it when the same pieces give other ones
_SPANS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 2**62)  # of positions

# From rows that are read (n, d) and the target's own (n, d_out) to those that replace these.
Replaced = Callable[[Tensor, Tensor], Tensor]


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
    """One way to replace rows."""

    name: str
    where: str  # ALL or TRAINED
    rows: Replaced


class Splice(NamedTuple):
    """Where rows are read, and where they are replaced."""

    reads: tuple[HookPoint, ...]
    target: HookPoint


# -- the pass --------------------------------------------------------------------------------------


def splices(subject: Subject) -> dict[Port, Splice]:
    """The splice of each port that is written."""
    reads = tuple(port.point for port in subject.ports.reads)
    return {port: Splice(reads, port.point) for port in subject.ports.writes}


def replacements(subject: Subject, port: Port) -> list[Replacement]:
    """All replacements of what is written at a port."""
    own = subject.columns(port)
    mean = subject.mean[own].float()
    subject_name = subject.noun.lower()

    def reconstructed(read: Tensor, _: Tensor) -> Tensor:
        return subject.sae(read)[:, own]

    ways: dict[str, Replaced] = {
        subject_name: reconstructed,
        "random": random_error(reconstructed),
    }
    if not subject.ports.is_autoencoder:
        skip = linear.skip_of(subject.sae)
        ways["skip"] = lambda read, _: skip(read)
        if fit := linear.fitted(subject):
            ways["linear"] = lambda read, _: fit(read)
    ways["mean"] = lambda _, rows: mean.expand_as(rows)
    ways["zero"] = lambda _, rows: torch.zeros_like(rows)
    every = [Replacement("identity", ALL, lambda _, rows: rows)]
    for where in (ALL, TRAINED):
        every += [Replacement(name, where, way) for name, way in ways.items()]
    return every


def random_error(reconstructed: Replaced) -> Replaced:
    """Adds noise as long as the reconstruction's error to the target's rows.

    The same rows get the same noise: a study that was stopped goes on with what it would have had.
    """

    def noisy(read: Tensor, rows: Tensor) -> Tensor:
        # Device sync: the rows are the seed.
        seed = int(durable.digest(b"splice %d" % SEED, rows.cpu().numpy().tobytes())[:15], 16)
        generator = torch.Generator(rows.device).manual_seed(seed)
        noise = torch.randn(rows.shape, generator=generator, device=rows.device)
        length = torch.linalg.vector_norm(reconstructed(read, rows) - rows, dim=1, keepdim=True)
        noise *= length / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
        return rows + noise

    return noisy


def measure(
    lm: LanguageModel,
    splice: Splice,
    read: Sequence[Piece],
    kinds: Sequence[int],
    how: Sequence[Replacement],
    parts: Parts = NOWHERE,
) -> Losses:
    """Losses of every token behind a BOS, clean and with each replacement.

    What is read lies ahead of what is replaced, or is it, or is given from the clean model. So the
    rows that replace are made of the clean model's states.

    Args:
        kinds: of the rows that the SAE was trained on.
        parts: where the losses of each batch are kept.
    """

    def edits(batch: Batch, taken: Taken) -> Iterator[Edit]:
        own = taken[splice.target]
        rows = [taken[point].reshape(-1, taken[point].shape[-1]).float() for point in splice.reads]
        x = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        for replacement in how:
            mask = batch.mask(replacement.where, kinds).to(own.device)
            replaced = replacement.rows(x, own.reshape(-1, own.shape[-1]).float())
            new = torch.where(mask[..., None], replaced.to(own.dtype).view_as(own), own)
            said = f"{replacement.name}, {replacement.where}"
            yield Edit(said, _opened(lm, splice.target, own, new))

    points = list(dict.fromkeys((*splice.reads, splice.target)))
    return losses.measure(lm, [(piece,) for piece in read], points, edits, parts)


def _opened(lm: LanguageModel, point: HookPoint, own: Tensor, new: Tensor) -> Any:
    """While open, a point has `new` (b, t, d) in place of `own`."""
    if point.site == RESID_MID:  # x + attn_out: edited by what attention adds
        attention = HookPoint(point.layer, ATTN_OUT)
        return edited_at(lm, attention, lambda values: values + (new - own))

    def edit(values: Tensor) -> Tensor:
        assert values.shape == new.shape, "the whole sequence goes through every layer"
        return new

    return edited_at(lm, point, edit)


# -- figures ---------------------------------------------------------------------------------------


def figures_of(measured: Losses, how: Sequence[Replacement]) -> list[dict[str, Any]]:
    """Figures of the clean model and of every replacement, with intervals over documents."""
    (count,) = sums_by(measured.document, np.ones(len(measured.document)))
    ce = np.stack(sums_by(measured.document, *measured.ce))
    kl = np.stack(sums_by(measured.document, *measured.kl))
    index = {}  # of each replacement in the rows of `ce` and `kl`
    for row, replacement in enumerate(how, 1):
        index[replacement.name, replacement.where] = row
    rows: list[dict[str, Any]] = [{"name": CLEAN, "where": "", **ratios({"ce": (ce[0], count)})}]
    for (name, where), row in index.items():
        zero = index["zero", where]
        mean = index["mean", where]
        random = index["random", where]
        sums = {
            "ce": (ce[row], count),
            "difference": (ce[row] - ce[0], count),
            "loss_recovered": (ce[zero] - ce[row], ce[zero] - ce[0]),
            "loss_recovered_of_mean": (ce[mean] - ce[row], ce[mean] - ce[0]),
            "kl": (kl[row], count),
            "kl_score": (kl[zero] - kl[row], kl[zero]),
            "kl_of_random": (kl[row], kl[random]),
        }
        largest = float(np.abs(measured.ce[row] - measured.ce[0]).max())
        rows.append({"name": name, "where": where, **ratios(sums), "largest_difference": largest})
    return rows


def by_position(measured: Losses, row: int) -> list[dict[str, Any]]:
    """The cost of a replacement by the position of the predicted token, in spans that double.

    Args:
        row: of `Losses.ce`.
    """
    spans = []
    for low, high in pairwise(_SPANS):
        inside = (measured.position >= low) & (measured.position < high)
        if inside.any():
            more = measured.ce[row, inside] - measured.ce[0, inside]
            cost, count = sums_by(measured.document[inside], more, np.ones(inside.sum()))
            spans.append(
                {
                    "from": low,
                    "to": int(measured.position[inside].max()),
                    "tokens": int(inside.sum()),
                    **ratios({"difference": (cost, count)}),
                }
            )
    return spans


# -- the study -------------------------------------------------------------------------------------


def splice(study: Study) -> Outcome:
    """CE and KL with a reconstruction in place, beside the identity, random errors, ablations."""
    options = build(Options, "study", study.options)
    subject = study.subject
    lm = study.lm
    read = [piece for (piece,) in choose([subject], options.tokens)]
    kinds = np.concatenate([piece.kind for piece in read])
    figures = {
        "pieces": len(read),
        "documents": len({piece.document for piece in read}),
        "tokens": sum(len(piece.ids) - 1 for piece in read),
        "replaced": {ALL: len(kinds), TRAINED: int(np.isin(kinds, subject.policy.kinds).sum())},
        "seed": SEED,
        "head_deviation": language_model.head_deviation(lm, read[0].ids),
    }
    key = {
        "version": VERSION,
        **study.identity,
        **model_key(study),
        "read": digest_of({"pieces": [(piece.ids, piece.kind.tolist()) for piece in read]}),
    }
    targets = {}
    for port, where in splices(subject).items():
        own_key = key if len(subject.ports.writes) == 1 else {**key, "target": port.name}
        how = replacements(subject, port)
        parts = subject.parts("spliced", own_key)
        measured = measure(lm, where, read, subject.policy.kinds, how, parts)
        targets[port] = _of_target(measured, how, subject)
    if len(targets) == 1:
        (of_target,) = targets.values()
        figures |= of_target
    else:
        figures["targets"] = {port.name: of_target for port, of_target in targets.items()}
    lines: list[str] = []
    tables: list[Table] = []
    pictures: dict[str, Picture] = {}
    for port, of_target in targets.items():
        lines += _summary(figures, of_target, subject, port)
        apart = "" if len(targets) == 1 else f" at {port}"
        tables.append(_table(of_target, apart))
        suffix = "" if len(targets) == 1 else f"_{port.name.replace('/', '_')}"
        for name, picture in _pictures(of_target, apart).items():
            pictures[f"{name}{suffix}"] = picture
    return Outcome(
        figures, [*lines, _clean(figures, next(iter(targets.values())))], tables, pictures
    )


def _of_target(measured: Losses, how: Sequence[Replacement], subject: Subject) -> dict[str, Any]:
    """The figures of the replacements at one target."""
    positions = {}
    for row, replacement in enumerate(how, 1):
        if replacement.name in (subject.noun.lower(), "random"):
            name = f"{replacement.name}, {replacement.where}"
            positions[name] = by_position(measured, row)
    return {"rows": figures_of(measured, how), "by_position": positions}


def _summary(
    figures: dict[str, Any], of_target: dict[str, Any], subject: Subject, port: Port
) -> list[str]:
    rows = {(row["name"], row["where"]): row for row in of_target["rows"]}
    replaced = figures["replaced"]
    own = subject.noun.lower()
    place = f"{port}'s residual" if subject.is_resid_post else str(port)
    lines = []
    for where in (ALL, TRAINED):
        spliced = rows[own, where]
        random = rows["random", where]
        lines.append(
            f"With the {subject.noun}'s reconstruction in place of {place} at "
            f"{where}, {replaced[where]:,} of {replaced[ALL]:,}, the model loses "
            f"{formatted(spliced['difference'], '.4f')} nats per token: loss recovered "
            f"{formatted(spliced['loss_recovered'], '.2%')} of zero ablation's, "
            f"{formatted(spliced['loss_recovered_of_mean'], '.2%')} of mean ablation's, KL score "
            f"{formatted(spliced['kl_score'], '.2%')}. A random error of the same length costs "
            f"{formatted(random['difference'], '.4f')}; the {subject.noun}'s KL is "
            f"{formatted(spliced['kl_of_random'], '.2f')} times that one's."
        )
        if ("skip", where) in rows:
            without = [f"its skip alone {formatted(rows['skip', where]['difference'], '.4f')}"]
            if ("linear", where) in rows:
                cost = formatted(rows["linear", where]["difference"], ".4f")
                without.append(f"a linear map {cost}")
            lines[-1] += f" Without latents, {', '.join(without)}."
    moved = rows["identity", ALL]["largest_difference"]
    if moved == 0:
        lines[0] += " The identity splice changes no token's loss, exactly."
    else:
        lines[0] += (
            " The identity splice, which must change nothing, moves a token's loss by up to "
            f"{moved:.1e} nats: no figure here is better than that."
        )
    return lines


def _clean(figures: dict[str, Any], of_target: dict[str, Any]) -> str:
    """The model as it is, and what brackets are worth."""
    clean = of_target["rows"][0]
    return (
        f"The model itself has {formatted(clean['ce'], '.4f')} nats on these "
        f"{figures['tokens']:,} tokens of {figures['documents']} documents. "
        f"{resampled(figures['documents'], 'document')} Differences are paired."
    )


_COLUMNS = {  # of the table: figure, head and form
    "ce": ("CE (nats)", ".4f"),
    "difference": ("difference", "+.4f"),
    "loss_recovered": ("loss recovered", ".2%"),
    "loss_recovered_of_mean": ("of mean ablation", ".2%"),
    "kl": ("KL (nats)", ".4f"),
    "kl_score": ("KL score", ".2%"),
}


def _table(figures: dict[str, Any], apart: str) -> Table:
    header = ("stream", "where", *(head for head, _ in _COLUMNS.values()))
    rows = []
    for row in figures["rows"]:
        cells = [row["name"], row["where"]]
        for key, (_, form) in _COLUMNS.items():
            cells.append(formatted(row[key], form) if key in row else "")
        rows.append(tuple(cells))
    return Table(f"The model with each stream{apart}, nats per token", header, rows)


def _pictures(figures: dict[str, Any], apart: str = "") -> dict[str, Picture]:
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
            f"Cross entropy with each stream in place of the residual{apart}",
            whiskers(names, values, intervals, "CE, nats per token"),
        ),
        "splice_position": Picture(
            f"What the replacement costs by position in the piece{apart}",
            bands(lines, x_label, "CE more than clean, nats", log=True),
        ),
    }


DEFINITION = Definition(splice, version=2, options=Options, refuses=refusals.two_models, order=10)
