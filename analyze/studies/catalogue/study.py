"""What every latent is: density, moments, strongest contexts and quantiles, histogram, logits,
neighbours.

For all latents in one pass over stored rows, without a language-model pass. Every unit is encoded
once and its pairs of latent and token are kept as a file of the inverted index (index.py), by which
the study goes on where it was stopped; the rest follows from the index: a state of 4 kB a latent
(state.py), and the table (table.py). In the study's folder:

    features.parquet            one row per latent
    index/unit_NNNNNN.parquet   where latents fire: `index.Index.open(folder / "index").search(latent)`
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analyze import contexts, directions, results
from analyze import drawing as pictures
from analyze.outcome import Outcome, Picture, Table
from analyze.results import FEATURES, made
from analyze.studies.catalogue import index as inverted_index
from analyze.studies.catalogue import table as feature_table
from analyze.studies.catalogue.index import Index
from analyze.studies.catalogue.state import SEED, State
from analyze.studies.catalogue.table import Content, Ranked
from analyze.study import Definition, Study
from analyze.subject import Subject
from data import durable
from data.errors import PipelineError, SettingError, StopRequest, StoreError
from data.journal import Progress, duration
from data.rows.split import held_out_units, require_complete
from data.settings import build

FILE, FOLDER = FEATURES, "index"
VERSION = 1  # of the files of the index
PARTS = ("held_out", "all")
# random places kept per place shown: with 10 quantiles of 5, one in 2,000 quantiles is left with
# fewer
_SAMPLE = 3
_NEIGHBOURS = 10
_SHOWN, _SHOWN_TOKENS = (
    20,
    5,
)  # in the study's own table: latents, and of each contexts, tokens, neighbours


class Files(NamedTuple):
    """A run's catalogue as it was left."""

    table: Path
    # of the units that the table is of: a catalogue that was stopped while it grew left more
    places: Index


def files(subject: Subject) -> Files:
    """What the study has left.

    Raises:
        StoreError: the run has no catalogue of its present SAE, or some of its files are gone.
    """
    result = results.current(subject.run, subject.digest).get("catalogue")
    lacks = None
    if result is None:
        lacks = "no whole catalogue; run"
    elif not _is_table(result.folder / FILE):
        lacks = f"a damaged {FILE}; delete it, and run"
    if result is None or lacks:
        raise StoreError(
            f"{subject.run} has {lacks} `python -m analyze study=catalogue run={subject.run}`"
        )
    return Files(result.folder / FILE, Index.open(result.folder / FOLDER))


def _is_table(path: Path) -> bool:
    try:
        return bool(pq.read_schema(path).names)
    except (OSError, pa.ArrowInvalid):
        return False


@dataclass(frozen=True)
class Options:
    """What the catalogue holds."""

    part: str = "held_out"  # of the store, one of PARTS
    rows: int = 4_000_000  # at most, in whole units
    top: int = 20  # contexts with the largest activations
    quantiles: int = 10  # equal parts of a latent's activations
    each: int = 5  # contexts of every part
    logits: int = (
        10  # token ids raised, and as many lowered; 0: none, and the language model is not loaded
    )

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise SettingError(f"study.part={self.part} must be one of {', '.join(PARTS)}")
        if self.rows < 1:
            raise SettingError(f"study.rows={self.rows} must be at least 1")
        for name, least, most in (
            ("top", 1, 1000),
            ("quantiles", 1, 100),
            ("each", 0, 100),
            ("logits", 0, 1000),
        ):
            if not least <= getattr(self, name) <= most:
                raise SettingError(
                    f"study.{name}={getattr(self, name)} must be from {least} to {most}"
                )


def inputs(study: Study) -> dict[str, Any]:
    """What the catalogue depends on beside the settings, for `Study.perform`."""
    return {"as_ids": names(study) is None}


def catalogue(study: Study) -> Outcome:
    """The catalogue of a run's latents, its files and what they say in all."""
    options, subject = build(Options, "study", study.options), study.subject
    # Units that were encoded for other settings, or before a stop, are not encoded again.
    folder = study.kept_folder("postings", {"version": VERSION, "follows": _identity(subject)})
    with StopRequest() as stop:
        state, index, encoded = read(subject, options, folder, stop)
        index = linked(index, made(study.folder / FOLDER))
        if not state.rows:
            raise StoreError(
                f"no row of {subject.store.name} that was read passes the run's policy {subject.policy}"
            )
        raised_lowered, refusal = _logits(study, options.logits, stop)
        content = Content(
            store=subject.store,
            index=index,
            state=state,
            neighbours=neighbours(subject),
            logits=raised_lowered,
            names=names(study),
            quantiles=options.quantiles,
            each=options.each,
        )
        feature_table.write(study.folder / FILE, content, stop)
    return _outcome(study, content, encoded, refusal)


def linked(index: Index, folder: Path) -> Index:
    """The index of the same units in `folder`, whose files are hard links, or copies."""
    for unit in index.units:
        path = index.path(unit)
        try:
            os.link(path, folder / path.name)
        except OSError:  # of a file system without links
            durable.write(folder / path.name, [path.read_bytes()])
    return replace(index, folder=folder)


# -- the pass --------------------------------------------------------------------------------------


def units_of(subject: Subject, options: Options) -> list[int]:
    """The units to read, until they have at least as many tokens as rows are asked for."""
    require_complete(subject.store, subject.layer)
    every = (
        list(range(subject.store.units)) if options.part == "all" else held_out_units(subject.store)
    )
    before = np.cumsum([0, *(subject.store.rows_of(unit) for unit in every)])[:-1]
    return [unit for unit, tokens in zip(every, before, strict=True) if tokens < options.rows]


def read(
    subject: Subject, options: Options, folder: Path, stop: StopRequest
) -> tuple[State, Index, dict[str, float]]:
    """The state after all units; every unit that has no file in `folder` yet is encoded and gets
    one.

    Returns:
        the state, the index, and rows encoded with the seconds that took, all work on them
            included.
    """
    index = Index(folder, units_of(subject, options), subject.sae.d_sae, subject.store.unit_tokens)
    identity = _identity(subject)
    for path in folder.glob("unit_*.parquet"):
        if inverted_index.rows_of(path, identity) is None:
            path.unlink()  # of an SAE that was here before: a search would mix the two
    scale = float(np.sqrt(subject.moments.variance.sum()))
    sample = _SAMPLE * options.quantiles * options.each
    state = State(index.d_sae, scale, top=options.top, sample=max(sample, 1))
    spent, fresh, progress = 0.0, 0, Progress()
    for number, unit in enumerate(index.units):
        stop.check()
        began, path = time.perf_counter(), index.path(unit)
        if (kept := inverted_index.rows_of(path, identity)) is None:
            found, rows = inverted_index.encode(subject, subject.unit(unit))
            inverted_index.write(
                path, found, identity, rows=rows, d_sae=index.d_sae, unit_tokens=index.unit_tokens
            )
            state.update(unit, index.unit_tokens, found, rows)
            spent, fresh = spent + time.perf_counter() - began, fresh + rows
        else:
            state.update(unit, index.unit_tokens, index.all_of(unit), kept)
        left = duration(spent / max(fresh, 1) * index.unit_tokens * (len(index.units) - number - 1))
        progress.show(
            f"unit {number + 1}/{len(index.units)}, {left} left",
            last=number + 1 == len(index.units),
        )
    return state, index, {"rows": fresh, "seconds": spent}


def _identity(subject: Subject) -> str:
    """Digest of what the index follows from."""
    said = {
        "weights": [
            durable.digest(tensor.cpu().numpy().tobytes())
            for tensor in subject.sae.tensors().values()
        ],
        "k": subject.sae.k,
        "layer": subject.layer,
        "store": subject.store.identity,
        "policy": vars(subject.policy),
    }
    return durable.digest(json.dumps(said, sort_keys=True).encode())


# -- weights ---------------------------------------------------------------------------------------


def neighbours(subject: Subject) -> Ranked:
    """Of each latent those whose decoder directions have the largest cosines with its own."""
    W_dec = subject.sae.W_dec
    cosines, ids = directions.nearest(W_dec, W_dec, min(_NEIGHBOURS, len(W_dec) - 1), itself=False)
    return Ranked(cosines.cpu().numpy(), ids.cpu().numpy())


def _logits(
    study: Study, count: int, stop: StopRequest
) -> tuple[tuple[Ranked, Ranked] | None, str | None]:
    """What each latent raises and lowers; or why there is none, if the language model is not at
    hand.
    """
    if not count:
        return None, "study.logits=0"
    try:
        lm = study.lm
    except SettingError as error:
        return None, str(error)
    progress = Progress()

    def show(done: int, total: int) -> None:
        stop.check()
        progress.show(f"logits of {done:,}/{total:,} token ids", last=done == total)

    found = directions.logits(lm, study.subject.sae.W_dec, count, show)
    raised, lowered = (Ranked(scores.numpy(), ids.numpy()) for scores, ids in found)
    return (raised, lowered), None


def names(study: Study, *, raw: bool = False) -> Callable[[int], str] | None:
    """What token ids say, if the tokenizer is at hand."""
    try:
        return contexts.token_names(study.subject, study.model.path, raw=raw)
    except PipelineError:
        return None


# -- output ----------------------------------------------------------------------------------------


def _outcome(
    study: Study, content: Content, encoded: dict[str, float], refusal: str | None
) -> Outcome:
    state = content.state
    density, alive = state.count / state.rows, state.count > 0
    figures: dict[str, Any] = {
        "rows": state.rows,
        "units": list(content.index.units),
        "features": len(density),
        "silent": int((~alive).sum()),
        "density_above_1_percent": int((density > 0.01).sum()),
        "density_above_10_percent": int((density > 0.1).sum()),
        "pairs": int(state.count.sum()),
        "l0": float(state.count.sum() / state.rows),
        "histogram_edges": state.edges.tolist(),
        "histogram_clipped": float(_clipped(state)),
        "encoded": encoded,
        "no_logits": refusal,
        "sample_seed": SEED,
        "files": [FILE, FOLDER],
    }
    shown = _shown(study.folder / FILE, contexts.choose(state.count, _SHOWN))
    drawn = {
        "density": Picture(
            "How often latents fire", _histogram(np.log10(density[alive]), "log10 density")
        ),
        "largest": Picture(
            "Largest activation of each latent",
            _histogram(np.log10(state.largest[alive]), "log10 largest activation"),
        ),
    }
    left = [
        FILE,
        *(str(Path(FOLDER, content.index.path(unit).name)) for unit in content.index.units),
    ]
    return Outcome(figures, _summary(figures), [shown], drawn if alive.any() else {}, left)


def _clipped(state: State) -> float:
    """Share of activations in the histogram's two end bins, which take what is beyond them."""
    return float(state.histogram[:, [0, -1]].sum() / max(state.histogram.sum(), 1))


def _summary(figures: dict[str, Any]) -> list[str]:
    rows, features = figures["rows"], figures["features"]
    lines = [
        f"{features:,} latents in one pass over {rows:,} rows: {FILE} has a row for each, {FOLDER}/ all "
        f"{figures['pairs']:,} places where they fire (L0 {figures['l0']:.1f}).",
        # No event in n trials: 1 - 0.05^(1/n), 3 / n ("rule of three"; Hanley and Lippman-Hand,
        # 1983).
        f"{figures['silent']:,} latents never fire; were rows independent, each would be below a density of "
        f"{1 - 0.05 ** (1 / rows):.2g} with 95 % confidence.",
        f"{figures['density_above_1_percent']:,} fire in more than 1 % of rows, "
        f"{figures['density_above_10_percent']:,} in more than 10 %.",
    ]
    if encoded := figures["encoded"]["rows"]:
        speed = encoded / figures["encoded"]["seconds"]
        lines.append(
            f"The pass took {speed:,.0f} tokens/s: reading, encoding, indexing and counting {encoded:,} rows."
        )
    if figures["no_logits"]:
        lines.append(f"There are no logits: {figures['no_logits']}.")
    return lines


def _histogram(values: Any, label: str) -> str:
    counts, edges = np.histogram(values, bins=40)
    return pictures.histogram(counts.tolist(), edges.tolist(), label, "latents")


def _shown(path: Path, chosen: list[int]) -> Table:
    """Some latents spread over the ranking by density, from the table as anybody reads it."""
    columns = ["feature", "density", "mean", "max", "top", "raised", "neighbours"]
    found = pq.read_table(
        path, columns=columns, filters=[("feature", "in", chosen or [0])]
    ).to_pylist()
    rows = {row["feature"]: row for row in found}
    lines = []
    for feature in chosen:
        row = rows[feature]
        peaks = [(one["text"] or one["tokens"])[one["peak"]] for one in row["top"][:_SHOWN_TOKENS]]
        raised = [one["text"] or one["token"] for one in (row["raised"] or [])[:_SHOWN_TOKENS]]
        near = row["neighbours"][0] if row["neighbours"] else None
        lines.append(
            (
                str(feature),
                f"{row['density']:.3%}",
                f"{row['mean']:.3g}",
                f"{row['max']:.3g}",
                " ".join(f"`{token}`" for token in peaks),
                " ".join(f"`{token}`" for token in raised) or "-",
                f"{near['feature']} ({near['cosine']:.2f})" if near else "-",
            )
        )
    header = ("latent", "density", "mean", "max", "strongest at", "raises", "nearest (cosine)")
    caption = f"{len(chosen)} latents spread evenly over the ranking by density, none picked for its looks."
    return Table(caption, header, lines)


DEFINITION = Definition(catalogue, options=Options, inputs=inputs, order=80)
