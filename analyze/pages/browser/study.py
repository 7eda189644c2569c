"""All latents to look through: a folder of static files that opens from the disk and from any
static host.

Made from the catalogue (features.parquet and its index) and from what other studies of the run have
found. In the study's folder:

    index.html, *.css, *.js    the page; it asks for nothing but the files below, and they are only ever text to it
    data/meta.js               the run, the columns, what there is
    data/table.js              the list: column by column, a number per latent
    data/features/NNN.js       CHUNK latents each, see pages.py
    data/tokens.js             the tokens that occur, the most frequent first
    data/tokens/NNN.js         SHARD of them each: the latents that fire on them, see tokens.py

index.html is written last: where it is, the folder is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq

from analyze import results
from analyze.outcome import Outcome
from analyze.pages.browser import columns, joins, pages, tokens
from analyze.pages.browser.columns import Column
from analyze.pages.browser.joins import Other
from analyze.pages.browser.pages import CHUNK, Say, Shown
from analyze.pages.browser.script import script, short
from analyze.results import FOLDER, PAGE, made
from analyze.studies.catalogue import study as catalogue
from analyze.study import Definition, Study
from data import durable
from data.errors import SettingError, StopRequest
from data.journal import Progress, duration
from data.settings import build


@dataclass(frozen=True)
class Options:
    """What the pages hold."""

    contexts: int = 10  # with the largest activations
    samples: int = 2  # contexts of each quantile
    others: list[str] = field(
        default_factory=list
    )  # directories of other runs on the same store, with catalogues
    # tokens on which they are compared, in whole units: memory is about 50 bytes * k for each
    rows: int = 250_000

    def __post_init__(self) -> None:
        for name, least in (("contexts", 1), ("samples", 0), ("rows", 1)):
            if not least <= getattr(self, name) < 2**62:
                raise SettingError(f"study.{name}={getattr(self, name)} must be at least {least}")
        if not isinstance(self.others, list) or not all(
            isinstance(one, str) and one for one in self.others
        ):
            raise SettingError(
                f"study.others={self.others} must be a list of directories, such as [runs/b,runs/c]"
            )


def inputs(study: Study) -> Mapping[str, Any]:
    """What the pages depend on beside the settings, for `Study.perform`.

    Raises:
        StoreError: this run or another one has no catalogue.
    """
    subject, options = study.subject, build(Options, "study", study.options)
    every = [
        catalogue.files(subject),
        *(joins.open_other(subject, run).files for run in options.others),
    ]
    read = [
        *columns.files(results.current(subject.run, subject.digest)),
        *(one.table for one in every),
    ]
    return {
        "files": {str(path): durable.digest_file(path).xxh3_128 for path in read},
        "units": [one.places.units for one in every],
        "as_ids": catalogue.names(study) is None,
    }


def browser(study: Study) -> Outcome:
    """Write the folder; how large it became.

    Raises:
        StoreError: this run or another one has no catalogue.
    """
    options, subject, began = (
        build(Options, "study", study.options),
        study.subject,
        time.perf_counter(),
    )
    made_from = catalogue.files(subject)
    others = [joins.open_other(subject, run) for run in options.others]
    names = catalogue.names(study)
    say: Say = names or (lambda token: f"#{token}")
    with StopRequest() as stop:
        partners = [
            joins.partners(made_from.places, other.files.places, options.rows, stop)
            for other in others
        ]
        site = Site(study.folder)
        file = pq.ParquetFile(made_from.table)
        studied = columns.of_studies(subject, results.current(subject.run, subject.digest))
        of_page = Shown(say, options.contexts, options.samples, partners, studied)
        table, known = _features(site, file, of_page, stop)
        tallies = tokens.tally(subject.store, made_from.places, stop)
        ids = tokens.ranked(tallies.occurrences)
        for number, shard in enumerate(tokens.shards(tallies, ids)):
            site.write(f"tokens/{number:03d}", shard)
        site.write("tokens", {"ids": ids.tolist(), "texts": list(map(say, ids.tolist())),
                              "occurrences": tallies.occurrences[ids].tolist()})  # fmt: skip
        shown = [*known, *studied]
        site.write("table", {**table, "columns": {one.key: short(one.values) for one in shown}})
        site.write("meta", _meta(study, file, shown, others, as_ids=names is None))
        site.finish()
    figures = {
        "features": subject.sae.d_sae,
        "tokens": len(ids),
        "columns": [one.key for one in shown],
        "others": [str(other.subject.run) for other in others],
        "files": site.files,
        "bytes": site.bytes,
        "seconds": time.perf_counter() - began,
        "file": PAGE,
    }
    return Outcome(figures, _summary(study, figures, as_ids=names is None), files=[PAGE])


class Site:
    """The folder while it is written."""

    def __init__(self, folder: Path) -> None:
        """Begin anew: nothing of an earlier one may be taken for this one's."""
        self._folder = folder
        self.files = self.bytes = 0
        (folder / PAGE).unlink(missing_ok=True)
        shutil.rmtree(folder / "data", ignore_errors=True)
        for kind in ("features", "tokens"):
            made(folder / "data" / kind)

    def write(self, name: str, value: Any) -> None:
        """Write what the page asks for as `name`."""
        self._put(self._folder / "data" / f"{name}.js", script(name, value))

    def finish(self) -> None:
        """Write the page itself."""
        every = [
            one
            for one in resources.files("analyze.pages.browser").joinpath("assets").iterdir()
            if one.is_file()
        ]
        for asset in sorted(every, key=lambda one: (one.name == PAGE, one.name)):
            self._put(self._folder / asset.name, asset.read_bytes())

    def _put(self, path: Path, content: bytes) -> None:
        self.bytes += durable.write(path, [content]).bytes
        self.files += 1


def _features(
    site: Site, file: pq.ParquetFile, shown: Shown, stop: StopRequest
) -> tuple[dict[str, Any], list[Column]]:
    """Write the latents' pages; the list's texts, and its columns that the catalogue knows."""
    words, progress, total = pages.Words(shown.say), Progress(), file.metadata.num_rows
    strongest, raised, density, largest = (
        list[list[int]](),
        list[list[int]](),
        list[Any](),
        list[Any](),
    )
    for number, block in enumerate(pages.blocks(file)):
        stop.check()
        site.write(f"features/{number:03d}", pages.page(block, shown))
        here = pages.heads(block, words)
        strongest, raised = strongest + here[0], raised + here[1]
        density += block.column("density").to_pylist()
        largest += block.column("max").to_pylist()
        progress.show(f"pages of {len(density):,}/{total:,} latents", last=len(density) == total)
    known = [
        Column("density", "density", "share of rows in which it fires", np.array(density)),
        Column("max", "largest", "largest activation", np.array(largest, np.float64)),
    ]
    return {"words": words.texts, "strongest": strongest, "raised": raised}, known


def _meta(
    study: Study, file: pq.ParquetFile, shown: list[Column], others: list[Other], *, as_ids: bool
) -> Any:
    subject, said = study.subject, file.schema_arrow.metadata
    manifest = subject.store.manifest
    return {
        "name": subject.run.resolve().name,
        "layer": subject.layer,
        "model": str(manifest["model"]["id"]),
        "rows": int(said[b"rows"]),
        "features": subject.sae.d_sae,
        "chunk": CHUNK,
        "shard": tokens.SHARD,
        "edges": short(np.array(_edges(said))),
        "columns": [{"key": one.key, "label": one.label, "about": one.about} for one in shown],
        "others": [_link(study, other) for other in others],
        "as_ids": as_ids,
    }


def _edges(metadata: Mapping[bytes, bytes]) -> list[float]:
    found: list[float] = json.loads(metadata[b"histogram_edges"])
    return found


def _link(study: Study, other: Other) -> dict[str, Any]:
    """Another run, and where its own browser is from this one, if it has one."""
    page = other.subject.run / FOLDER / study.name / PAGE
    place = os.path.relpath(page.resolve(), study.folder.resolve())
    return {
        "name": other.subject.run.resolve().name,
        "layer": other.subject.layer,
        "page": quote(place) if page.is_file() else None,
    }


def _summary(study: Study, figures: dict[str, Any], *, as_ids: bool) -> list[str]:
    lines = [
        f"{study.folder / PAGE} shows {figures['features']:,} latents and {figures['tokens']:,} tokens: open it from "
        f"the disk, or put the folder on any static host ({figures['files']:,} files, {figures['bytes'] / 1e6:.1f} MB, "
        f"made in {duration(figures['seconds'])})."
    ]
    if figures["others"]:
        lines.append(
            f"Each latent is joined with those of {', '.join(figures['others'])} that fire where it fires."
        )
    if as_ids:
        lines.append(
            "Tokens are shown as ids: the model's tokenizer is not at hand; give model.path=."
        )
    return lines


DEFINITION = Definition(browser, options=Options, inputs=inputs, order=201, finds=False)
