"""The catalogue as files that Neuronpedia imports: a source with its features and their
activations.

In the study's folder what its route `api/admin/import` reads of its bucket, below v1/:

    MODEL/LAYER-SET/release.jsonl, model.jsonl, sourceset.jsonl   a line each; source.jsonl too, written last
    MODEL/LAYER-SET/features/batch-N.jsonl.gz                     a line per latent: columns of its table Neuron
    MODEL/LAYER-SET/activations/batch-N.jsonl.gz                  a line per context: columns of its table Activation

Columns that are not written keep the defaults of its tables. Conventions are those of SAEDashboard
and its converter:

    frac_nonzero     share of rows in which the latent fires
    freq_hist_data   BINS equally wide bins from 0 to the largest activation: centres and counts, of activations above
                     0. The catalogue's own bins are of octaves, so they are counted anew, from its
                     index
    topkCosSim       the latent itself comes first, which the page leaves out
    binMin, binMax   -1 and the largest activation for the largest contexts (binContains -1); for samples the one of
                     INTERVALS equal parts of 0 to the largest activation that the value at the peak
                     is in, and binContains the share of all rows in it, those that do not fire in
                     the first
    qualifyingTokenIndex   the peak; maxValueTokenIndex is where the context is largest, which may be another token
    dataIndex        ours: document:position in the store

Numbers have DIGITS significant digits. PostgreSQL has no text with NUL or half a surrogate pair:
they become U+FFFD. Files are the same bytes for the same catalogue. Ids follow from names and
places in it, and the importer keeps what is there: another catalogue needs another study.set=.
Memory is that of one row group of the catalogue (1,024 latents, 70 contexts each: some 200 MB as
they are written) and of what a unit of its index has for them (about 60 bytes a place).
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analyze.outcome import Outcome
from analyze.pages.browser.pages import Contexts, contexts_of
from analyze.results import made
from analyze.studies.catalogue import study as catalogue
from analyze.studies.catalogue.index import BLOCK, Index
from analyze.study import Definition, Study
from data import durable
from data.errors import SettingError, StopRequest, StoreError
from data.journal import Progress, duration
from data.settings import build
from data.site import hook_name
from train.run import text_of

ROOT, SOURCE = "v1", "source.jsonl"
BINS, INTERVALS = 50, 10  # of SAEDashboard's histogram; its parts of the activations
DIGITS = 6
_BATCH, _FILES = (
    256,
    1000,
)  # latents of a file; files that the importer finds: it asks S3 for one list of keys
_PUBLIC = "clkht01d40000jv08hvalcvly"  # of its prisma/seed.ts
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_PART = ("binMin", "binMax", "binContains")
_CONTEXT = ("document", "position", "peak", "tokens", "activations")
_COLUMNS = [
    *(
        "feature",
        "count",
        "density",
        "max",
        "neighbours.list.element.feature",
        "neighbours.list.element.cosine",
    ),
    *(f"top.list.element.{name}" for name in _CONTEXT),
    *(f"quantiles.list.element.{name}" for name in _CONTEXT),
    *(
        f"{name}.list.element.{field}"
        for name in ("raised", "lowered")
        for field in ("token", "logit")
    ),
]

Say = Callable[[int], str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What things are called on Neuronpedia."""

    model: str | None = None  # its id; None: from the store's model
    set: str | None = None  # of sources; None: from the run and its width
    release: str | None = None  # None: as the set
    author: str = "anonymous"  # shown as creator
    creator: str = _PUBLIC  # id of a user
    vectors: bool = True  # the decoder's directions

    def __post_init__(self) -> None:
        rules = {
            "model": ("[a-z0-9_-]{1,128}", "1 to 128 small letters, digits, - and _"),
            "set": (
                "(?!.*__)[a-zA-Z0-9_-]{1,128}",
                "1 to 128 letters, digits, - and _, without __",
            ),
            "release": ("[a-zA-Z0-9-]{1,128}", "1 to 128 letters, digits and -"),
            "author": (r".*\S.*", "a name"),
            "creator": ("[a-zA-Z0-9_-]+", "the id of a user"),
        }
        for name, (pattern, allowed) in rules.items():
            got = getattr(self, name)
            if got is not None and not (isinstance(got, str) and re.fullmatch(pattern, got)):
                raise SettingError(f"study.{name}={got} must be {allowed}, as Neuronpedia has it")


class Names(NamedTuple):
    """What things are called."""

    model: str
    set: str
    source: str
    release: str
    author: str
    creator: str


class Bins(NamedTuple):
    """How one latent's activations are spread."""

    largest: float
    counts: NDArray[np.int64]  # (BINS,) of those above 0, by `bin_of`
    rows: int  # read in all

    def part_of(self, value: float) -> Row:
        """The part of the activations that a value is in."""
        part = int(bin_of(value, self.largest)) // (BINS // INTERVALS)
        inside = int(self.counts.reshape(INTERVALS, -1)[part].sum())
        inside += self.rows - int(self.counts.sum()) if part == 0 else 0
        low, high = (edge * self.largest / INTERVALS for edge in (part, part + 1))
        return dict(zip(_PART, _digits([low, high, inside / self.rows]), strict=True))

    @property
    def whole(self) -> Row:
        """What is said of the largest contexts."""
        return dict(zip(_PART, [-1, *_digits([self.largest]), -1], strict=True))


@dataclass(frozen=True)
class Export:
    """What is written."""

    study: Study
    names: Names
    say: Say
    table: Path
    index: Index
    vectors: bool


def inputs(study: Study) -> Mapping[str, Any]:
    """What the files depend on beside the settings, for `Study.perform`.

    Raises:
        StoreError: the run has no catalogue.
    """
    table, index = catalogue.files(study.subject)
    return {
        "catalogue": durable.digest_file(table).xxh3_128,
        "units": index.units,
        "names": names_of(study)._asdict(),
        "as_ids": catalogue.names(study) is None,
    }


def neuronpedia(study: Study) -> Outcome:
    """Write the files; how large they became.

    Raises:
        StoreError: the run has no catalogue.
    """
    options, began, names = (
        build(Options, "study", study.options),
        time.perf_counter(),
        names_of(study),
    )
    say, left = catalogue.names(study, raw=True), Path(ROOT, names.model, names.source)
    with StopRequest() as stop:
        target = made(study.folder / ROOT / names.model / names.source)
        clean = functools.cache(lambda token: storable(say(token) if say else f"#{token}"))
        export = Export(study, names, clean, *catalogue.files(study.subject), options.vectors)
        figures = _batches(target, export, stop)
        for name, row in _metadata(export).items():
            durable.write(target / f"{name}.jsonl", [line(row)])
    figures |= {"seconds": time.perf_counter() - began, "folder": str(left), **names._asdict()}
    return Outcome(
        figures, _summary(study, names, figures, as_ids=say is None), files=[str(left / SOURCE)]
    )


# -- names and text --------------------------------------------------------------------------------


def names_of(study: Study) -> Names:
    """What things are called: as asked, else after the model and the run."""
    options, subject = build(Options, "study", study.options), study.subject
    model = options.model or _slug(
        str(subject.store.manifest["model"]["id"]).rpartition("/")[2], "model"
    )
    width = subject.sae.d_sae
    size = f"{width // 1024}k" if width % 1024 == 0 else str(width)
    named = options.set or f"{_slug(subject.run.resolve().name, 'run')}-res-{size}"
    release = options.release or _slug(named, "release")
    return Names(model, named, f"{subject.layer}-{named}", release, options.author, options.creator)


def _slug(text: str, otherwise: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower())[:100].strip("-") or otherwise


def storable(text: str) -> str:
    """Text without what PostgreSQL cannot hold."""
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def line(row: Row) -> bytes:
    """A line of JSON, as the importer can read it."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # The importer replaces \u0000 wherever it reads so, behind another backslash, too, where it is
    # no NUL.
    return storable(text).replace("\\\\u0000", "\\u005cu0000").encode() + b"\n"


def _digits(values: Any) -> list[float]:
    """Numbers, each to DIGITS significant digits."""
    exact = np.asarray(values, np.float64)
    scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.where(exact == 0, 1, np.abs(exact)))))
    found: list[float] = (np.round(exact * scale) / scale).tolist()
    return found


# -- batches ---------------------------------------------------------------------------------------


def _batches(target: Path, export: Export, stop: StopRequest) -> dict[str, Any]:
    """Write the batches; how many and how large they are."""
    total, progress = export.index.d_sae, Progress()
    size = _BATCH * -(-total // (_BATCH * _FILES))
    figures = {"features": 0, "activations": 0, "files": 0, "bytes": 0}
    folders = {name: made(target / name) for name in ("features", "activations")}
    latents = _latents(export, stop)
    for number in range(-(-total // size)):
        features, activations = list[bytes](), list[bytes]()
        for _ in range(min(size, total - number * size)):
            feature, fired = next(latents)
            features.append(line(feature))
            activations += map(line, fired)
        for name, lines in (("features", features), ("activations", activations)):
            figures[name] += len(lines)
            if lines:  # the importer fails on an empty file
                packed = gzip.compress(b"".join(lines), compresslevel=5, mtime=0)
                figures["bytes"] += durable.write(
                    folders[name] / f"batch-{number}.jsonl.gz", [packed]
                ).bytes
                figures["files"] += 1
        progress.show(
            f"{figures['features']:,}/{total:,} latents", last=figures["features"] == total
        )
    return figures


def _latents(export: Export, stop: StopRequest) -> Iterator[tuple[Row, list[Row]]]:
    """Every latent's line with those of its contexts."""
    path, sae = export.table, export.study.subject.sae
    file = pq.ParquetFile(path)
    rows = int(file.schema_arrow.metadata[b"rows"])
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=_COLUMNS).combine_chunks()
        first, largest = int(table.column("feature")[0].as_py()), table.column("max").to_numpy()
        counted = histograms(export.index, first, largest, stop)
        if not np.array_equal(counted.sum(1), table.column("count").to_numpy()):
            raise StoreError(
                f"{export.index.folder} and {path} do not belong together; "
                "run `python -m analyze study=catalogue` again"
            )
        vectors = sae.W_dec[first : first + len(largest)].cpu().numpy() if export.vectors else None
        top, samples = contexts_of(table, "top"), contexts_of(table, "quantiles")
        for number, row in enumerate(table.drop_columns(["top", "quantiles"]).to_pylist()):
            stop.check()
            bins = Bins(float(row["max"] or 0), counted[number], rows)
            fired = [
                _activation(export.say, top, at) | bins.whole
                for at in range(*top.begins[number : number + 2])
            ]
            for at in range(*samples.begins[number : number + 2]):
                value = samples.activations[samples.tokens_begin[at] + samples.fields["peak"][at]]
                fired.append(_activation(export.say, samples, at) | bins.part_of(float(value)))
            vector = None if vectors is None else _digits(vectors[number])
            yield (
                _feature(export, row, bins, vector),
                [_owned(export, row["feature"], *one) for one in enumerate(fired)],
            )


def _feature(export: Export, row: Row, bins: Bins, vector: list[float] | None) -> Row:
    names, near = export.names, row["neighbours"]
    largest = _digits([bins.largest])[0]
    centres = (np.arange(BINS) + 0.5) * bins.largest / BINS if bins.largest else np.empty(0)
    said: Row = {
        "modelId": names.model,
        "layer": names.source,
        "index": str(row["feature"]),
        "sourceSetName": names.set,
        "creatorId": names.creator,
        "maxActApprox": largest,
        "hasVector": vector is not None,
        "vector": vector or [],
        "hookName": hook_name(export.study.subject.layer) if vector else None,
        "vectorDefaultSteerStrength": largest if vector else None,
        "topkCosSimIndices": [row["feature"], *(one["feature"] for one in near)],
        "topkCosSimValues": [1, *_digits([one["cosine"] for one in near])],
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": _digits(centres),
        "freq_hist_data_bar_heights": bins.counts[: len(centres)].tolist(),
    }
    for column, name in (("raised", "pos"), ("lowered", "neg")):
        logits = row[column] or []
        said[f"{name}_str"] = [export.say(one["token"]) for one in logits]
        said[f"{name}_values"] = _digits([one["logit"] for one in logits])
    return said


def _activation(say: Say, contexts: Contexts, at: int) -> Row:
    span = slice(*contexts.tokens_begin[at : at + 2])
    values = _digits(contexts.activations[span])
    document, position, peak = (
        int(contexts.fields[name][at]) for name in ("document", "position", "peak")
    )
    return {
        "tokens": [say(token) for token in contexts.tokens[span].tolist()],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "qualifyingTokenIndex": peak,
        "dataIndex": f"{document}:{position}",
    }


def _owned(export: Export, feature: int, number: int, activation: Row) -> Row:
    """With what says whose it is. The id is the same in every export: importing again adds
    nothing.
    """
    names = export.names
    text = f"{names.model}/{names.source}/{feature}/{number}"
    owner = {
        "modelId": names.model,
        "layer": names.source,
        "index": str(feature),
        "creatorId": names.creator,
    }
    return {"id": f"c{durable.digest(text.encode())[:24]}", **owner, **activation}


def bin_of(value: Any, largest: Any) -> Any:
    """Which of BINS equally wide bins from 0 to the largest activation."""
    return np.minimum(np.float64(value) / largest * BINS, BINS - 1).astype(np.int64)


def histograms(
    index: Index, first: int, largest: NDArray[np.float32], stop: StopRequest
) -> NDArray[np.int64]:
    """(f, BINS) of the latents from `first` on, one for each of `largest`: how many activations are
    in each bin.
    """
    counts = np.zeros(len(largest) * BINS, np.int64)
    largest = np.where(
        largest > 0, largest, np.float32(1)
    )  # of those that never fire, if the index agrees
    for unit in index.units:
        stop.check()
        block = index.block(unit, first // BLOCK)
        latent = block.feature.astype(np.int64) - first
        counts += np.bincount(
            latent * BINS + bin_of(block.value, largest[latent]), minlength=len(counts)
        )
    return counts.reshape(-1, BINS)


# -- what it belongs to ----------------------------------------------------------------------------


def _metadata(export: Export) -> dict[str, Row]:
    """The lines about the source and all that it belongs to, the source's last."""
    subject, names = export.study.subject, export.names
    store = subject.store
    model, owner = store.manifest["model"], {"creatorId": names.creator, "visibility": "PUBLIC"}
    title = f"{names.set}: SAEs of the residual stream, {subject.sae.d_sae:,} latents"
    return {
        "release": {"name": names.release, "description": title, "descriptionShort": names.release, "urls": [],
                    "creatorName": names.author, "creatorNameShort": names.author, **owner},
        "model": {"id": names.model, "displayName": str(model["id"]), "displayNameShort": names.model,
                  "owner": str(model["id"]).rpartition("/")[0] or names.author, "layers": model["n_layers"],
                  "neuronsPerLayer": 0, "dimension": store.d_model, "instruct": names.model.endswith("-it"), **owner},
        "sourceset": {"modelId": names.model, "name": names.set, "description": title, "type": "",
                      "creatorName": names.author, "urls": [], "releaseName": names.release, **owner},
        "source": {"id": names.source, "modelId": names.model, "setName": names.set, "dataset": text_of(store),
                   "num_prompts": sum(map(store.rows_of, export.index.units)) // store.context,
                   "num_tokens_in_prompt": store.context, **owner},
    }  # fmt: skip


def _summary(study: Study, names: Names, figures: Mapping[str, Any], *, as_ids: bool) -> list[str]:
    asked = f"modelId={names.model}&sourceId={names.source}&explanations=false"
    only = '--exclude "*" --include "*.jsonl" --include "*.jsonl.gz"'
    lines = [
        f"{study.folder / figures['folder']} has {figures['features']:,} features and {figures['activations']:,} "
        f"activations for Neuronpedia: {figures['files']:,} files, {figures['bytes'] / 1e6:,.1f} MB, made in "
        f"{duration(figures['seconds'])}.",
        "Neuronpedia imports from the bucket of its lib/utils/s3.ts: "
        f"`aws s3 sync {shlex.quote(str(study.folder / ROOT))} s3://BUCKET/v1 {only}`, then, with its web application "
        f"running, `curl 'http://localhost:3000/api/admin/import?{asked}'`.",
    ]
    if names.author == "anonymous":
        lines.append("The author is anonymous: give study.author=.")
    if as_ids:
        lines.append(
            "Tokens are shown as ids: the model's tokenizer is not at hand; give model.path=."
        )
    return lines


DEFINITION = Definition(neuronpedia, options=Options, inputs=inputs, order=203, finds=False)
