"""The activation store: the one contract between harvesting, training and analysis.

What may never change (format 2): a Zarr v3 group of these arrays, cut into units along their first
axis:

    tokens, document   (S, T) uint32              the spine: packed rows; which document a token comes from
    token_index        (N,)   uint32 | uint64     row of every residual array -> flat index into the spine, N = S*T
    layer_L            (N, d) bfloat16            residual stream after decoder layer L, rows permuted in their unit
    norm_L             (N,)   float32             Euclidean norms of those rows
    kind_L             (N,)   uint8               what each row is: see data/store/kinds.py
    moments_L          (units, 3, 2, d) float64   [BOS, outlier, ordinary] x [mean, sum of squared deviations]
    summary_L          (2, 3, 2, d) float64       the same of all [training, held-out] units together

A unit is the unit of work, writing, commit, checksum, statistics and resume. Its objects are
written first, then its record in commits/ is created; a reader believes records alone.
commits/manifest.json is written once and compared on every later open; the group's attributes
repeat it.

Shapes: S spine rows, T context, N = S*T tokens, d d_model, R spine rows per unit, C inner chunks
    per unit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import order
from data.durable import Written
from data.errors import StoreError
from data.store import ledger, manifest, records
from data.store.ledger import LayerLedger, Ledger
from data.store.moments import Moments
from data.store.place import Place, place_of
from data.store.shard import UnitArray
from data.text.packing import Cursor

if TYPE_CHECKING:  # the process that writes the spine goes without torch
    from data.store.int8 import StandardizedInt8
    from data.store.unit import Prepared

_END = "commits/spine/end.json"
KINDS = 3  # BOS, OUTLIER, ORDINARY: the kinds that have statistics


class SpineEnd(NamedTuple):
    """How the text ended."""

    rows: int  # S
    ended_early: bool  # the source had less text than was asked for


class Store:
    """A store. Arrays are read by unit; nothing without a commit record is ever served."""

    def __init__(self, place: Place, manifest: Mapping[str, Any]) -> None:
        self.place, self.manifest = place, dict(manifest)
        self.context: int = manifest["context"]
        self.d_model: int = manifest["model"]["d_model"]
        self.unit_tokens: int = manifest["unit"]
        self._scales: dict[int, StandardizedInt8] = {}
        self.spine_end = (
            self._read_end()
        )  # how the text ended, or None while the spine is being written
        self.ledger = Ledger(place, self.units, self.chunks)

    # -- opening -----------------------------------------------------------------------------------

    @classmethod
    def open(cls, where: Path | str | Place) -> Store:
        """Open an existing store, checking that every committed object is there in full.

        Raises:
            StoreError: there is none there, it is of another format, or an object is missing or
                cut.
        """
        place = place_of(where)
        return cls(place, manifest.read(place))

    @classmethod
    def open_or_create(cls, where: Path | str | Place, settings: Mapping[str, Any]) -> Store:
        """Open the store there if its manifest equals `settings`; create it where there is none.

        Raises:
            MismatchError: it was made with other settings; the message names both values.
        """
        place = place_of(where)
        return cls(place, manifest.agree(place, settings))

    @property
    def name(self) -> str:
        """Its path or URL, as it was given."""
        return self.place.name

    def refresh(self) -> None:
        """Take in what other processes have committed."""
        self.spine_end = self.spine_end or self._read_end()
        self.ledger.refresh()

    def _read_end(self) -> SpineEnd | None:
        try:
            return SpineEnd(**records.decode(self.place.read(_END), f"{self.name}/{_END}"))
        except FileNotFoundError:
            return None

    # -- shape -------------------------------------------------------------------------------------

    @property
    def spine_complete(self) -> bool:
        """Whether the text's end is known and every unit of the spine has its record."""
        return self.spine_end is not None and bool(self.ledger.spine_rows[: self.units].all())

    @property
    def spine_rows(self) -> int:
        """S: rows of the finished spine, or the planned ones while it is being written."""
        end = self.spine_end
        return end.rows if end else self.planned_rows

    @property
    def planned_rows(self) -> int:
        """Rows that were asked for."""
        return int(-(-self.manifest["tokens"] // self.context))

    @property
    def rows(self) -> int:
        """N: tokens of the spine and rows of every residual array."""
        return self.spine_rows * self.context

    @property
    def units(self) -> int:
        return -(-self.rows // self.unit_tokens)

    @property
    def chunks(self) -> int:
        """C: inner chunks per unit."""
        return int(self.unit_tokens // self.manifest["chunk"])

    @property
    def layers(self) -> list[int]:
        """Layers that have at least one committed unit."""
        return sorted(self.ledger.layers)

    @property
    def identity(self) -> str:
        """Digest of what the store's contents follow from: its manifest and where its text
        ended.
        """
        end = self.spine_end
        return records.digest({"manifest": self.manifest, "rows": end.rows if end else None})

    def rows_of(self, unit: int) -> int:
        """Tokens of a unit whose spine is committed."""
        return int(self.ledger.spine_rows[unit]) * self.context

    def array(self, name: str) -> UnitArray:
        """The description of one array by name, e.g. `tokens`, `layer_21`."""
        codec = self.manifest["codec"]
        lossless = "blosc" if codec == "int8" else codec
        spine_unit = self.unit_tokens // self.context
        if name in ("tokens", "document"):
            return UnitArray(name, "uint32", self.spine_rows, (self.context,), spine_unit, lossless)
        if name == "token_index":
            # By the tokens asked for, which unlike the rows reached are known from the start.
            wide = "uint64" if self.manifest["tokens"] + self.context > 2**32 else "uint32"
            return UnitArray(name, wide, self.rows, (), self.unit_tokens, lossless)
        kind, layer = name.split("_")
        if kind in ("norm", "kind"):
            return UnitArray(
                name,
                "float32" if kind == "norm" else "uint8",
                self.rows,
                (),
                self.unit_tokens,
                lossless,
            )
        if kind in ("moments", "summary"):
            length, unit = (self.units, 1) if kind == "moments" else (2, 2)
            return UnitArray(name, "float64", length, (KINDS, 2, self.d_model), unit, lossless)
        assert kind == "layer", name
        int8 = self._int8(int(layer)) if codec == "int8" else None
        shape = (self.d_model,)
        return UnitArray(
            name,
            "bfloat16",
            self.rows,
            shape,
            self.unit_tokens,
            codec,
            self.manifest["chunk"],
            int8,
        )

    def _int8(self, layer: int) -> StandardizedInt8:
        if layer not in self._scales:
            from data.store import scales

            self._scales[layer] = scales.read(self.place, layer)
        return self._scales[layer]

    def declare(self, layers: Iterable[int]) -> None:
        """Write the Zarr metadata of the group and of every array, at their present shapes.

        Nothing of ours reads it but `verify`: it is what other Zarr readers go by.
        """
        for key, text in self.metadata(layers).items():
            self.place.write(key, [text])

    def metadata(self, layers: Iterable[int]) -> dict[str, bytes]:
        """The zarr.json of the group and of every array, by key."""
        names = ["tokens", "document", "token_index"]
        kinds = ("layer", "norm", "kind", "moments", "summary")
        names += [f"{kind}_{layer}" for layer in sorted({*self.layers, *layers}) for kind in kinds]
        arrays = {name: self.array(name).metadata() for name in names}
        # Inline metadata spares readers a directory listing, in which commits/ would be no Zarr
        # node.
        inline = {"kind": "inline", "must_understand": False, "metadata": arrays}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"manifest": self.manifest}}
        texts = {f"{name}/zarr.json": _json(metadata) for name, metadata in arrays.items()}
        return {**texts, "zarr.json": _json({**group, "consolidated_metadata": inline})}

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="encode")

    # -- the spine ---------------------------------------------------------------------------------

    def spine_cursor(self) -> tuple[int, Cursor]:
        """The first uncommitted spine unit, and where its text starts."""
        unit = int(np.argmin(np.append(self.ledger.spine_rows, 0)))
        if unit == 0:
            return 0, Cursor(0, 0, None)
        key = ledger.spine_key(unit - 1)
        return unit, Cursor(*records.decode(self.place.read(key), f"{self.name}/{key}")["cursor"])

    def commit_spine(
        self, unit: int, tokens: NDArray[np.uint32], document: NDArray[np.uint32], end: Cursor
    ) -> None:
        """Commit one unit of packed rows, (R, T) each; `end` is the cursor behind its last
        token.
        """
        index = (
            order.permutation(tokens.size, self.manifest["seed"], unit) + unit * self.unit_tokens
        )
        index = index.astype(self.array("token_index").dtype)
        objects: dict[str, Written] = {}
        for name, rows in (("tokens", tokens), ("document", document), ("token_index", index)):
            objects |= self.write(name, unit, rows)
        pieces = int(_starts(document).sum())
        body = {
            "unit": unit,
            "rows": len(tokens),
            "pieces": pieces,
            "cursor": list(end),
            "objects": objects,
        }
        self.commit(ledger.spine_key(unit), body)
        self.ledger.note_spine(unit, body)

    def close_spine(self, end: SpineEnd) -> None:
        """Fix the store's final shape."""
        self.commit(_END, end._asdict())
        self.spine_end = end

    def tokens(self, unit: int) -> NDArray[np.uint32]:
        """(R, T) token ids of a unit's spine rows."""
        return self._read_spine("tokens", unit)

    def document(self, unit: int) -> NDArray[np.uint32]:
        """(R, T) document numbers of a unit's spine rows."""
        return self._read_spine("document", unit)

    def token_index(self, unit: int) -> NDArray[Any]:
        """(n,) flat spine index of each stored row of a unit."""
        return self._read_spine("token_index", unit)

    def piece_starts(self, unit: int) -> NDArray[np.bool_]:
        """(R, T) which tokens of a unit begin a document's piece: these are its BOS tokens."""
        return _starts(self.document(unit))

    def permutation(self, unit: int) -> NDArray[np.int64]:
        """(n,) the token of each stored row of a unit, as flat position in the unit's spine
        rows.
        """
        return self.token_index(unit).astype(np.int64) - unit * self.unit_tokens

    def _read_spine(self, name: str, unit: int) -> NDArray[Any]:
        if not (rows := int(self.ledger.spine_rows[unit])):
            raise StoreError(
                f"unit {unit} of {self.name} is not committed; run `python -m harvest` again"
            )
        return self.array(name).read(
            self.place, unit, rows if name != "token_index" else rows * self.context
        )

    # -- residuals ---------------------------------------------------------------------------------

    def _layer(self, layer: int) -> LayerLedger:
        return self.ledger.layers.get(layer) or LayerLedger.empty(
            len(self.ledger.spine_rows), self.chunks
        )

    def committed(self, layer: int) -> NDArray[np.bool_]:
        """(units,) which units of `layer` are there."""
        return self._layer(layer).committed[: self.units]

    def missing(self, layers: Sequence[int]) -> dict[int, list[int]]:
        """Units that lack some of `layers`, with the layers that each lacks, in order."""
        have = {layer: self.committed(layer) for layer in layers}
        lacking = np.flatnonzero(~np.all(list(have.values()), axis=0))
        return {int(unit): [layer for layer in layers if not have[layer][unit]] for unit in lacking}

    def committed_meanwhile(self, unit: int, layers: Sequence[int]) -> bool:
        """Whether another process has committed just these layers of a unit since the last
        `refresh`.
        """
        if not self.place.exists(key := ledger.residual_key(unit, layers)):
            return False
        self.ledger.note_residuals(unit, records.decode(self.place.read(key), f"{self.name}/{key}"))
        return True

    def complete(self, layer: int) -> bool:
        """Whether every unit of `layer` is committed."""
        return self.spine_complete and bool(self.committed(layer).all())

    def commit_residuals(
        self, unit: int, layers: Mapping[int, Prepared], batch: int | None = None
    ) -> None:
        """Commit one unit's rows of all of `layers` at once.

        Args:
            batch: packed rows per forward pass, if it was not the manifest's.
        """
        objects: dict[str, Written] = {}
        entries: dict[str, dict[str, Any]] = {}
        for layer, prepared in layers.items():
            objects |= self.write(f"layer_{layer}", unit, prepared.bits)
            objects |= self.write(f"norm_{layer}", unit, prepared.statistics.norms)
            objects |= self.write(f"kind_{layer}", unit, prepared.statistics.kinds.astype(np.uint8))
            objects |= self.write(f"moments_{layer}", unit, prepared.statistics.moments[None])
            entries[str(layer)] = prepared.entry(self.chunks) | ({"batch": batch} if batch else {})
        body = {"unit": unit, "rows": self.rows_of(unit), "objects": objects, "layers": entries}
        self.commit(ledger.residual_key(unit, layers), body)
        self.ledger.note_residuals(unit, body)

    def batch_of(self, layer: int, unit: int) -> int:
        """Packed rows per forward pass that a unit was made with."""
        return int(self._layer(layer).batch[unit] or self.manifest["batch"])

    def batches(self, layer: int) -> NDArray[np.int32]:
        """(units,) the same, where it was not the manifest's; else 0."""
        return self._layer(layer).batch[: self.units]

    def lost(self, layer: int, unit: int) -> float:
        """Sum of squared errors of a unit's ORDINARY rows, by a codec that loses something."""
        self._require(layer, unit)
        return float(self._layer(layer).lost[unit])

    def chunk_counts(self, layer: int, unit: int) -> NDArray[np.int32]:
        """(C, 3) rows of each inner chunk of a unit that are BOS, OUTLIER, ORDINARY."""
        self._require(layer, unit)
        counts: NDArray[np.int32] = self._layer(layer).chunks[unit]
        return counts

    def norm_sums(self, layer: int, unit: int) -> NDArray[np.float64]:
        """(3,) sums of the norms of a unit's BOS, OUTLIER, ORDINARY rows."""
        self._require(layer, unit)
        sums: NDArray[np.float64] = self._layer(layer).norm_sums[unit]
        return sums

    def norms(self, layer: int, unit: int) -> NDArray[np.float32]:
        """(n,) Euclidean norms of a unit's stored rows."""
        return self._read_rows(f"norm_{layer}", layer, unit)

    def residuals(self, layer: int, unit: int) -> NDArray[np.uint16]:
        """(n, d) bfloat16 bits of a unit's stored rows."""
        try:
            return self._read_rows(f"layer_{layer}", layer, unit)
        except StoreError:
            self.ledger.freed.refuse(self.array(f"layer_{layer}").key(unit))
            raise

    def kinds(self, layer: int, unit: int) -> NDArray[np.uint8]:
        """(n,) kind of each of a unit's stored rows: see data/store/kinds.py."""
        return self._read_rows(f"kind_{layer}", layer, unit)

    def _read_rows(self, name: str, layer: int, unit: int) -> NDArray[Any]:
        self._require(layer, unit)
        return self.array(name).read(self.place, unit, self.rows_of(unit))

    def _require(self, layer: int, unit: int) -> None:
        if not self._layer(layer).committed[unit]:
            have = ", ".join(map(str, self.layers)) or "none"
            raise StoreError(
                f"unit {unit} of layer {layer} is not in {self.name} (layers there: {have})"
            )

    # -- statistics --------------------------------------------------------------------------------

    def non_finite(self, layer: int) -> int:
        """Rows of `layer` with NaN or infinity in the committed units."""
        entry = self._layer(layer)
        rows = self.ledger.spine_rows.astype(np.int64)[entry.committed].sum() * self.context
        return int(rows - entry.chunks.sum(dtype=np.int64))

    def unit_moments(self, layer: int, unit: int) -> list[Moments]:
        """Exact statistics of a unit's BOS, OUTLIER and ORDINARY rows."""
        counts = self.chunk_counts(layer, unit).sum(0, dtype=np.int64)
        values = self.array(f"moments_{layer}").read(self.place, unit, 1)[0]
        return [
            Moments(int(count), *of_kind) for count, of_kind in zip(counts, values, strict=True)
        ]

    # -- writing -----------------------------------------------------------------------------------

    def write(self, name: str, unit: int, rows: NDArray[Any]) -> dict[str, Written]:
        """Write one unit's object of an array; nobody will read it before its record is there."""
        array = self.array(name)
        # Checksums alone are no work to share: they hold the interpreter, and threads only take
        # turns.
        pool = None if array.codec_name == "none" else self._pool
        return {array.key(unit): self.place.write(array.key(unit), array.encode(rows, pool))}

    def commit(self, key: str, body: Mapping[str, Any]) -> None:
        """Create a record. That another process was first is right if it says the same.

        Raises:
            StoreError: it says something else.
        """
        data = records.encode(body)
        if not self.place.create(key, data) and self.place.read(key) != data:
            raise StoreError(
                f"{self.name}/{key} was committed by another process and says something else; the two do not compute "
                "the same: stop one, and run `python -m harvest action=verify`"
            )


def _starts(document: NDArray[np.uint32]) -> NDArray[np.bool_]:
    starts = np.ones(document.shape, np.bool_)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return starts


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
