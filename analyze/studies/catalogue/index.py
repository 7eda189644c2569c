"""The inverted index: where every latent fires, as Parquet files that any reader opens.

One file per unit of the store, written once and whole. A row is one latent above 0 at one token,
sorted by latent and then by token:

    feature    uint32    latent
    token      uint32    flat position in the unit's spine rows; + unit * unit_tokens: in all
    document   uint32    as the store numbers them
    position   uint32    tokens since the BOS of the document's piece, which is 0
    value      float32   activation, exactly as encoded

Row group g holds the latents from BLOCK * g on. So a reader that looks at statistics reads one
latent without the others: `pyarrow.parquet.read_table(file, filters=[("feature", "==", 17)])`.
Integers are dictionaries of few bits: 9.2 bytes a row in all in units of 65,536 tokens, so 4.7 GB
for 4 million tokens at k = 128.

Shapes: p pairs of a latent and a token, F d_sae.

A unit's latents are written from the host, so it waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse

from residual_saes.analyze.latents.encoding import Unit
from residual_saes.analyze.subject import Subject
from residual_saes.data import digests, durable
from residual_saes.data.digests import Digests
from residual_saes.data.durable import Written
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.train import kernels

_WAY_OUT = "`python -m analyze study=catalogue run=...` makes it"
BLOCK = 1024  # latents of a row group
_INTEGERS = ("feature", "token", "document", "position")


class Postings(NamedTuple):
    """The rows of one file, or of one row group of it; (p,) each."""

    feature: NDArray[np.uint32]
    token: NDArray[np.uint32]  # flat position in the unit's spine rows
    document: NDArray[np.uint32]
    position: NDArray[np.uint32]
    value: NDArray[np.float32]  # > 0


class Found(NamedTuple):
    """Where one latent fires, in the order of the text; (p,) each."""

    token: NDArray[np.int64]  # flat position in the store's spine
    document: NDArray[np.uint32]
    position: NDArray[np.uint32]
    value: NDArray[np.float32]


# -- one unit --------------------------------------------------------------------------------------


def encode(subject: Subject, unit: Unit) -> tuple[Postings, int]:
    """What fires in a unit, and the number of rows encoded: the policy's rows without BOS."""
    rows = subject.text_rows(unit)
    pairs = subject.pairs(unit, rows)
    # The sort is stable, so the tokens of one latent stay in the order of the text. It runs on the
    # SAE's device.
    order = kernels.group_by_latent(pairs.latent, subject.sae.d_sae).order
    row = rows[pairs.row[order].cpu().numpy()]
    postings = Postings(
        feature=pairs.latent[order].cpu().numpy().astype(np.uint32),
        token=unit.local[row].astype(np.uint32),
        document=unit.document[row],
        position=unit.position[row].astype(np.uint32),
        value=pairs.value[order].cpu().numpy(),
    )
    return postings, len(rows)


def write(
    path: Path,
    postings: Postings,
    identity: str,
    *,
    rows: int,
    d_sae: int,
    unit_tokens: int,
) -> Written:
    """Write a unit's file.

    Args:
        identity: digest of everything that the activations follow from.
        rows: number of rows that were encoded.
        unit_tokens: tokens of a whole unit of the store.
    """
    metadata = {
        "rows": str(rows),
        "d_sae": str(d_sae),
        "unit_tokens": str(unit_tokens),
        "identity": identity,
    }
    table = pa.table(postings._asdict()).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    bounds = np.searchsorted(postings.feature, np.arange(0, d_sae + BLOCK, BLOCK))
    with pq.ParquetWriter(
        sink, table.schema, compression="NONE", use_dictionary=list(_INTEGERS)
    ) as writer:
        for low, high in pairwise(bounds.tolist()):
            writer.write_table(table.slice(low, high - low), row_group_size=max(high - low, 1))
    return durable.write(path, [memoryview(sink.getvalue())])


def rows_of(path: Path, identity: str) -> int | None:
    """The number of rows that were encoded for a unit's whole file; None: of another identity."""
    metadata = pq.read_schema(path).metadata or {}
    return int(metadata[b"rows"]) if metadata.get(b"identity") == identity.encode() else None


# -- all units -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """The files of some units, in one folder."""

    folder: Path
    units: Sequence[int]
    d_sae: int
    unit_tokens: int

    @classmethod
    def open(cls, folder: Path) -> Index:
        """The index in the folder `index` of a catalogue.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        files = digests.read(folder.parent, _WAY_OUT)
        if files is None:
            raise StoreError(f"{folder.parent} is no whole catalogue; {_WAY_OUT}")
        own = [name for name in files.files if name.startswith(f"{folder.name}/")]
        files.require(own, _WAY_OUT)
        return cls.of(folder, files)

    @classmethod
    def of(cls, folder: Path, files: Digests) -> Index:
        """The index in `folder` of the files that were recorded, and found whole, beside it.

        Raises:
            StoreError: there is none.
        """
        paths = [files.folder / name for name in sorted(files.files)]
        paths = [path for path in paths if path.parent == folder]
        if not paths:
            raise StoreError(f"no index in {folder}; {_WAY_OUT}")
        metadata = pq.read_schema(paths[0]).metadata
        units = [int(path.stem.split("_")[1]) for path in paths]
        return cls(folder, units, int(metadata[b"d_sae"]), int(metadata[b"unit_tokens"]))

    def path(self, unit: int) -> Path:
        return self.folder / f"unit_{unit:06d}.parquet"

    def linked(self, folder: Path) -> Index:
        """The same index in `folder`: hard links to the files, or copies where links fail."""
        for unit in self.units:
            source = self.path(unit)
            target = folder / source.name
            try:
                os.link(source, target)
            except OSError:  # the file system has no hard links
                durable.write(target, [source.read_bytes()])
        return replace(self, folder=folder)

    def block(self, unit: int, number: int) -> Postings:
        """A unit's row group `number`: the latents from BLOCK * number on."""
        with pq.ParquetFile(self.path(unit)) as file:
            return _postings(file.read_row_group(number))

    def all_of(self, unit: int) -> Postings:
        """All that fires in a unit."""
        return _postings(pq.read_table(self.path(unit)))

    def activations(self, unit: int) -> Any:
        """A unit's activations: scipy.sparse.csr_array (F, tokens of the unit)."""
        postings = self.all_of(unit)
        places = postings.feature.astype(np.int64), postings.token.astype(np.int64)
        return sparse.csr_array((postings.value, places), shape=(self.d_sae, self.unit_tokens))

    def first(self, tokens: int) -> list[int]:
        """The first units that hold so many tokens, one at least."""
        return list(self.units[: max(1, -(-tokens // self.unit_tokens))])

    def rows(self, unit: int) -> int:
        """Rows that were encoded for a unit."""
        return int(pq.read_schema(self.path(unit)).metadata[b"rows"])

    def search(self, feature: int) -> Found:
        """Every token at which a latent fires.

        Raises:
            SettingError: there is no such latent.
        """
        if not 0 <= feature < self.d_sae:
            raise SettingError(f"feature={feature} must be from 0 to {self.d_sae - 1}")
        parts = []
        for unit in self.units:
            block = self.block(unit, feature // BLOCK)
            low, high = np.searchsorted(block.feature, [feature, feature + 1])
            token = block.token[low:high].astype(np.int64) + unit * self.unit_tokens
            parts.append((token, *(column[low:high] for column in block[2:])))
        return Found._make(np.concatenate(column) for column in zip(*parts, strict=True))


def _postings(table: pa.Table) -> Postings:
    return Postings._make(table.column(name).to_numpy() for name in Postings._fields)
