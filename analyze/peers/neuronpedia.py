"""The catalogue as files that Neuronpedia imports: a source with its features and activations.

Neuronpedia's route `api/admin/import` reads them from its bucket. In the study's folder, below v1/:

    MODEL/LAYER-SET/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
                                                 a line each; source.jsonl is written last
    MODEL/LAYER-SET/features/batch-N.jsonl.gz    a line per latent: columns of its table Neuron
    MODEL/LAYER-SET/activations/batch-N.jsonl.gz a line per context: columns of its table Activation

Columns that are not written keep the defaults of its tables. Conventions are those of SAEDashboard
and its converter:

    frac_nonzero           share of rows in which the latent fires
    freq_hist_data         BINS equally wide bins from 0 to the largest activation: centres, and
                           counts of activations above 0. They are counted from the catalogue's
                           index, because the catalogue's own bins are of octaves.
    topkCosSim             the latent itself comes first, which the page leaves out
    binMin, binMax,        of the largest contexts: -1, the largest activation, -1.
    binContains            Of samples: the interval that holds the value at the peak, and its share
                           of all rows. INTERVALS equal ones go from 0 to the largest activation.
                           Rows that do not fire are in the first.
    qualifyingTokenIndex   the peak
    maxValueTokenIndex     where the context is largest, which may be another token
    dataIndex              ours: document:position in the store

Numbers have DIGITS significant digits. PostgreSQL has no text with NUL or half a surrogate pair:
they become U+FFFD. Files are the same bytes for the same catalogue. Ids follow from names and
places in the catalogue. The importer keeps what is there, so another catalogue needs another
study.set=. Memory is that of one row group of the catalogue (1,024 latents, 70 contexts each: some
200 MB as they are written) and about 60 bytes for each place of a unit where those latents fire.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.pages.browser.contexts import CONTEXT, Contexts, contexts_of, fields
from residual_saes.analyze.results import made
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.studies.catalogue.index import BLOCK, Index
from residual_saes.analyze.study import Definition, Study
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StopRequest, StoreError
from residual_saes.data.journal import Progress
from residual_saes.data.settings import build
from residual_saes.data.site import ATTN_OUT, MLP_OUT, RESID_POST, HookPoint, hook_name
from residual_saes.train.run import text_of

ROOT = "v1"
SOURCE = "source.jsonl"
BINS = 50  # of SAEDashboard's histogram
INTERVALS = 10  # SAEDashboard's parts of the activations
DIGITS = 6
BATCH = 256  # latents of a file, unless that makes more than _FILES
_FILES = 1000  # files that the importer finds: it asks S3 for one list of keys
_PUBLIC = "clkht01d40000jv08hvalcvly"  # user of its prisma/seed.ts
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_COLUMNS = [
    *("feature", "count", "density", "max"),
    *fields("neighbours", "feature", "cosine"),
    *fields("top", *CONTEXT),
    *fields("quantiles", *CONTEXT),
    *fields("raised", "token", "logit"),
    *fields("lowered", "token", "logit"),
]
_KINDS = {RESID_POST: "res", MLP_OUT: "mlp", ATTN_OUT: "att"}  # in names of sets, by what is read
# By setting the pattern that Neuronpedia takes, and what it allows.
_RULES = {
    "model": ("[a-z0-9_-]{1,128}", "1 to 128 small letters, digits, - and _"),
    "set": ("(?!.*__)[a-zA-Z0-9_-]{1,128}", "1 to 128 letters, digits, - and _, without __"),
    "release": ("[a-zA-Z0-9-]{1,128}", "1 to 128 letters, digits and -"),
    "author": (r".*\S.*", "a name"),
    "creator": ("[a-zA-Z0-9_-]+", "the id of a user"),
}

Row = dict[str, Any]  # a line of JSON, by column


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/neuronpedia.yaml: what things are called there."""

    model: str | None = None  # its id; None: from the store's model
    set: str | None = None  # of sources; None: from the run and its width
    release: str | None = None  # None: as the set
    author: str = "anonymous"  # shown as creator
    creator: str = _PUBLIC  # id of a user
    vectors: bool = True  # the decoder's directions

    def __post_init__(self) -> None:
        for name, (pattern, allowed) in _RULES.items():
            value = getattr(self, name)
            is_valid = isinstance(value, str) and re.fullmatch(pattern, value)
            if value is not None and not is_valid:
                raise SettingError(f"study.{name}={value} must be {allowed}, as Neuronpedia has it")


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
    rows: int  # that the catalogue has read

    def of_sample(self, value: float) -> Row:
        """Columns of a sample: the part of the activations that its value is in."""
        part = int(bin_of(value, self.largest)) // (BINS // INTERVALS)
        inside = int(self.counts.reshape(INTERVALS, -1)[part].sum())
        if part == 0:
            inside += self.rows - int(self.counts.sum())
        low = part * self.largest / INTERVALS
        high = (part + 1) * self.largest / INTERVALS
        return _bin_columns(*_rounded([low, high, inside / self.rows]))

    def of_largest(self) -> Row:
        """Columns of the contexts with the largest activations."""
        return _bin_columns(-1, _rounded([self.largest])[0], -1)


def _bin_columns(low: float, high: float, share: float) -> Row:
    return {"binMin": low, "binMax": high, "binContains": share}


@dataclass(frozen=True)
class Export:
    """What the files are made of."""

    study: Study
    names: Names
    text: Callable[[int], str]  # of a token
    table: Path
    index: Index
    vectors: bool


def inputs(study: Study) -> Mapping[str, Any]:
    """What the files depend on beside the settings.

    Raises:
        StoreError: the run has no catalogue.
    """
    files = catalogue.files(study.subject)
    return {
        "catalogue": files.digest,
        "units": files.places.units,
        "names": names_of(study)._asdict(),
        "as_ids": catalogue.names(study) is None,
    }


def neuronpedia(study: Study, batch: int = BATCH) -> Outcome:
    """Write the files.

    Args:
        batch: latents of a file, unless that makes too many files.

    Raises:
        StoreError: the run has no catalogue, or its files do not belong together.
    """
    options = build(Options, "study", study.options)
    names = names_of(study)
    name_of = catalogue.names(study, raw=True)

    @functools.cache
    def text(token: int) -> str:
        return storable(name_of(token) if name_of else f"#{token}")

    folder = Path(ROOT, names.model, names.source)
    target = made(study.folder / folder)
    table, index, _ = catalogue.files(study.subject)
    export = Export(study, names, text, table, index, options.vectors)
    with StopRequest() as stop:
        figures = _write_batches(target, export, batch, stop)
        for name, row in _metadata(export).items():
            durable.write(target / f"{name}.jsonl", [line(row)])
    figures |= {"folder": str(folder), **names._asdict()}
    lines = _summary(study, names, figures, as_ids=name_of is None)
    return Outcome(figures, lines)


# -- names and text --------------------------------------------------------------------------------


def names_of(study: Study) -> Names:
    """What things are called: as asked, else after the model and the run."""
    options = build(Options, "study", study.options)
    subject = study.subject
    written = subject.target
    if written is None:
        raise SettingError(
            "study=neuronpedia takes what writes one hook point, and "
            f"{subject.run} is a crosscoder of {subject.where}; study=browser shows its targets "
            "side by side"
        )
    kind = _KINDS.get(written.site, written.site) if subject.is_sae else subject.noun
    model_id = str(subject.store.manifest["model"]["id"])
    model = options.model or _slug(model_id.rpartition("/")[2], "model")
    width = subject.sae.d_sae
    size = f"{width // 1024}k" if width % 1024 == 0 else str(width)
    sources = options.set or f"{_slug(subject.run.resolve().name, 'run')}-{kind}-{size}"
    return Names(
        model=model,
        set=sources,
        source=f"{written.layer}-{sources}",
        release=options.release or _slug(sources, "release"),
        author=options.author,
        creator=options.creator,
    )


def _written(export: Export) -> HookPoint:
    """The hook point that the vectors are of; `names_of` has refused those of several."""
    return export.study.subject.ports.writes[0].point


def _slug(text: str, otherwise: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower())[:100].strip("-") or otherwise


def storable(text: str) -> str:
    """Text without what PostgreSQL cannot hold."""
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def line(row: Row) -> bytes:
    """A line of JSON, as the importer can read it."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # The importer replaces \u0000 wherever it reads so: behind another backslash too, where it is
    # no NUL.
    return storable(text).replace("\\\\u0000", "\\u005cu0000").encode() + b"\n"


def _rounded(values: Any) -> list[float]:
    """Numbers, each to DIGITS significant digits."""
    exact = np.asarray(values, np.float64)
    scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.where(exact == 0, 1, np.abs(exact)))))
    rounded: list[float] = (np.round(exact * scale) / scale).tolist()
    return rounded


# -- batches ---------------------------------------------------------------------------------------


def _write_batches(target: Path, export: Export, batch: int, stop: StopRequest) -> dict[str, Any]:
    """Write features and activations; how many and how large they are."""
    total = export.index.d_sae
    size = batch * -(-total // (batch * _FILES))
    figures = {"features": 0, "activations": 0, "files": 0, "bytes": 0}
    folders = {name: made(target / name) for name in ("features", "activations")}
    progress = Progress()
    latents = _latents(export, stop)
    for number in range(-(-total // size)):
        lines: dict[str, list[bytes]] = {"features": [], "activations": []}
        for _ in range(min(size, total - number * size)):
            feature, activations = next(latents)
            lines["features"].append(line(feature))
            lines["activations"] += map(line, activations)
        for name, folder in folders.items():
            figures[name] += len(lines[name])
            if not lines[name]:
                continue  # the importer fails on an empty file
            packed = gzip.compress(b"".join(lines[name]), compresslevel=5, mtime=0)
            figures["bytes"] += durable.write(folder / f"batch-{number}.jsonl.gz", [packed]).bytes
            figures["files"] += 1
        done = figures["features"]
        progress.show(f"{done:,}/{total:,} latents", last=done == total)
    return figures


def _latents(export: Export, stop: StopRequest) -> Iterator[tuple[Row, list[Row]]]:
    """Of every latent its row, and those of its contexts."""
    sae = export.study.subject.sae
    file = pq.ParquetFile(export.table)
    rows = int(file.schema_arrow.metadata[b"rows"])
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=_COLUMNS).combine_chunks()
        first = int(table.column("feature")[0].as_py())
        largest = table.column("max").to_numpy()
        counts = histograms(export.index, first, largest, stop)
        if not np.array_equal(counts.sum(1), table.column("count").to_numpy()):
            raise StoreError(
                f"{export.index.folder} and {export.table} do not belong together; "
                "run `python -m analyze study=catalogue` again"
            )
        vectors = sae.W_dec[first : first + len(largest)].cpu().numpy()
        top = contexts_of(table, "top")
        samples = contexts_of(table, "quantiles")
        for number, row in enumerate(table.drop_columns(["top", "quantiles"]).to_pylist()):
            stop.check()
            bins = Bins(float(row["max"] or 0), counts[number], rows)
            activations = []
            for context in top.of(number):
                activations.append(_activation(export, top, context) | bins.of_largest())
            for context in samples.of(number):
                part = bins.of_sample(samples.peak_value(context))
                activations.append(_activation(export, samples, context) | part)
            vector = _rounded(vectors[number]) if export.vectors else None
            owned = [
                _owned(export, row["feature"], place, activation)
                for place, activation in enumerate(activations)
            ]
            yield _feature(export, row, bins, vector), owned


def _feature(export: Export, row: Row, bins: Bins, vector: list[float] | None) -> Row:
    """A latent's row of the table Neuron."""
    names = export.names
    near = row["neighbours"]
    largest = _rounded([bins.largest])[0]
    centres = (np.arange(BINS) + 0.5) * bins.largest / BINS if bins.largest else np.empty(0)
    feature: Row = {
        "modelId": names.model,
        "layer": names.source,
        "index": str(row["feature"]),
        "sourceSetName": names.set,
        "creatorId": names.creator,
        "maxActApprox": largest,
        "hasVector": vector is not None,
        "vector": vector or [],
        "hookName": hook_name(_written(export)) if vector else None,
        "vectorDefaultSteerStrength": largest if vector else None,
        "topkCosSimIndices": [row["feature"], *(neighbour["feature"] for neighbour in near)],
        "topkCosSimValues": [1, *_rounded([neighbour["cosine"] for neighbour in near])],
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": _rounded(centres),
        "freq_hist_data_bar_heights": bins.counts[: len(centres)].tolist(),
    }
    for column, name in (("raised", "pos"), ("lowered", "neg")):
        logits = row[column] or []
        feature[f"{name}_str"] = [export.text(logit["token"]) for logit in logits]
        feature[f"{name}_values"] = _rounded([logit["logit"] for logit in logits])
    return feature


def _activation(export: Export, contexts: Contexts, context: int) -> Row:
    """A context's columns of the table Activation, but for its bin and owner."""
    span = contexts.span(context)
    values = _rounded(contexts.activations[span])
    document, position, peak = contexts.numbers(context, "document", "position", "peak")
    return {
        "tokens": [export.text(token) for token in contexts.tokens[span].tolist()],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "qualifyingTokenIndex": peak,
        "dataIndex": f"{document}:{position}",
    }


def _owned(export: Export, feature: int, number: int, activation: Row) -> Row:
    """The activation with its id and its latent's.

    The id is the same in every export, so importing again adds nothing.
    """
    names = export.names
    path = f"{names.model}/{names.source}/{feature}/{number}"
    return {
        "id": f"c{durable.digest(path.encode())[:24]}",
        "modelId": names.model,
        "layer": names.source,
        "index": str(feature),
        "creatorId": names.creator,
        **activation,
    }


def bin_of(value: Any, largest: Any) -> Any:
    """Which of BINS equally wide bins from 0 to the largest activation a value is in."""
    return np.minimum(np.float64(value) / largest * BINS, BINS - 1).astype(np.int64)


def histograms(
    index: Index, first: int, largest: NDArray[np.float32], stop: StopRequest
) -> NDArray[np.int64]:
    """(f, BINS) activations in each bin, of the f latents from `first` on.

    Args:
        largest: (f,) each latent's largest activation; NaN of those that never fire.
    """
    counts = np.zeros(len(largest) * BINS, np.int64)
    # A latent that never fires has no places, unless the index does not belong to the table.
    largest = np.where(largest > 0, largest, np.float32(1))
    for unit in index.units:
        stop.check()
        block = index.block(unit, first // BLOCK)
        latent = block.feature.astype(np.int64) - first
        bins = latent * BINS + bin_of(block.value, largest[latent])
        counts += np.bincount(bins, minlength=len(counts))
    return counts.reshape(-1, BINS)


# -- what the source belongs to --------------------------------------------------------------------


def _metadata(export: Export) -> dict[str, Row]:
    """By file the line about the release, the model, the source set and, last, the source."""
    subject = export.study.subject
    names = export.names
    store = subject.store
    model = store.manifest["model"]
    model_id = str(model["id"])
    place = "the residual stream" if subject.is_resid_post else subject.where
    title = f"{names.set}: {subject.noun}s of {place}, {subject.sae.d_sae:,} latents"
    owner = {"creatorId": names.creator, "visibility": "PUBLIC"}
    return {
        "release": {
            "name": names.release,
            "description": title,
            "descriptionShort": names.release,
            "urls": [],
            "creatorName": names.author,
            "creatorNameShort": names.author,
            **owner,
        },
        "model": {
            "id": names.model,
            "displayName": model_id,
            "displayNameShort": names.model,
            "owner": model_id.rpartition("/")[0] or names.author,
            "layers": model["n_layers"],
            "neuronsPerLayer": 0,
            "dimension": store.d_model,
            "instruct": names.model.endswith("-it"),
            **owner,
        },
        "sourceset": {
            "modelId": names.model,
            "name": names.set,
            "description": title,
            "type": "",
            "creatorName": names.author,
            "urls": [],
            "releaseName": names.release,
            **owner,
        },
        "source": {
            "id": names.source,
            "modelId": names.model,
            "setName": names.set,
            "dataset": text_of(store),
            "num_prompts": sum(map(store.rows_of, export.index.units)) // store.context,
            "num_tokens_in_prompt": store.context,
            **owner,
        },
    }


def _summary(study: Study, names: Names, figures: Mapping[str, Any], *, as_ids: bool) -> list[str]:
    """How large the files are, and the next commands."""
    query = f"modelId={names.model}&sourceId={names.source}&explanations=false"
    only = '--exclude "*" --include "*.jsonl" --include "*.jsonl.gz"'
    lines = [
        f"{study.place / figures['folder']} has {figures['features']:,} features and "
        f"{figures['activations']:,} activations for Neuronpedia: {figures['files']:,} files, "
        f"{figures['bytes'] / 1e6:,.1f} MB.",
        "Neuronpedia imports from the bucket of its lib/utils/s3.ts: "
        f"`aws s3 sync {shlex.quote(str(study.place / ROOT))} s3://BUCKET/v1 {only}`, then, "
        f"with its web application running, "
        f"`curl 'http://localhost:3000/api/admin/import?{query}'`.",
    ]
    if names.author == "anonymous":
        lines.append("The author is anonymous: give study.author=.")
    if as_ids:
        lines.append(
            "Tokens are shown as ids: the model's tokenizer is not at hand; give model.path=."
        )
    return lines


DEFINITION = Definition(
    neuronpedia,
    options=Options,
    inputs=inputs,
    reads=catalogue.read_by,
    first=("catalogue",),
    order=203,
    finds=False,
)
