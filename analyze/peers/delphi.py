"""The catalogue as a cache of EleutherAI's delphi, which explains latents from it without running
the model again.

Of the run's catalogue, in the study's folder, what `delphi.latents.LatentDataset` (0.1.3) reads:

    latents/layers.L/A_B.safetensors   latents A to B, both included; the hookpoint is named as sparsify names it
        tokens         (R, T) uint32              packed rows of the indexed units; in every file, as delphi wants it
        locations      (n, 3) uint16 or uint32    row of `tokens`, position in it, latent - A
        activations    (n,) float16 or float32
    latents/layers.L/config.json       delphi's CacheConfig and the model's name; written last
    neighbours/layers.L-decoder_similarity.json   for non_activating_source=neighbours: [cosine, latent] of each
    log/hookpoint_firing_counts.pt     (F,) int64, for its summary of scores

Locations are in the order of the text for each latent, which delphi's stable sort by latent keeps
and its windows need. Activations are half precision as delphi's own, or single where the largest is
beyond 65,504: nothing is clipped, and what rounds to 0 becomes the smallest number above it, so
that a latent fires where the catalogue says.

delphi cuts rows into windows of example_ctx_len tokens (32), which has to divide T, and knows
nothing of padding: in its own caches windows cross from one document into the next, and so they do
here. Rows are the store's as they are, with the BOS before each document (on which nothing fires),
so that a border can be seen; pieces as rows of their own would have to be filled up, and what they
are filled with would be sampled as text on which a latent does not fire.

Memory is that of the tokens (4 bytes each), of a file's activations (2 bytes each), and of what a
unit has for a file's latents (about 150 bytes a place while it is read). At 32,768 latents, 4e6
tokens and k = 128 that is 16 MB, 32 MB and 40 MB on average; were all of a unit's 8.4e6 places in
one file, 1.3 GB. The disk takes 8 bytes for each of 5.1e8 places and 32 times the tokens, 4.6 GB.
"""

from __future__ import annotations

import io
import json
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from analyze.outcome import Outcome
from analyze.results import made
from analyze.studies.catalogue import study as catalogue
from analyze.studies.catalogue.index import BLOCK, Index
from analyze.study import Definition, Study
from analyze.subject import Subject
from data import durable
from data.errors import SettingError, StopRequest, StoreError
from data.journal import Progress, duration
from data.settings import build
from harvest.model_folder import EMBEDDED, resolve
from train.run import text_of

LATENTS, CONFIG = "latents", "config.json"
_EXAMPLE = 32  # tokens of a window: delphi's example_ctx_len, unless told otherwise
_LARGEST, _SMALLEST = 65504.0, 2.0**-24  # of float16, above 0


@dataclass(frozen=True)
class Options:
    """How the cache is cut."""

    splits: int | None = None  # files; None: one for each BLOCK latents

    def __post_init__(self) -> None:
        if self.splits is not None and self.splits < 1:
            raise SettingError(f"study.splits={self.splits} must be at least 1")


@dataclass(frozen=True)
class Cache:
    """What is written."""

    index: Index
    table: Path
    tokens: NDArray[np.uint32]  # (R, T)
    count: NDArray[np.int64]  # (F,) places where each latent fires
    activation: np.dtype[Any]
    rows: list[int]  # the first row of each unit of the index


def inputs(study: Study) -> Mapping[str, Any]:
    """What the cache depends on beside the settings, for `Study.perform`.

    Raises:
        StoreError: the run has no catalogue.
    """
    table, index = catalogue.files(study.subject)
    return {"catalogue": durable.digest_file(table).xxh3_128, "units": index.units}


def delphi(study: Study) -> Outcome:
    """Write the cache; how large it became.

    Raises:
        StoreError: the run has no catalogue, or its files do not belong together.
    """
    options, subject, began = (
        build(Options, "study", study.options),
        study.subject,
        time.perf_counter(),
    )
    splits = options.splits or -(-subject.sae.d_sae // BLOCK)
    if splits > subject.sae.d_sae:
        raise SettingError(
            f"study.splits={splits} must be at most the number of latents, {subject.sae.d_sae}"
        )
    folder, hook = study.folder, hookpoint(subject)
    with StopRequest() as stop:
        cache, written, progress = cache_of(subject), 0, Progress()
        bounds = [subject.sae.d_sae * number // splits for number in range(splits + 1)]
        target = made(folder / LATENTS / hook)
        for number, (first, end) in enumerate(pairwise(bounds)):
            path = target / f"{first}_{end - 1}.safetensors"
            written += durable.write(path, _file(cache, first, end, stop)).bytes
            progress.show(f"file {number + 1}/{splits}", last=number + 1 == splits)
        beside = _beside(folder, subject, cache, stop)
        durable.write(target / CONFIG, [_config(study, cache, splits)])
    figures = {
        "hookpoint": hook,
        "features": len(cache.count),
        "pairs": int(cache.count.sum()),
        "rows": len(cache.tokens),
        "context": cache.tokens.shape[1],
        "units": list(cache.index.units),
        "splits": splits,
        "activations": cache.activation.name,
        "bytes": written,
        "seconds": time.perf_counter() - began,
        "folder": LATENTS,
    }
    return Outcome(
        figures, _summary(study, figures), files=[str(Path(LATENTS, hook, CONFIG)), *beside]
    )


# -- what the catalogue has ------------------------------------------------------------------------


def hookpoint(subject: Subject) -> str:
    """The name of the layer whose output the SAE is of, as sparsify's files have it."""
    return f"layers.{subject.layer}"


def cache_of(subject: Subject) -> Cache:
    """All that the files are made of, but the places."""
    store, (table, index) = subject.store, catalogue.files(subject)
    said = pq.read_table(table, columns=["count", "max"])
    largest = np.nanmax(said.column("max").to_numpy(), initial=0)
    tokens = [store.tokens(unit) for unit in index.units]
    rows = np.cumsum([0, *map(len, tokens)])[:-1].tolist()
    kind = np.dtype(np.float16 if largest <= _LARGEST else np.float32)
    return Cache(index, table, np.concatenate(tokens), said.column("count").to_numpy(), kind, rows)


# -- files -----------------------------------------------------------------------------------------


def _file(cache: Cache, first: int, end: int, stop: StopRequest) -> Iterator[bytes]:
    """A file of the latents from `first` to before `end`, in the format of safetensors."""
    pairs, (rows, context) = int(cache.count[first:end].sum()), cache.tokens.shape
    wide = np.dtype(np.uint16 if max(rows, context, end - first) <= 2**16 else np.uint32)
    yield _header(
        {
            "tokens": (cache.tokens.dtype, (rows, context)),
            "locations": (wide, (pairs, 3)),
            "activations": (cache.activation, (pairs,)),
        }
    )
    yield cache.tokens.tobytes()
    activations: list[bytes] = []
    written = 0
    for unit, row in zip(cache.index.units, cache.rows, strict=True):
        stop.check()
        for number in range(first // BLOCK, -(-end // BLOCK)):
            block = cache.index.block(unit, number)
            span = slice(*np.searchsorted(block.feature, [first, end]))
            places = np.divmod(block.token[span], context)
            columns = (places[0] + row, places[1], block.feature[span] - first)
            yield np.stack(columns, axis=1).astype(wide).tobytes()
            activations.append(_kept(block.value[span], cache.activation).tobytes())
            written += len(columns[0])
    if written != pairs:
        raise StoreError(
            f"{cache.index.folder} has {written:,} places of the latents {first} to {end - 1} and {catalogue.FILE} "
            f"counts {pairs:,}: they do not belong together; run `python -m analyze study=catalogue` again"
        )
    yield from activations


def _kept(values: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[Any]:
    """Activations in the file's precision, all above 0."""
    return np.maximum(values, _SMALLEST).astype(kind) if kind == np.float16 else values


def _header(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> bytes:
    said, offset = dict[str, Any](), 0
    for name, (kind, shape) in tensors.items():
        end = offset + kind.itemsize * int(np.prod(shape))
        dtype = f"{kind.kind.upper()}{8 * kind.itemsize}"
        said[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(said).encode()
    text += b" " * (-len(text) % 8)  # so that what follows is aligned
    return len(text).to_bytes(8, "little") + text


def _beside(folder: Path, subject: Subject, cache: Cache, stop: StopRequest) -> list[str]:
    """Firing counts and neighbours, where delphi looks for them; their places in the folder."""
    hook, buffer = hookpoint(subject), io.BytesIO()
    torch.save({hook: torch.from_numpy(cache.count.copy())}, buffer)
    durable.write(made(folder / "log") / "hookpoint_firing_counts.pt", [buffer.getvalue()])
    path = made(folder / "neighbours") / f"{hook}-decoder_similarity.json"
    durable.write(path, _neighbours(pq.ParquetFile(cache.table), stop))
    return ["log/hookpoint_firing_counts.pt", str(path.relative_to(folder))]


def _neighbours(table: pq.ParquetFile, stop: StopRequest) -> Iterator[bytes]:
    before = "{"
    for group in range(table.num_row_groups):
        stop.check()
        for row in table.read_row_group(group, columns=["feature", "neighbours"]).to_pylist():
            near = [[one["cosine"], one["feature"]] for one in row["neighbours"]]
            yield f'{before}"{row["feature"]}": {json.dumps(near)}'.encode()
            before = ",\n"
    yield b"}"


def _config(study: Study, cache: Cache, splits: int) -> bytes:
    """delphi's CacheConfig, and where it finds the tokenizer. The data set is a note: the tokens
    are in the cache.
    """
    store = study.subject.store
    text = store.manifest["text"]
    said = {
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
    return json.dumps(said, indent=4).encode()


def _model(study: Study) -> str:
    path = study.model.path
    return str(resolve(path, study.model.revision)) if path == EMBEDDED else path


def _summary(study: Study, figures: Mapping[str, Any]) -> list[str]:
    context, folder = figures["context"], study.folder / LATENTS
    lines = [
        f"{folder} has the {figures['pairs']:,} places where {figures['features']:,} latents fire in "
        f"{figures['rows']:,} rows of {context:,} tokens, as delphi caches them: {figures['splits']:,} files, "
        f"{figures['bytes'] / 1e6:,.1f} MB, made in {duration(figures['seconds'])}.",
        _next(study, figures["hookpoint"]),
    ]
    if context % _EXAMPLE:
        lines.append(
            f"Rows of {context:,} tokens are no multiple of {_EXAMPLE}: "
            "give delphi an --example_ctx_len that divides them."
        )
    if figures["activations"] != "float16":
        lines.append(
            f"Activations are single precision: some are beyond the {_LARGEST:,.0f} of half precision."
        )
    return lines


def _next(study: Study, hook: str) -> str:
    """What to do with the cache. delphi's command line loads the SAE, too, and knows those of
    sparsify.
    """
    run = study.subject.run
    if study.subject.sae.threshold is not None:
        return (
            f"Read it with delphi's `LatentDataset(raw_dir={str(study.folder / LATENTS)!r}, ...)`: its command line "
            "wants an SAE of sparsify, which knows TopK alone."
        )
    said = (
        run,
        study.folder.resolve(),
        run.resolve().name,
        _model(study),
        run / "export" / "sparsify",
    )
    at, folder, name, model, exported = (shlex.quote(str(one)) for one in said)
    return (
        f"Explain latents with `python -m train.export run={at} to=sparsify`, then `mkdir -p results && ln -s {folder} "
        f"results/{name} && python -m delphi {model} {exported} --hookpoints {hook} --name {name}`, which finds the "
        "cache and makes none."
    )


DEFINITION = Definition(delphi, options=Options, inputs=inputs, order=202, finds=False)
