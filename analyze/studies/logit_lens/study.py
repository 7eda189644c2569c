"""The logit lens: what the language model would predict if it ended after each layer.

The lens of layer l is softcap(unembed(final_norm(h_l))) (nostalgebraist, 2020). h_l is the residual
stream behind layer l, before the final norm, also for the last layer: the last layer's lens is the
model's own prediction. A prompt is the first tokens of a held-out document's longest piece, one per
document, or with problems= of a question as `answers.prompt` puts it. Positions are those behind
which a token follows, without BOS. With p_l the lens' distribution, a position has:

    mass        p_l of all ids of a class of text or a script (analyze/token_classes.py)
    CE          -ln p_l(next token), nats
    KL          KL(p_last || p_l), nats: as the tuned lens is measured (Belrose et al.,
                arXiv 2303.08112)
    rank        of the last layer's top token in p_l, from 1; its mean is the geometric one, because
                a few ranks are huge
    agrees      whether the top token is the last layer's
    commitment  the first layer from which mass(target) >= 0.5 at every later layer; none if the
                last layer has less

Bands are runs of layers: thirds, unless `study.bands` says where each begins.

Null: the unembedding's rows in random order. The lens is then as peaked as before, and its words
mean nothing. Intervals are from resampling prompts.

Shapes: L layers, n positions of all prompts, m positions of one block, C classes and scripts, S
    orders of the null, V vocabulary, d d_model.

Figures of a prompt are kept on the host, so it waits for the device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze import language_model, pieces
from residual_saes.analyze.language_model import (
    BATCH_TOKENS,
    BLOCK_BYTES,
    Prediction,
    batch_tokens,
    batches,
    residuals,
)
from residual_saes.analyze.latents.contexts import visible
from residual_saes.analyze.outcome import Outcome, Picture
from residual_saes.analyze.parts import NOWHERE, Arrays, Parts
from residual_saes.analyze.pieces import Piece
from residual_saes.analyze.questions.answering import asking_of, inputs, model_key, questions
from residual_saes.analyze.results import digest_of
from residual_saes.analyze.stats import (
    Floats,
    Interval,
    bootstrap,
    bootstrap_ratios,
    figure,
    percentiles,
)
from residual_saes.analyze.studies.logit_lens import words
from residual_saes.analyze.studies.logit_lens.heat_map import heat_map
from residual_saes.analyze.study import Definition, Study
from residual_saes.analyze.subject import Subject
from residual_saes.analyze.token_classes import NAMES, members
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.journal import Progress, note
from residual_saes.data.settings import build
from residual_saes.harvest.model import LanguageModel

ORDERS = 20  # of the unembedding's rows
SEED = 0
VERSION = 2  # of what is kept of each batch: raise it when the same prompts give something else
_MAP_TOKENS = 24  # of the heat map
_COMMON = 3  # top tokens named per layer
_BY_POSITION = 9  # fields of `Reading`, the first ones
_SCALARS = ("ce", "kl", "rank", "agrees")


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/logit_lens.yaml."""

    prompts: int = 200  # documents, or questions if there are problems
    tokens: int = 128  # of a prompt, at most
    target: str = "english"  # one of NAMES
    bands: Sequence[int] | None = None  # first layers of all bands but the first; None: thirds

    def __post_init__(self) -> None:
        if self.prompts < 2:
            raise SettingError(
                f"study.prompts={self.prompts} must be at least 2: "
                "intervals are from resampling them"
            )
        if self.tokens < 2:
            raise SettingError(
                f"study.tokens={self.tokens} must be at least 2: the BOS and a token to read"
            )
        if self.target not in NAMES:
            raise SettingError(f"study.target={self.target} must be one of {', '.join(NAMES)}")

    def bands_of(self, layers: int) -> list[range]:
        """The bands of a model.

        Raises:
            SettingError: `bands` are not rising layers of the model.
        """
        starts = self.bands
        if starts is None:
            starts = sorted({round(layers / 3), round(2 * layers / 3)} - {0, layers})
        if not isinstance(starts, list | tuple) or not all(type(one) is int for one in starts):
            raise SettingError(f"study.bands={starts} must be a list of layers, such as [14,28]")
        edges = [0, *starts, layers]
        if any(first >= second for first, second in pairwise(edges)):
            raise SettingError(
                f"study.bands={list(starts)} must be rising layers between 1 and {layers - 1}"
            )
        return [range(*edge) for edge in pairwise(edges)]


class Reading(NamedTuple):
    """The lens at every position; each prompt's positions lie together."""

    prompt: NDArray[np.int64]  # (n,) number of the prompt
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
        """(prompts,) where each prompt's positions begin."""
        return np.flatnonzero(np.diff(self.prompt, prepend=-1))


class Null(NamedTuple):
    """The vocabulary's classes, with the unembedding's rows in their own and in S random orders."""

    own: NDArray[np.bool_]  # (V, C) see token_classes.members
    orders: Tensor  # (V, S) the id whose row an id has
    # (V, (1 + S) C) float32, order by order: 1 where the id's row counts for a class
    members: Tensor


# -- the pass --------------------------------------------------------------------------------------


def prompts(subject: Subject, count: int) -> list[Piece]:
    """The longest pieces of the first `count` held-out documents, one per document.

    Documents without two tokens to read are left out.

    Raises:
        StoreError: there are fewer than two such documents.
    """
    longest: dict[int, Piece] = {}
    for piece in pieces.held_out(subject):
        known = longest.get(piece.document)
        if known is None and len(longest) == count:
            break
        # BOS and two tokens.
        if len(piece.ids) > (2 if known is None else len(known.ids)):
            longest[piece.document] = piece
    if len(longest) < 2:
        raise StoreError(
            f"{subject.store.name} holds out no two documents of two tokens; harvest more"
        )
    return list(longest.values())


def shuffled(own: NDArray[np.bool_], device: str) -> Null:
    """The null of a vocabulary whose ids are of the classes `own` (V, C)."""
    rng = np.random.default_rng(SEED)
    orders = np.stack([rng.permutation(len(own)) for _ in range(ORDERS)], 1)
    every = np.empty((len(own), 1 + ORDERS, len(NAMES)), np.float32)
    every[:, 0] = own
    for number, order in enumerate(orders.T, 1):
        every[order, number] = own
    flat = every.reshape(len(own), -1)
    return Null(own, torch.from_numpy(orders).to(device), torch.from_numpy(flat).to(device))


def read(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    null: Null,
    target: int,
    stop: StopRequest,
    block_bytes: int = BLOCK_BYTES,
    parts: Parts = NOWHERE,
) -> Reading:
    """The lens on every sequence's tokens but the first and the last.

    Args:
        target: number of the class whose mass under the null is kept by position.
        block_bytes: of one layer's logits at a time.
        parts: where what is read of each batch is kept.
    """
    found: list[Arrays] = []
    done = 0
    progress = Progress()
    for index, (numbers, _) in enumerate(batches(sequences, _batch_tokens(lm))):
        said = f"{done}/{len(sequences)} prompts"

        def make(numbers: Sequence[int] = numbers, said: str = said) -> Arrays:
            return _read_batch(lm, sequences, numbers, null, target, stop, block_bytes, said)

        found.append(parts.of(index, make))
        done += len(numbers)
        progress.show(f"{done}/{len(sequences)} prompts", last=done == len(sequences))
    columns = {}
    for name in Reading._fields[:_BY_POSITION]:
        axis = min(found[0][name].ndim - 1, 1)  # of positions: behind that of layers
        columns[name] = np.concatenate([part[name] for part in found], axis)
    means = np.sum([part["sums"] for part in found], 0) / len(columns["prompt"])
    return Reading(
        **columns, shuffled_mass=means[:, :, :-1].swapaxes(1, 2), shuffled_ce=means[:, :, -1]
    )


def _batch_tokens(lm: LanguageModel) -> int:
    """Tokens of a batch: on a CPU the lens of a single prompt takes long enough."""
    tokens = batch_tokens(lm)
    return tokens if tokens == BATCH_TOKENS else 1


def _read_batch(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    numbers: Sequence[int],
    null: Null,
    target: int,
    stop: StopRequest,
    block_bytes: int,
    said: str,
) -> Arrays:
    """The fields of `Reading` that go by position, and `sums` (L, S, C + 1): the null's masses, and
    its CE, over all positions.

    Args:
        said: how far the study is, for the line of progress.
    """
    layers = range(len(lm.blocks))
    columns: list[list[NDArray[Any]]] = []  # by block
    sums: list[NDArray[np.float64]] = []
    for row, states in residuals(lm, [sequences[number] for number in numbers], layers):
        following = torch.tensor(sequences[numbers[row]][2:], device=lm.config.device)
        for part in language_model.blocks(lm, len(following), block_bytes):
            stop.check()
            note(f"{said}, {part.start}/{len(following)} positions of the next")
            ids = following[part]
            lens = measure(lm, [states[layer][1:-1][part] for layer in layers], ids, null)
            shape = (*lens.masses.shape[:2], 1 + ORDERS, len(NAMES))
            masses = lens.masses.reshape(shape)
            columns.append(
                [
                    np.full(len(ids), numbers[row]),
                    ids.cpu().numpy(),
                    lens.top,
                    lens.top_p,
                    lens.ce,
                    lens.kl,
                    lens.rank,
                    masses[:, :, 0],
                    masses[:, :, 1:, target],
                ]
            )
            shuffled_mass = masses[:, :, 1:].sum(1, dtype=np.float64)
            shuffled_ce = lens.shuffled_ce.sum(1, dtype=np.float64)
            sums.append(np.dstack([shuffled_mass, shuffled_ce]))
    joined = {"sums": np.sum(sums, 0)}
    for name, column in zip(Reading._fields, zip(*columns, strict=True), strict=False):
        joined[name] = np.concatenate(column, min(column[0].ndim - 1, 1))
    return joined


class Lens(NamedTuple):
    """The lens at m positions of one block."""

    top: NDArray[np.int64]  # (L, m)
    top_p: NDArray[np.float32]  # (L, m)
    ce: NDArray[np.float32]  # (L, m)
    kl: NDArray[np.float32]  # (L, m)
    rank: NDArray[np.int64]  # (L, m)
    masses: NDArray[np.float32]  # (L, m, (1 + S) C)
    shuffled_ce: NDArray[np.float32]  # (L, m, S)


@torch.inference_mode()
def measure(lm: LanguageModel, states: Sequence[Tensor], following: Tensor, null: Null) -> Lens:
    """The lens at m positions.

    Everything is reduced where it was computed: only the (m, V) of one layer and of the last one
    are in memory at a time.

    Args:
        states: (m, d) by layer.
        following: (m,) next tokens.
    """
    last = Prediction.of_states(lm, states[-1])
    best = last.log_p.argmax(1, keepdim=True)
    by_layer: list[list[Tensor]] = []
    for state in states:
        lens = Prediction.of_states(lm, state)
        top_p, top = lens.p.max(1)
        ce = lens.cross_entropy(following)
        kl = last.kl(lens)
        rank = (lens.log_p > lens.log_p.gather(1, best)).sum(1) + 1
        masses = lens.p @ null.members
        shuffled_ce = -lens.log_p.gather(1, null.orders[following])
        by_layer.append([top, top_p, ce, kl, rank, masses, shuffled_ce])
    return Lens._make(torch.stack(column).cpu().numpy() for column in zip(*by_layer, strict=True))


# -- figures ---------------------------------------------------------------------------------------


def commitment(mass: NDArray[Any]) -> Floats:
    """(n,) the first layer from which mass (L, n) is at least 0.5 at every later layer.

    NaN where there is none.
    """
    held = np.logical_and.accumulate((mass >= 0.5)[::-1])[::-1]
    return np.where(held[-1], held.argmax(0), np.nan)


def by_layer(reading: Reading) -> list[dict[str, Any]]:
    """Each layer's mean of every figure over positions, with its interval, and the null's."""
    names = (*NAMES, *_SCALARS)
    masses = np.moveaxis(reading.mass, 2, 0)
    agrees = reading.top == reading.top[-1]
    scalars = (reading.ce, reading.kl, np.log(reading.rank), agrees)
    columns = np.stack([*masses, *scalars], 2).astype(np.float64)
    # Sums over each prompt's positions, (L, prompts, figures).
    firsts = reading.firsts
    sums = np.add.reduceat(columns, firsts, axis=1)
    counts = np.diff(np.append(firsts, len(reading.prompt))).astype(np.float64)
    means = sums.sum(1) / counts.sum()
    by_prompt = np.moveaxis(sums, 1, 0).reshape(len(firsts), -1)
    intervals = bootstrap_ratios(by_prompt, counts, seed=SEED)
    rows = []
    for layer, mean in enumerate(means):
        of_layer = intervals[layer * len(names) : (layer + 1) * len(names)]
        row = dict(zip(names, map(figure, mean, of_layer), strict=True))
        # The mean was of log ranks.
        log_rank = row["rank"]
        interval = log_rank["interval"]
        row["rank"] = figure(
            np.exp(log_rank["value"]), interval and Interval(*map(math.exp, interval))
        )
        null = {}
        for number, name in enumerate(NAMES):
            null[name] = _null(reading.shuffled_mass[layer, number])
        null["ce"] = _null(reading.shuffled_ce[layer])
        rows.append({"layer": layer, **row, "shuffled": null})
    return rows


def _null(values: NDArray[Any]) -> dict[str, Any]:
    """Mean and middle 95 % over the orders of the unembedding's rows, NaN left out."""
    exact = values.astype(np.float64)
    return figure(_defined(np.mean, exact), percentiles(exact))


def by_band(reading: Reading, null: Null, bands: Sequence[range]) -> list[dict[str, Any]]:
    """For each band and class the mean mass, and the share of positions that it is the top token's.

    Each is a mean over the band's layers and all positions, with its interval and the null's.
    """
    firsts = reading.firsts
    counts = np.diff(np.append(firsts, len(reading.prompt))).astype(np.float64)
    rows = []
    for band in bands:
        layers = slice(band.start, band.stop)
        top = reading.top[layers]
        under_null = [reading.shuffled_mass[layers].mean(0)]
        shares = [_top_share(null, top, order).mean(0) for order in range(ORDERS)]
        under_null.append(np.stack(shares, 1))
        row: dict[str, Any] = {"first": band.start, "last": band.stop - 1}
        for kind, values, random in zip(
            ("mass", "top"),
            (reading.mass[layers].mean(0), null.own[top].mean(0)),
            under_null,
            strict=True,
        ):
            sums = np.add.reduceat(values.astype(np.float64), firsts, axis=0)
            means = sums.sum(0) / counts.sum()
            intervals = bootstrap_ratios(sums, counts, seed=SEED)
            row[kind] = dict(zip(NAMES, map(figure, means, intervals), strict=True))
            row[f"{kind}_shuffled"] = dict(zip(NAMES, map(_null, random), strict=True))
        rows.append(row)
    return rows


def _top_share(null: Null, top: NDArray[np.int64], order: int) -> Floats:
    """(layers, C) share of positions whose top token is of a class, with rows in a random order.

    Args:
        top: (layers, n) most probable ids with rows in their own order.
    """
    rows = null.orders[:, order].cpu().numpy()
    # Id i has the row of rows[i], so the top token is the id whose row was the top's.
    own = np.empty_like(null.own)
    own[rows] = null.own
    return np.array([own[of_layer].mean(0) for of_layer in top], np.float64)


def committed(reading: Reading, target: int) -> dict[str, Any]:
    """When positions commit to the target class, and how often."""
    layer = commitment(reading.mass[:, :, target])
    by_prompt = np.split(layer, reading.firsts[1:])
    medians = np.array([_defined(np.median, layers) for layers in by_prompt])
    sums = np.array([np.nansum(layers) for layers in by_prompt])
    commits = np.array([np.sum(~np.isnan(layers)) for layers in by_prompt], np.float64)
    counts = np.array([len(layers) for layers in by_prompt], np.float64)

    def mean_layer(cases: NDArray[np.int64]) -> float:
        if not commits[cases].any():
            return float("nan")
        return float(sums[cases].sum() / commits[cases].sum())

    def median_layer(cases: NDArray[np.int64]) -> float:
        return _defined(np.median, medians[cases])

    def never(cases: NDArray[np.int64]) -> float:
        return float(1 - commits[cases].sum() / counts[cases].sum())

    every = np.arange(len(by_prompt))
    figures: dict[str, Any] = {"class": NAMES[target]}
    for statistic in (mean_layer, median_layer, never):
        interval, _ = bootstrap(statistic, len(every), seed=SEED)
        figures[statistic.__name__] = figure(statistic(every), interval)
    under_null = [commitment(mass) for mass in np.moveaxis(reading.shuffled_target, 2, 0)]
    null_never = np.array([np.isnan(layers).mean() for layers in under_null])
    null_mean = np.array([_defined(np.mean, layers) for layers in under_null])
    committing = layer[~np.isnan(layer)].astype(int)
    figures["positions_by_layer"] = np.bincount(committing, minlength=len(reading.mass))
    figures["shuffled"] = {"never": _null(null_never), "mean_layer": _null(null_mean)}
    return figures


def _defined(statistic: Callable[[Floats], Any], values: Floats) -> float:
    """A statistic of the values that are not NaN; NaN if there are none."""
    left = values[~np.isnan(values)]
    return float(statistic(left)) if len(left) else float("nan")


# -- the study -------------------------------------------------------------------------------------


def logit_lens(study: Study) -> Outcome:
    """The lens over held-out documents or questions, layer by layer, beside its null."""
    options = build(Options, "study", study.options)
    bands = options.bands_of(study.n_layers)
    lm = study.lm
    target = NAMES.index(options.target)
    sequences, source = _texts(study, options)
    deviation = language_model.head_deviation(lm, sequences[0])
    own = members(lm.tokenizer, language_model.vocabulary_size(lm))
    key = {
        "version": VERSION,
        **study.identity,
        **model_key(study),
        "target": target,
        "sequences": digest_of({"ids": sequences}),
    }
    parts = study.subject.parts("lens", key)
    null = shuffled(own, lm.config.device)
    with StopRequest() as stop:
        reading = read(lm, sequences, null, target, stop, parts=parts)
    layers = by_layer(reading)
    for layer, top in zip(layers, reading.top, strict=True):
        layer["top"] = _common(top, lm)
    figures = {
        "prompts": len(sequences),
        "positions": len(reading.prompt),
        **source,
        "seed": SEED,
        "orders": ORDERS,
        "head_deviation": deviation,
        "vocabulary_share": _shares(own),
        "next_token_share": _shares(own[reading.following]),
        "commitment": committed(reading, target),
        "layers": layers,
        "bands": by_band(reading, null, bands),
    }
    pictures = words.pictures(figures)
    lengths = [len(sequence) for sequence in sequences]
    longest = lengths.index(max(lengths))
    pictures["logit_lens_map"] = _map(reading, longest, sequences[longest], lm)
    return Outcome(figures, words.summary(figures), words.tables(figures), pictures)


def _texts(study: Study, options: Options) -> tuple[list[list[int]], dict[str, Any]]:
    """The first ids of each prompt, and what they are: questions if there are problems.

    Raises:
        SettingError: there are fewer than two questions.
        StoreError: there are fewer than two documents.
    """
    length = options.tokens + 1
    if study.problems is None:
        chosen = prompts(study.subject, options.prompts)
        source = {"documents": [piece.document for piece in chosen]}
        return [piece.ids[:length] for piece in chosen], source
    asked = questions(study)[: options.prompts]
    if len(asked) < 2:
        raise SettingError(
            f"problems={study.problems} has {len(asked)} question; intervals are from resampling "
            "questions, so give at least two"
        )
    return [ids[:length] for _, ids in asked], {
        "questions": [item.id for item, _ in asked],
        "asked": asking_of(study).prompt,
    }


def _inputs(study: Study) -> Mapping[str, Any]:
    """What answers depend on, as far as the prompts do."""
    if study.problems is None:
        return {}
    asked = inputs(study)
    of_prompts = {name: asked["answers"].get(name) for name in ("prompt", "shots", "questions")}
    return {**asked, "answers": of_prompts}


def _shares(own: NDArray[np.bool_]) -> dict[str, float]:
    """The share of each class and script among ids (., C)."""
    return dict(zip(NAMES, own.mean(0).tolist(), strict=True))


def _common(top: NDArray[np.int64], lm: LanguageModel) -> list[dict[str, Any]]:
    """The ids that are most often the most probable one, with their share of positions."""
    common = []
    for token, times in Counter(top.tolist()).most_common(_COMMON):
        common.append({"id": token, "text": _text(lm, token), "share": times / len(top)})
    return common


def _map(reading: Reading, number: int, sequence: Sequence[int], lm: LanguageModel) -> Picture:
    """The top token by layer and position, at the end of prompt `number`."""
    shown = np.flatnonzero(reading.prompt == number)[-_MAP_TOKENS:]
    top = []
    for row in reading.top[:, shown]:
        top.append([_text(lm, int(token)) for token in row])
    tokens = [_text(lm, token) for token in sequence[1:-1][-len(shown) :]]
    drawn = heat_map(
        reading.top_p[:, shown], top, tokens, "token read", "layer", "p of the top token"
    )
    caption = (
        f"The lens' top token by layer over the last {len(shown)} tokens of the longest prompt"
    )
    return Picture(caption, drawn)


def _text(lm: LanguageModel, token: int) -> str:
    return visible(lm.tokenizer.backend.decode([token], skip_special_tokens=False))


DEFINITION = Definition(logit_lens, version=2, options=Options, inputs=_inputs, order=60)
