"""The catalogue as a cache of EleutherAI's delphi, which explains latents from it.

delphi then does not run the model again. `delphi.latents.LatentDataset` (0.1.3) reads from the
study's folder:

    latents/layers.L/A_B.safetensors   latents A to B, both included; layers.L is sparsify's name
        tokens         (R, T) uint32              packed rows of the indexed units, in every file
        locations      (n, 3) uint16 or uint32    row of `tokens`, position in it, latent - A
        activations    (n,) float16 or float32
    latents/layers.L/config.json       delphi's CacheConfig and the model's name; written last
    neighbours/layers.L-decoder_similarity.json   for non_activating_source=neighbours:
                                       [cosine, latent] of each latent's neighbours
    log/hookpoint_firing_counts.pt     (F,) int64, for its summary of scores

Locations of a latent are in the order of the text. delphi sorts them by latent with a stable sort,
which keeps that order, and its windows need it.

Activations are half precision, as delphi's own. They are single precision where the largest is
beyond 65,504, so nothing is clipped. What rounds to 0 becomes the smallest number above 0, so a
latent fires exactly where the catalogue has it.

delphi cuts rows into windows of example_ctx_len tokens (32), which has to divide T. It knows no
padding: in its own caches a window crosses from one document into the next, and so it does here.
Rows are the store's, with the BOS before each document (on which nothing fires), so a border is
visible. Pieces as rows of their own would need padding, which delphi would sample as text on which
a latent does not fire.

Memory is that of the tokens (4 bytes each), of a file's activations (2 bytes each), and about 150
bytes for each place of a unit where a file's latents fire. At 32,768 latents, 4e6 tokens and
k = 128 that is 16 MB, 32 MB and 40 MB on average; were all of a unit's 8.4e6 places in one file,
1.3 GB. The disk takes 8 bytes for each of 5.1e8 places and 32 times the tokens, 4.6 GB.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.results import made
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.studies.catalogue.index import BLOCK, Index
from residual_saes.analyze.study import Definition, Study, at_least
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.journal import Progress
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.safetensors import Entry, header
from residual_saes.data.settings import build
from residual_saes.harvest.hub_model import described
from residual_saes.train.export.sparsify import folder_of
from residual_saes.train.run import text_of

LATENTS = "latents"
CONFIG = "config.json"
COUNTS = "log/hookpoint_firing_counts.pt"
_WINDOW = 32  # tokens: delphi's default example_ctx_len
_LARGEST = 65504.0  # of float16
_SMALLEST = 2.0**-24  # of float16, above 0


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/delphi.yaml."""

    splits: int | None = None  # files; None: one for each BLOCK latents

    def __post_init__(self) -> None:
        if self.splits is not None:
            at_least("study.splits", self.splits, 1)


@dataclass(frozen=True)
class Cache:
    """What the files are made of."""

    index: Index
    table: Path  # the catalogue's, of which neighbours and counts are read
    tokens: NDArray[np.uint32]  # (R, T)
    count: NDArray[np.int64]  # (F,) places where each latent fires
    activation: np.dtype[Any]  # float16 or float32
    rows: list[int]  # the first row of `tokens` of each unit of the index


def inputs(study: Study) -> Mapping[str, Any]:
    """What the cache depends on beside the settings.

    Raises:
        StoreError: the run has no catalogue.
    """
    files = catalogue.files(study.subject)
    return {"catalogue": files.digest, "units": files.places.units}


def delphi(study: Study) -> Outcome:
    """Write the cache.

    Raises:
        SettingError: more files than latents are asked for.
        StoreError: the run has no catalogue, or its files do not belong together.
    """
    subject = study.subject
    d_sae = subject.sae.d_sae
    splits = build(Options, "study", study.options).splits or -(-d_sae // BLOCK)
    if splits > d_sae:
        raise SettingError(f"study.splits={splits} must be at most the number of latents, {d_sae}")
    hook = hookpoint(subject)
    target = made(study.folder / LATENTS / hook)
    bounds = [d_sae * number // splits for number in range(splits + 1)]
    written = 0
    progress = Progress()
    with StopRequest() as stop:
        cache = cache_of(subject)
        for number, (first, end) in enumerate(pairwise(bounds), 1):
            path = target / f"{first}_{end - 1}.safetensors"
            written += durable.write(path, file_parts(cache, first, end, stop)).bytes
            progress.show(f"file {number}/{splits}", last=number == splits)
        _write_beside(study.folder, hook, cache, stop)
        durable.write(target / CONFIG, [_config(study, cache, splits)])
    figures = {
        "hookpoint": hook,
        "features": d_sae,
        "pairs": int(cache.count.sum()),
        "rows": len(cache.tokens),
        "context": cache.tokens.shape[1],
        "units": list(cache.index.units),
        "splits": splits,
        "activations": cache.activation.name,
        "bytes": written,
        "folder": LATENTS,
    }
    return Outcome(figures, summary(study, figures))


# -- what the catalogue has ------------------------------------------------------------------------


def hookpoint(subject: Subject) -> str:
    """What the SAE is of, as sparsify names it; sparsify has no crosscoders."""
    architecture = subject.store.manifest["model"].get("architecture")
    return subject.label if subject.target is None else folder_of(subject.ports, architecture)


def cache_of(subject: Subject) -> Cache:
    """The catalogue, read as far as every file needs it."""
    table, index, _ = catalogue.files(subject)
    columns = pq.read_table(table, columns=["count", "max"])
    largest = np.nanmax(columns.column("max").to_numpy(), initial=0)
    tokens = [subject.store.tokens(unit) for unit in index.units]
    ends = np.cumsum([len(rows) for rows in tokens])
    return Cache(
        index=index,
        table=table,
        tokens=np.concatenate(tokens),
        count=columns.column("count").to_numpy(),
        activation=np.dtype(np.float16 if largest <= _LARGEST else np.float32),
        rows=[0, *ends[:-1].tolist()],
    )


# -- files -----------------------------------------------------------------------------------------


def file_parts(cache: Cache, first: int, end: int, stop: StopRequest) -> Iterator[bytes]:
    """The safetensors file of the latents from `first` to before `end`, part by part.

    Raises:
        StoreError: the index has other places than the catalogue's table counts.
    """
    rows, context = cache.tokens.shape
    pairs = int(cache.count[first:end].sum())
    location = np.dtype(np.uint16 if max(rows, context, end - first) <= 2**16 else np.uint32)
    yield header(
        {
            "tokens": _entry(cache.tokens.dtype, rows, context),
            "locations": _entry(location, pairs, 3),
            "activations": _entry(cache.activation, pairs),
        }
    )
    yield cache.tokens.tobytes()
    # Locations come before activations in the file, and one pass over the index has both.
    activations = []
    written = 0
    for unit, first_row in zip(cache.index.units, cache.rows, strict=True):
        stop.check()
        for number in range(first // BLOCK, -(-end // BLOCK)):
            block = cache.index.block(unit, number)
            span = slice(*np.searchsorted(block.feature, [first, end]))
            row, position = np.divmod(block.token[span], context)
            columns = (row + first_row, position, block.feature[span] - first)
            yield np.stack(columns, axis=1).astype(location).tobytes()
            activations.append(_rounded(block.value[span], cache.activation).tobytes())
            written += len(row)
    if written != pairs:
        raise StoreError(
            f"{cache.index.folder} has {written:,} places of the latents {first} to {end - 1} and "
            f"{catalogue.FILE} counts {pairs:,}: they do not belong together; "
            "run `python -m analyze study=catalogue` again"
        )
    yield from activations


def _entry(kind: np.dtype[Any], *shape: int) -> Entry:
    return Entry(
        dtype=f"{kind.kind.upper()}{8 * kind.itemsize}",
        shape=shape,
        nbytes=kind.itemsize * int(np.prod(shape)),
    )


def _rounded(values: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[Any]:
    """Activations in the file's precision, all above 0."""
    return np.maximum(values, _SMALLEST).astype(kind) if kind == np.float16 else values


def _write_beside(folder: Path, hook: str, cache: Cache, stop: StopRequest) -> None:
    """Write firing counts and neighbours where delphi looks for them."""
    buffer = io.BytesIO()
    torch.save({hook: torch.from_numpy(cache.count.copy())}, buffer)
    near = f"neighbours/{hook}-decoder_similarity.json"
    for file in (COUNTS, near):
        made((folder / file).parent)
    durable.write(folder / COUNTS, [buffer.getvalue()])
    durable.write(folder / near, _neighbours(pq.ParquetFile(cache.table), stop))


def _neighbours(table: pq.ParquetFile, stop: StopRequest) -> Iterator[bytes]:
    """JSON of {latent: [[cosine, latent], ...]}, a line per latent."""
    before = "{"
    for group in range(table.num_row_groups):
        stop.check()
        for row in table.read_row_group(group, columns=["feature", "neighbours"]).to_pylist():
            near = [[neighbour["cosine"], neighbour["feature"]] for neighbour in row["neighbours"]]
            yield f'{before}"{row["feature"]}": {json.dumps(near)}'.encode()
            before = ",\n"
    yield b"}"


def _config(study: Study, cache: Cache, splits: int) -> bytes:
    """delphi's CacheConfig, with the model, whose tokenizer it loads.

    The data set in it is a note: delphi takes the tokens from the cache.
    """
    store = study.subject.store
    text = store.manifest["text"]
    config = {
        "dataset_repo": text_of(store),
        "dataset_split": text.get("split", ""),
        "dataset_name": text.get("config") or "",
        "dataset_column": text.get("field", "text"),
        "batch_size": store.unit_tokens // store.context,
        "cache_ctx_len": cache.tokens.shape[1],
        "n_tokens": cache.tokens.size,
        "n_splits": splits,
        "model_name": _model(study),
    }
    return json.dumps(config, indent=4).encode()


def _model(study: Study) -> str:
    path = study.model.path
    return str(described(path, study.model.revision)) if path == EMBEDDED else path


# -- what to do with them --------------------------------------------------------------------------


def summary(study: Study, figures: Mapping[str, Any]) -> list[str]:
    """How large the cache is, and the next command."""
    context = figures["context"]
    lines = [
        f"{study.place / LATENTS} has the {figures['pairs']:,} places where "
        f"{figures['features']:,} latents fire in {figures['rows']:,} rows of {context:,} tokens, "
        f"as delphi caches them: {figures['splits']:,} files, {figures['bytes'] / 1e6:,.1f} MB.",
        _next(study, figures["hookpoint"]),
    ]
    if context % _WINDOW:
        lines.append(
            f"Rows of {context:,} tokens are no multiple of {_WINDOW}: "
            "give delphi an --example_ctx_len that divides them."
        )
    if figures["activations"] != "float16":
        lines.append(
            "Activations are single precision: some are beyond the "
            f"{_LARGEST:,.0f} of half precision."
        )
    return lines


def _next(study: Study, hook: str) -> str:
    """The next command. delphi's own loads the SAE too, and takes those of sparsify alone."""
    if study.subject.sae.threshold is not None:
        return (
            f"Read it with delphi's `LatentDataset(raw_dir={str(study.place / LATENTS)!r}, ...)`: "
            "its command line wants an SAE of sparsify, which knows TopK alone."
        )
    run = study.subject.run
    folder = shlex.quote(str(study.place.resolve()))
    name = shlex.quote(run.resolve().name)
    model = shlex.quote(_model(study))
    exported = shlex.quote(str(run / "export" / "sparsify"))
    return (
        "Explain latents with "
        f"`python -m train.export run={shlex.quote(str(run))} to=sparsify`, then "
        f"`mkdir -p results && ln -s {folder} results/{name} && "
        f"python -m delphi {model} {exported} --hookpoints {hook} --name {name}`, "
        "which finds the cache and makes none."
    )


DEFINITION = Definition(
    delphi,
    options=Options,
    inputs=inputs,
    reads=catalogue.read_by,
    first=("catalogue",),
    order=202,
    finds=False,
)
