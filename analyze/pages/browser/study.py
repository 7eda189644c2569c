"""All latents to look through: static files that open from the disk and from any static host.

Made from the catalogue (features.parquet and its index), and from what other studies of the run
found. In the study's folder:

    index.html, *.css, *.js    the page; it asks for the files below alone, and shows them as text
    data/meta.js               the run, the columns, the other runs
    data/table.js              the list: column by column, a number per latent
    data/map.js                a place of each latent in two dimensions, see maps.py
    data/features/NNN.js       CHUNK latents each, see pages.py
    data/tokens.js             the tokens that occur, the most frequent first
    data/tokens/NNN.js         SHARD of them each: the latents that fire on them, see tokens.py
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq

from residual_saes.analyze.latents.contexts import AFTER, BEFORE
from residual_saes.analyze.latents.targets import class_names, names_of
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.pages.browser import (
    columns,
    crossings,
    interest,
    joins,
    maps,
    pages,
    spread,
    tokens,
)
from residual_saes.analyze.pages.browser.columns import Column
from residual_saes.analyze.pages.browser.crossings import Crossing
from residual_saes.analyze.pages.browser.joins import Other
from residual_saes.analyze.pages.browser.pages import CHUNK, Shown
from residual_saes.analyze.pages.browser.spread import Spread
from residual_saes.analyze.pages.browser.tokens import Tallies
from residual_saes.analyze.pages.script import script, short
from residual_saes.analyze.results import FOLDER, PAGE, made
from residual_saes.analyze.studies.catalogue import coactivation
from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.studies.catalogue.study import Files
from residual_saes.analyze.study import Definition, Study, at_least
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress, tell
from residual_saes.data.neutral import neutral
from residual_saes.data.settings import build


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/browser.yaml."""

    contexts: int = 10  # with the largest activations
    logits: bool = True  # histograms; False: none, and the language model is not loaded
    map: bool = True  # of all latents by decoder direction
    samples: int = 2  # contexts of each quantile
    # Directories of other runs on the same store, with catalogues.
    others: list[str] = field(default_factory=list)
    # Tokens on which latents are compared, in whole units: memory is about 50 bytes * k for each.
    rows: int = 250_000

    def __post_init__(self) -> None:
        at_least("study.contexts", self.contexts, 1)
        at_least("study.samples", self.samples, 0)
        at_least("study.rows", self.rows, 1)
        is_list = isinstance(self.others, list)
        if not is_list or not all(run and isinstance(run, str) for run in self.others):
            raise SettingError(
                f"study.others={self.others} must be a list of directories, such as [runs/b,runs/c]"
            )


def inputs(study: Study) -> Mapping[str, Any]:
    """What the pages depend on beside the settings.

    Raises:
        StoreError: this run or another one has no catalogue.
    """
    subject = study.subject
    catalogues = [catalogue.files(subject)]
    others = []
    options = build(Options, "study", study.options)
    for run in options.others:
        others.append(joins.open_other(subject, run))
        catalogues.append(others[-1].files)
    tables = columns.digests(columns.studied(subject))
    across = _crossings(subject, others)
    for crossing in across:
        tables[str(crossing.table)] = crossing.digest
    runs = {*(other.subject.run for other in others), *(crossing.run for crossing in across)}
    linked = sorted(str(run) for run in runs if (run / FOLDER / study.name / PAGE).is_file())
    return {
        **({"linked": linked} if linked else {}),
        "files": {**tables, **{str(files.table): files.digest for files in catalogues}},
        "units": [files.places.units for files in catalogues],
        "as_ids": catalogue.names(study) is None,
        "no_map": maps.missing(subject.sae.d_sae, wanted=options.map),
    }


def reads(study: Study) -> list[tuple[Path, str]]:
    """The studies whose files the pages are made of, for `Definition.reads`."""
    others = build(Options, "study", study.options).others
    catalogues = [(Path(run), "catalogue") for run in others]
    tables = [(study.subject.run, name) for name in columns.studied(study.subject)]
    for run in others:
        if (Path(run) / FOLDER / crossings.STUDY).is_dir():
            tables.append((Path(run), crossings.STUDY))
    return [*catalogue.read_by(study), *catalogues, *tables]


def _crossings(subject: Subject, others: list[Other]) -> list[Crossing]:
    return crossings.of(subject, [other.subject for other in others])


def browser(study: Study) -> Outcome:
    """Write the folder.

    Raises:
        StoreError: this run or another one has no catalogue.
    """
    options = build(Options, "study", study.options)
    subject = study.subject
    files = catalogue.files(subject)
    others = [joins.open_other(subject, run) for run in options.others]
    name_of = catalogue.names(study, parted=True)
    of_studies = columns.of_studies(subject, columns.studied(subject))
    across = _crossings(subject, others)
    with StopRequest() as stop:
        tallies = tokens.tally(subject.store, files.places, stop)
        shown = Shown(
            name=cache(name_of or (lambda token: f"#{token}")),
            contexts=options.contexts,
            samples=options.samples,
            others=[],
            listed=[*columns.of_targets(files.table), *of_studies],
            spreads=_spreads(study, files, stop) if options.logits else [],
            tokens=None if subject.ports.is_autoencoder else tokens.of_latents(tallies),
            crossings=[crossing.pairs(subject.sae.d_sae) for crossing in across],
            together=coactivation.partners(files.places, options.rows, stop),
        )
        for other in others:
            theirs = other.files.places
            shown.others.append(joins.partners(files.places, theirs, options.rows, stop))
        site = Site(study.folder)
        figures_of = _write_features(site, files, shown, stop)
        token_count = _write_tokens(site, tallies, shown)
        meta = _meta(study, files, figures_of, others, shown.spreads, as_ids=name_of is None)
        meta["no_map"] = maps.missing(subject.sae.d_sae, wanted=options.map)
        if meta["no_map"] is None:
            data, meta["map"] = maps.of(study, others)
            site.write("map", data)
        if across:
            meta["crossings"] = [_crossing(study, crossing) for crossing in across]
        site.write("meta", meta)
        site.finish()
    figures = {
        "features": subject.sae.d_sae,
        "tokens": token_count,
        "columns": [column.key for column in figures_of],
        "others": [str(other.subject.run) for other in others],
        "files": site.files,
        "bytes": site.bytes,
        "file": PAGE,
    }
    return Outcome(figures, _summary(study, figures, as_ids=name_of is None))


def _spreads(study: Study, files: Files, stop: StopRequest) -> list[Spread | None]:
    """Of each port the spread of its logits; None where the catalogue has none, or no model is."""
    spreads: list[Spread | None] = []
    table = pq.ParquetFile(files.table).read_row_group(0, columns=["raised"])
    if table.column("raised").null_count:
        return spreads
    subject = study.subject
    for port in subject.ports.writes:
        lm, reason = catalogue.head_of(study, port)
        if reason:
            tell(f"no histograms of logits: {reason}")
            spreads.append(None)
            continue
        key = {"version": spread.VERSION, **catalogue.identity_of(study, port)}
        W_dec = subject.sae.W_dec[:, subject.columns(port)]
        spreads.append(spread.measure(lm, W_dec, stop, subject.parts("spread", key)))
    return spreads


class Site:
    """The folder while it is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files = 0
        self.bytes = 0
        for kind in ("features", "tokens"):
            made(folder / "data" / kind)

    def write(self, name: str, value: Any) -> None:
        """Write what the page loads as `name`."""
        self._put(self._folder / "data" / f"{name}.js", script(name, value))

    def finish(self) -> None:
        """Write the page and its assets, the page last."""
        for name, content in assets().items():
            self._put(self._folder / name, content)

    def _put(self, path: Path, content: bytes) -> None:
        self.bytes += durable.write(path, [content]).bytes
        self.files += 1


def assets() -> dict[str, bytes]:
    """The page and what belongs to it by name, the page last.

    Its scripts but the first, which is load.js, become one file in their order: twelve files of a
    few kB each cost the first view 0.1 s.
    """
    folder = resources.files("residual_saes.analyze.pages.browser").joinpath("assets")
    files = {asset.name: asset.read_bytes() for asset in folder.iterdir() if asset.is_file()}
    page = files.pop(PAGE)
    names = [name.decode() for name in _SCRIPT.findall(page)][1:]
    joined = b"".join(files.pop(name) for name in names)
    for name in names[:-1]:
        page = page.replace(b'<script defer src="%s"></script>\n' % name.encode(), b"")
    return {**files, names[-1]: joined, PAGE: page}


_SCRIPT = re.compile(rb'<script defer src="(\w+\.js)"></script>\n')


def _write_features(site: Site, files: Files, shown: Shown, stop: StopRequest) -> list[Column]:
    """Write the latents' pages and the list; the list's columns."""
    table = pq.ParquetFile(files.table)
    total = table.metadata.num_rows
    words = pages.Words(shown.name)
    strongest: list[list[int]] = []
    raised: list[list[int]] = []
    classes: list[int] = []
    density: list[float] = []
    largest: list[float | None] = []
    scores: list[float] = []
    average = float(pq.read_table(files.table, columns=["count"]).column("count").to_numpy().mean())
    progress = Progress()
    for number, block in enumerate(pages.blocks(table)):
        stop.check()
        of_block = interest.scores(block, shown.name, average, shown.spreads)
        site.write(f"features/{number:03d}", pages.page(block, of_block, shown))
        scores += of_block.tolist()
        strongest += pages.strongest(block, words)
        raised += pages.raised(block, words)
        classes += block.column("class").to_pylist() if "class" in block.column_names else []
        density += block.column("density").to_pylist()
        largest += block.column("max").to_pylist()
        progress.show(f"pages of {len(density):,}/{total:,} latents", last=len(density) == total)
    listed = [
        Column("density", "density", "share of the tokens on which it fires", np.array(density)),
        Column(
            "max",
            "largest",
            "its largest activation, in the SAE's units",
            np.array(largest, float),
        ),
        Column("interest", "interest", _INTEREST, np.array(scores)),
        *shown.listed,
    ]
    figures = {column.key: short(column.values) for column in listed}
    texts = {"words": words.texts, "strongest": strongest, "raised": raised}
    of_targets = {"classes": classes} if classes else {}
    site.write("table", {**texts, **of_targets, "columns": figures})
    return listed


_INTEREST = (
    "from 0 to 1, how easily it is read: its strongest contexts share a token, and it raises a few "
    "tokens far above the rest; less if it fires hardly ever or very often"
)


def _write_tokens(site: Site, tallies: Tallies, shown: Shown) -> int:
    """Write the tokens and the latents that fire on them; how many tokens there are."""
    ids = tokens.ranked(tallies.occurrences)
    for number, shard in enumerate(tokens.shards(tallies, ids)):
        site.write(f"tokens/{number:03d}", shard)
    listed = {
        "ids": ids.tolist(),
        "texts": [shown.name(token) for token in ids.tolist()],
        "occurrences": tallies.occurrences[ids].tolist(),
    }
    site.write("tokens", listed)
    return len(ids)


def _meta(
    study: Study,
    files: Files,
    listed: list[Column],
    others: list[Other],
    spreads: Sequence[Spread | None],
    *,
    as_ids: bool,
) -> dict[str, Any]:
    """What the page says of the run, its columns and the other runs."""
    subject = study.subject
    metadata = pq.read_schema(files.table).metadata
    edges = np.array(json.loads(metadata[b"histogram_edges"]))
    models = [str(store.manifest["model"]["id"]) for store in subject.stores]
    described = []
    for column in listed:
        described.append({"key": column.key, "label": column.label, "about": column.about})
    return {
        "name": neutral(subject.run.resolve().name),
        **_where(subject),
        **_kind(subject, files),
        "model": neutral(" and ".join(dict.fromkeys(models))),
        "rows": int(metadata[b"rows"]),
        "features": subject.sae.d_sae,
        "chunk": CHUNK,
        "shard": tokens.SHARD,
        "edges": short(edges),
        "columns": described,
        "others": [_link(study, other) for other in others],
        "as_ids": as_ids,
        "around": [BEFORE, AFTER],
        "identity": subject.digest,
        "vocabulary": next((known.vocabulary for known in spreads if known), None),
        "report": "../../report.html",  # whether there is one may change any day
    }


def _where(subject: Subject) -> dict[str, Any]:
    """The layer of an SAE of resid_post; else the hook points in words."""
    if subject.is_resid_post:
        return {"layer": subject.layer}
    several = len(subject.ports.writes) > 1
    return {"where": neutral(" and ".join(names_of(subject))) if several else subject.where}


def _kind(subject: Subject, files: Files) -> dict[str, Any]:
    """What the page says of a transcoder or a crosscoder alone."""
    if not subject.ports.is_autoencoder:
        return {"reads": str(subject.ports.reads[0]), "writes": str(subject.ports.writes[0])}
    names = columns.target_names(files.table)
    if not names:
        return {}
    return {"targets": list(map(neutral, names)), "classes": list(map(neutral, class_names(names)))}


def _link(study: Study, other: Other) -> dict[str, Any]:
    return {**_page(study, other.subject.run), **_where(other.subject)}


def _crossing(study: Study, crossing: Crossing) -> dict[str, Any]:
    return {
        **_page(study, crossing.run),
        "where": neutral(crossing.where),
        "predicts": crossing.predicts,
    }


def _page(study: Study, run: Path) -> dict[str, Any]:
    """Another run, and the path of its own browser from this one, if it has one."""
    page = run / FOLDER / study.name / PAGE
    path = os.path.relpath(page.resolve(), study.place.resolve())
    return {"name": neutral(run.resolve().name), "page": quote(path) if page.is_file() else None}


def _summary(study: Study, figures: Mapping[str, Any], *, as_ids: bool) -> list[str]:
    """How large the folder is, and how to open it."""
    lines = [
        f"{study.place / PAGE} shows {figures['features']:,} latents and "
        f"{figures['tokens']:,} tokens: open it from the disk, or put the folder on any static "
        f"host ({figures['files']:,} files, {figures['bytes'] / 1e6:.1f} MB)."
    ]
    if figures["others"]:
        names = ", ".join(figures["others"])
        lines.append(f"Each latent is joined with those of {names} that fire where it fires.")
    if as_ids:
        lines.append(
            "Tokens are shown as ids: the model's tokenizer is not at hand; give model.path=."
        )
    return lines


DEFINITION = Definition(
    browser,
    options=Options,
    inputs=inputs,
    reads=reads,
    first=("catalogue",),
    order=201,
    finds=False,
    version=2,
)
