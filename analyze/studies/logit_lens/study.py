"""What the model would say if it ended after each layer: softcap(unembed(final_norm(h_l)))
(nostalgebraist, 2020).

h_l is the residual stream behind layer l, before the final norm, the last layer's too, so that the
last layer's lens is the model's own prediction. A prompt is the first tokens of a held-out
document's longest piece, one per document. Positions are those behind which a token follows, the
BOS left out. Of each, with p_l the lens' distribution:

    mass        p_l of all ids of a class of text (analyze/studies/logit_lens/token_classes.py)
    CE          -ln p_l(next token), nats
    KL          KL(p_last || p_l), nats: as the tuned lens is measured (Belrose et al., arXiv 2303.08112)
    rank        of the last layer's top token in p_l, from 1; its mean is the geometric one, as a few ranks are huge
    agrees      whether the top token is the last layer's
    commitment  the first layer from which mass(target) >= 0.5 at every later layer; none if the last has less

Null: the unembedding's rows in random order. The lens is then as peaked as before, and its words
mean nothing. Intervals are from resampling prompts.

Shapes: L layers, n positions of all prompts, C classes, S orders of the null, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyze import language_model, pieces
from analyze.contexts import visible
from analyze.language_model import BLOCK_BYTES, Prediction, residuals
from analyze.outcome import Outcome, Picture
from analyze.pieces import Piece
from analyze.stats import Floats, Interval, bootstrap, bootstrap_ratios, figure, percentiles
from analyze.studies.logit_lens import words as logit_lens_page
from analyze.studies.logit_lens.heat_map import heat_map
from analyze.studies.logit_lens.token_classes import CLASSES, classes
from analyze.study import Definition, Study
from analyze.subject import Subject
from data.errors import SettingError, StopRequest, StoreError
from data.journal import Progress
from data.settings import build
from harvest.model import LanguageModel

ORDERS = 20  # of the unembedding's rows
SEED = 0
_MAP_TOKENS = 24  # of the heat map
_COMMON = 3  # top tokens named per layer
_SCALARS = ("ce", "kl", "rank", "agrees")


@dataclass(frozen=True)
class Options:
    """What is read, and what is looked for."""

    prompts: int = 200  # documents
    tokens: int = 128  # of a prompt, at most
    target: str = "english"  # one of CLASSES

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise SettingError(
                f"study.prompts={self.prompts} must be at least 2: intervals are from resampling them"
            )
        if self.tokens < 2:
            raise SettingError(
                f"study.tokens={self.tokens} must be at least 2: the BOS and a token to read"
            )
        if self.target not in CLASSES:
            raise SettingError(f"study.target={self.target} must be one of {', '.join(CLASSES)}")


class Reading(NamedTuple):
    """The lens at every position, prompt by prompt."""

    prompt: NDArray[np.int64]  # (n,) number of the prompt, each prompt's positions together
    following: NDArray[np.int64]  # (n,) the next token
    top: NDArray[np.int64]  # (L, n) most probable id
    top_p: NDArray[np.float32]  # (L, n)
    ce: NDArray[np.float32]  # (L, n)
    kl: NDArray[np.float32]  # (L, n)
    rank: NDArray[np.int64]  # (L, n)
    mass: NDArray[np.float32]  # (L, n, C)
    shuffled_target: NDArray[np.float32]  # (L, n, S) mass of the target class under the null
    shuffled_mass: NDArray[np.float64]  # (L, C, S) mean over positions
    shuffled_ce: NDArray[np.float64]  # (L, S) likewise

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Where each prompt's positions begin."""
        return np.flatnonzero(np.diff(self.prompt, prepend=-1))


class Null(NamedTuple):
    """The vocabulary's classes, with the unembedding's rows in their own and in S random orders."""

    orders: Tensor  # (V, S) the id whose row an id has
    members: (
        Tensor  # (V, (1 + S) C) float32, 1 where the id's row counts for a class, order by order
    )


# -- the pass --------------------------------------------------------------------------------------


def prompts(subject: Subject, count: int) -> list[Piece]:
    """The longest piece of each of the first `count` held-out documents that have two tokens to
    read.

    Raises:
        StoreError: there are fewer than two.
    """
    longest: dict[int, Piece] = {}
    for piece in pieces.held_out(subject):
        if piece.document not in longest and len(longest) == count:
            break
        if len(piece.ids) > max(
            2, len(longest[piece.document].ids) if piece.document in longest else 0
        ):
            longest[piece.document] = piece
    if len(longest) < 2:
        raise StoreError(
            f"{subject.store.name} holds out no two documents of two tokens; harvest more"
        )
    return list(longest.values())


def shuffled(kinds: NDArray[np.int64], device: str) -> Null:
    """The null of a vocabulary whose ids have classes `kinds` (V,)."""
    rng, own = np.random.default_rng(SEED), np.eye(len(CLASSES), dtype=np.float32)[kinds]
    orders = np.stack([rng.permutation(len(kinds)) for _ in range(ORDERS)], 1)
    members = np.stack([own, *(np.empty_like(own) for _ in range(ORDERS))], 1)  # (V, 1 + S, C)
    for number, order in enumerate(orders.T, 1):
        members[order, number] = own
    return Null(
        torch.from_numpy(orders).to(device),
        torch.from_numpy(members.reshape(len(kinds), -1)).to(device),
    )


def read(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    null: Null,
    target: int,
    stop: StopRequest,
    block_bytes: int = BLOCK_BYTES,
) -> Reading:
    """The lens on every sequence's tokens but the first and the last.

    Args:
        target: number of the class of which the null's mass is kept by position.
        block_bytes: of one layer's logits at a time.
    """
    layers = range(len(lm.blocks))
    parts: list[list[NDArray[Any]]] = []
    sums: list[NDArray[np.float64]] = []
    progress = Progress()
    for done, (number, states) in enumerate(residuals(lm, sequences, layers), 1):
        stop.check()
        following = torch.tensor(sequences[number][2:], device=lm.config.device)
        for part in language_model.blocks(lm, len(following), block_bytes):
            ids = following[part]
            *columns, masses, losses = _lens(
                lm, [states[layer][1:-1][part] for layer in layers], ids, null
            )
            masses = masses.reshape(*masses.shape[:2], 1 + ORDERS, len(CLASSES))
            parts.append([np.full(len(ids), number), ids.cpu().numpy(), *columns])
            parts[-1] += [masses[:, :, 0], masses[:, :, 1:, target]]
            sums.append(
                np.dstack(
                    [masses[:, :, 1:].sum(1, dtype=np.float64), losses.sum(1, dtype=np.float64)]
                )
            )
        progress.show(f"{done}/{len(sequences)} prompts", last=done == len(sequences))
    joined = [
        np.concatenate(column, min(column[0].ndim - 1, 1)) for column in zip(*parts, strict=True)
    ]
    means = np.sum(sums, 0) / len(joined[0])  # (L, S, C + 1)
    return Reading._make([*joined, means[:, :, :-1].swapaxes(1, 2), means[:, :, -1]])


@torch.inference_mode()
def _lens(
    lm: LanguageModel, states: Sequence[Tensor], following: Tensor, null: Null
) -> list[NDArray[Any]]:
    """Of m positions, whose states are (m, d) by layer: top, top_p, ce, kl, rank (L, m), masses and
    the null's CE.

    Everything is reduced where it was computed: only one layer's (m, V), and the last one's, are
    there at a time.
    """
    last = Prediction.of_states(lm, states[-1])
    best = last.log_p.argmax(1, keepdim=True)
    found: list[list[Tensor]] = []
    for state in states:
        lens = Prediction.of_states(lm, state)
        top_p, top = lens.p.max(1)
        ce = lens.cross_entropy(following)
        kl = last.kl(lens)
        rank = (lens.log_p > lens.log_p.gather(1, best)).sum(1) + 1
        masses = lens.p @ null.members
        shuffled_ce = -lens.log_p.gather(1, null.orders[following])
        found.append([top, top_p, ce, kl, rank, masses, shuffled_ce])
    return [torch.stack(column).cpu().numpy() for column in zip(*found, strict=True)]


# -- figures ---------------------------------------------------------------------------------------


def commitment(mass: NDArray[Any]) -> Floats:
    """(n,) the first layer from which mass (L, n) is at least one half at every later one; NaN
    where none is.
    """
    held = np.logical_and.accumulate((mass >= 0.5)[::-1])[::-1]
    return np.where(held[-1], held.argmax(0), np.nan)


def by_layer(reading: Reading) -> list[dict[str, Any]]:
    """Of each layer the mean of every figure over positions, with its interval, and of the null."""
    log_rank, agrees = np.log(reading.rank), reading.top == reading.top[-1]
    columns = np.stack(
        [*np.moveaxis(reading.mass, 2, 0), reading.ce, reading.kl, log_rank, agrees], 2
    )
    names = (*CLASSES, *_SCALARS)
    firsts = reading.firsts
    sums = np.add.reduceat(columns.astype(np.float64), firsts, axis=1)  # (L, prompts, figures)
    counts = np.diff(np.append(firsts, len(reading.prompt))).astype(np.float64)
    means = sums.sum(1) / counts.sum()
    intervals = bootstrap_ratios(
        np.moveaxis(sums, 1, 0).reshape(len(firsts), -1), counts, seed=SEED
    )
    found = []
    for layer, mean in enumerate(means):
        of_layer = intervals[layer * len(names) : (layer + 1) * len(names)]
        row = {
            name: figure(value, bounds)
            for name, value, bounds in zip(names, mean, of_layer, strict=True)
        }
        row["rank"] = figure(
            np.exp(mean[names.index("rank")]), Interval(*np.exp(of_layer[names.index("rank")]))
        )
        null = {
            name: _null(reading.shuffled_mass[layer, number]) for number, name in enumerate(CLASSES)
        }
        found.append(
            {"layer": layer, **row, "shuffled": {**null, "ce": _null(reading.shuffled_ce[layer])}}
        )
    return found


def _null(values: NDArray[Any]) -> dict[str, Any]:
    """Mean and middle 95 % over the orders of the unembedding's rows, but those in which it is not
    defined.
    """
    exact = values.astype(np.float64)
    return figure(_defined(np.mean, exact), percentiles(exact))


def _committed(reading: Reading, target: int) -> dict[str, Any]:
    """When positions commit to the target class, and how often."""
    layer = commitment(reading.mass[:, :, target])
    firsts = reading.firsts
    groups = np.split(layer, firsts[1:])
    medians = np.array([_defined(np.median, group) for group in groups])
    sums = np.array([np.nansum(group) for group in groups])
    commits = np.array([np.sum(~np.isnan(group)) for group in groups], np.float64)
    counts = np.array([len(group) for group in groups], np.float64)

    def mean(cases: NDArray[np.int64]) -> float:
        return (
            float(sums[cases].sum() / commits[cases].sum())
            if commits[cases].any()
            else float("nan")
        )

    def median(cases: NDArray[np.int64]) -> float:
        return _defined(np.median, medians[cases])

    def never(cases: NDArray[np.int64]) -> float:
        return float(1 - commits[cases].sum() / counts[cases].sum())

    every = np.arange(len(groups))
    under_null = [commitment(mass) for mass in np.moveaxis(reading.shuffled_target, 2, 0)]
    of_layers = np.bincount(layer[~np.isnan(layer)].astype(int), minlength=len(reading.mass))
    return {
        "class": CLASSES[target],
        **{
            name: figure(statistic(every), bootstrap(statistic, len(every), seed=SEED)[0])
            for name, statistic in (
                ("mean_layer", mean),
                ("median_layer", median),
                ("never", never),
            )
        },
        "positions_by_layer": of_layers,
        "shuffled": {
            "never": _null(np.array([np.isnan(one).mean() for one in under_null])),
            "mean_layer": _null(np.array([_defined(np.mean, one) for one in under_null])),
        },
    }


def _defined(statistic: Callable[[Floats], Any], values: Floats) -> float:
    """A statistic of what is no NaN; NaN of nothing."""
    left = values[~np.isnan(values)]
    return float(statistic(left)) if len(left) else float("nan")


# -- the study -------------------------------------------------------------------------------------


def logit_lens(study: Study) -> Outcome:
    """The lens over held-out documents: text classes, CE, KL, rank and commitment by layer, beside
    their null.
    """
    options, lm = build(Options, "study", study.options), study.lm
    target = CLASSES.index(options.target)
    chosen = prompts(study.subject, options.prompts)
    sequences = [piece.ids[: options.tokens + 1] for piece in chosen]
    deviation = language_model.head_deviation(lm, sequences[0])
    kinds = classes(lm.tokenizer, language_model.vocabulary_size(lm))
    with StopRequest() as stop:
        reading = read(lm, sequences, shuffled(kinds, lm.config.device), target, stop)
    layers, committed = by_layer(reading), _committed(reading, target)
    share = np.bincount(kinds, minlength=len(CLASSES)) / len(kinds)
    following = np.bincount(kinds[reading.following], minlength=len(CLASSES)) / len(
        reading.following
    )
    common = [_common(reading.top[layer], lm) for layer in range(len(layers))]
    figures = {
        "prompts": len(chosen),
        "positions": len(reading.prompt),
        "documents": [piece.document for piece in chosen],
        "seed": SEED,
        "orders": ORDERS,
        "head_deviation": deviation,
        "vocabulary_share": dict(zip(CLASSES, share, strict=True)),
        "next_token_share": dict(zip(CLASSES, following, strict=True)),
        "commitment": committed,
        "layers": [{**row, "top": top} for row, top in zip(layers, common, strict=True)],
    }
    pictures = logit_lens_page.pictures(figures)
    shown = next(
        number for number, one in enumerate(sequences) if len(one) == max(map(len, sequences))
    )
    pictures["logit_lens_map"] = _map(reading, shown, sequences[shown], lm)
    return Outcome(
        figures, logit_lens_page.summary(figures), logit_lens_page.tables(figures), pictures
    )


def _common(top: NDArray[np.int64], lm: LanguageModel) -> list[dict[str, Any]]:
    """The ids that are most often the most probable one, with their share of positions."""
    counted = Counter(top.tolist()).most_common(_COMMON)
    return [
        {"id": token, "text": _text(lm, token), "share": count / len(top)}
        for token, count in counted
    ]


def _map(reading: Reading, number: int, sequence: Sequence[int], lm: LanguageModel) -> Picture:
    """The top token by layer and position, at the end of one prompt."""
    at = np.flatnonzero(reading.prompt == number)[-_MAP_TOKENS:]
    words = [[_text(lm, int(token)) for token in row] for row in reading.top[:, at]]
    read_ = [_text(lm, token) for token in sequence[1:-1][-len(at) :]]
    drawn = heat_map(
        reading.top_p[:, at], words, read_, "token read", "layer", "p of the top token"
    )
    return Picture(
        f"The lens' top token by layer over the last {len(at)} tokens of the longest prompt", drawn
    )


def _text(lm: LanguageModel, token: int) -> str:
    return visible(lm.tokenizer.backend.decode([token], skip_special_tokens=False))


DEFINITION = Definition(logit_lens, options=Options, order=60)
