"""The activation store: the one contract between harvesting, training and analysis.

What may never change (format 1): a Zarr v3 group of these arrays, cut into units along their first axis:

    tokens, document           (S, T) uint32          the spine: packed rows; which document a token comes from
    token_index                (N,)   uint32 | uint64 row of every residual array -> flat index into the spine, N = S*T
    layer_L                    (N, d) bfloat16        residual stream after decoder layer L, rows permuted in their unit
    norm_L                     (N,)   float32         Euclidean norms of those rows
    moments_L                  (units, 3, 2, d) float64   [BOS, outlier, ordinary] x [mean, sum of squared deviations]

A unit is the unit of work, writing, commit, checksum, statistics and resume. Its objects are written first, then its
record in commits/ is created; a reader believes records alone. The group's attributes hold the manifest, which is
written once and compared on every later open.

Shapes: S spine rows, T context, N = S*T tokens, d d_model, R spine rows per unit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import durable, order, records
from data.array import UnitArray
from data.durable import Written
from data.errors import MismatchError, StoreError, differences
from data.kinds import kinds_of, moments_of, norms_of
from data.moments import Moments, merge_all

FORMAT = 1
_RESIDUAL_RECORD = re.compile(r"(?P<unit>\d{8})\.(?P<layers>\d+(_\d+)*)\.json")


class Cursor(NamedTuple):
    """Where the text goes on: the next token to place in the spine."""

    document: int  # number in the source's order
    offset: int  # tokens of it that are placed already


class SpineEnd(NamedTuple):
    """How the text ended."""

    rows: int  # S
    ended_early: bool  # the source had less text than was asked for


class Store:
    """A store on disk. Arrays are read by unit; nothing without a commit record is ever served."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = dict(manifest)
        self.context: int = manifest["context"]
        self.d_model: int = manifest["model"]["d_model"]
        self.unit_tokens: int = manifest["unit"]
        self._spine: dict[int, dict[str, Any]] = {}
        self._residuals: dict[tuple[int, int], dict[str, Any]] = {}  # (layer, unit) -> record
        self.refresh()

    # -- opening ------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open an existing store, checking that every committed object is there in full.

        Raises:
            StoreError: there is none at `path`, it is of another format, or an object is missing or cut.
        """
        metadata = path / "zarr.json"
        if not metadata.is_file():
            raise StoreError(f"no activation store at {path}; make one with `python -m harvest store={path} ...`")
        try:
            manifest = json.loads(metadata.read_bytes())["attributes"]["manifest"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{metadata} is not the metadata of an activation store") from error
        if manifest.get("format") != FORMAT:
            raise StoreError(f"{path} has store format {manifest.get('format')!r}; this version reads {FORMAT}")
        return cls(path, manifest)

    @classmethod
    def open_or_create(cls, path: Path, manifest: Mapping[str, Any]) -> Store:
        """Open the store at `path` if its manifest equals `manifest`; create it where there is none.

        Raises:
            MismatchError: it was made with other settings; the message names both values.
        """
        wanted = {"format": FORMAT, **manifest}
        if not (path / "zarr.json").exists():
            if path.exists() and not all(durable.is_temporary(file) for file in path.iterdir()):
                raise StoreError(f"{path} exists and is not an activation store; choose another store=")
            durable.make_directory(path)
            cls(path, wanted)._write_group({})
        store = cls.open(path)
        if unequal := differences(store.manifest, wanted):
            if store._spine or store._residuals:
                raise MismatchError(f"store {path}", unequal, "Use those settings, or another store=.")
            store = cls(path, wanted)  # without a commit there is nothing to protect
        durable.make_directory(path / "commits" / "spine")
        durable.make_directory(path / "commits" / "residuals")
        if store.spine_end is None:
            store._declare()
        return store

    def refresh(self) -> None:
        """Read the commit records again, and check that what they name is there in full."""
        commits = self.path / "commits"
        self._spine = {int(p.stem): records.read(p) for p in sorted((commits / "spine").glob("????????.json"))}
        self._residuals, self._next_spine_unit = {}, 0
        for path in sorted((commits / "residuals").glob("*.json")):
            if match := _RESIDUAL_RECORD.fullmatch(path.name):
                record = records.read(path)
                for layer in match["layers"].split("_"):
                    self._residuals[int(layer), int(match["unit"])] = record
        for record in self._all_records():
            for key, (size, _) in record["objects"].items():
                self._check_size(key, size)
        self.__dict__.pop("spine_end", None)

    def _check_size(self, key: str, size: int) -> None:
        path = self.path / key
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise StoreError(
                f"{path} {state}; `python -m harvest action=repair store={self.path}` drops its unit's record, "
                "and harvesting again redoes the unit"
            )

    def _all_records(self) -> list[dict[str, Any]]:
        unique = {id(record): record for record in (*self._spine.values(), *self._residuals.values())}
        return list(unique.values())

    # -- shape --------------------------------------------------------------------------------------------------

    @cached_property
    def spine_end(self) -> SpineEnd | None:
        """How the text ended, or None while the spine is being written."""
        path = self.path / "commits" / "spine" / "end.json"
        return SpineEnd(**records.read(path)) if path.exists() else None

    @property
    def spine_complete(self) -> bool:
        """Whether the text's end is known and every unit of the spine has its record."""
        return self.spine_end is not None and all(unit in self._spine for unit in range(self.units))

    @property
    def spine_rows(self) -> int:
        """S: rows of the finished spine, or the planned ones while it is being written."""
        end = self.spine_end
        return end.rows if end else -(-self.manifest["tokens"] // self.context)

    @property
    def rows(self) -> int:
        """N: tokens of the spine and rows of every residual array."""
        return self.spine_rows * self.context

    @property
    def units(self) -> int:
        return -(-self.rows // self.unit_tokens)

    @property
    def layers(self) -> list[int]:
        """Layers that have at least one committed unit."""
        return sorted({layer for layer, _ in self._residuals})

    @property
    def identity(self) -> str:
        """Digest of what the store's contents follow from: its manifest and where its text ended."""
        end = self.spine_end
        return records.digest({"manifest": self.manifest, "rows": end.rows if end else None})

    def array(self, name: str) -> UnitArray:
        """The description of one array by name, e.g. `tokens`, `layer_21`."""
        codec = self.manifest["codec"]
        spine_unit = self.unit_tokens // self.context
        if name in ("tokens", "document"):
            return UnitArray(name, "uint32", self.spine_rows, (self.context,), spine_unit, codec)
        if name == "token_index":
            # By the tokens asked for, which unlike the rows reached are known from the start.
            wide = "uint64" if self.manifest["tokens"] + self.context > 2**32 else "uint32"
            return UnitArray(name, wide, self.rows, (), self.unit_tokens, codec)
        kind = name.split("_")[0]
        if kind == "norm":
            return UnitArray(name, "float32", self.rows, (), self.unit_tokens, codec)
        if kind == "moments":
            return UnitArray(name, "float64", self.units, (3, 2, self.d_model), 1, codec)
        assert kind == "layer", name
        chunk = self.manifest["chunk"]
        return UnitArray(name, "bfloat16", self.rows, (self.d_model,), self.unit_tokens, codec, chunk)

    def _declare(self, layers: Sequence[int] = ()) -> None:
        """Write the Zarr metadata of the group and of every array, at their present shapes."""
        every = sorted({*self.layers, *layers})
        names = ["tokens", "document", "token_index"]
        names += [f"{kind}_{layer}" for layer in every for kind in ("layer", "norm", "moments")]
        arrays = {name: self.array(name).metadata() for name in names}
        for name, metadata in arrays.items():
            durable.make_directory(self.path / name)
            durable.write(self.path / name / "zarr.json", [_json(metadata)])
        self._write_group(arrays)

    def _write_group(self, arrays: Mapping[str, Any]) -> None:
        # Inline metadata spares readers a directory listing, in which commits/ would be no Zarr node.
        inline = {"kind": "inline", "must_understand": False, "metadata": arrays}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"manifest": self.manifest}}
        durable.write(self.path / "zarr.json", [_json({**group, "consolidated_metadata": inline})])

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="encode")

    # -- the spine ----------------------------------------------------------------------------------------------

    def spine_cursor(self) -> tuple[int, Cursor]:
        """The first uncommitted spine unit, and where its text starts."""
        while self._next_spine_unit in self._spine:
            self._next_spine_unit += 1
        unit = self._next_spine_unit
        return unit, Cursor(*self._spine[unit - 1]["cursor"]) if unit else Cursor(0, 0)

    def spine_written(self) -> int:
        """Rows of the spine that are committed, wherever they lie."""
        return sum(record["rows"] for record in self._spine.values())

    def commit_spine(self, unit: int, tokens: NDArray[np.uint32], document: NDArray[np.uint32], end: Cursor) -> None:
        """Commit one unit of packed rows, (R, T) each; `end` is the cursor behind its last token."""
        index = order.permutation(tokens.size, self.manifest["seed"], unit) + unit * self.unit_tokens
        index = index.astype(self.array("token_index").dtype)
        objects: dict[str, Written] = {}
        for name, rows in (("tokens", tokens), ("document", document), ("token_index", index)):
            objects |= self._write(name, unit, rows)
        body = {"unit": unit, "rows": len(tokens), "cursor": list(end), "objects": objects}
        if not records.create(self.path / "commits" / "spine" / f"{unit:08d}.json", body):
            raise StoreError(f"another process committed spine unit {unit} of {self.path}; stop one of the two")
        self._spine[unit] = body

    def close_spine(self, end: SpineEnd) -> None:
        """Fix the store's final shape."""
        records.create(self.path / "commits" / "spine" / "end.json", end._asdict())
        self.__dict__.pop("spine_end", None)
        self._declare()

    def tokens(self, unit: int) -> NDArray[np.uint32]:
        """(R, T) token ids of a unit's spine rows."""
        return self._read_spine("tokens", unit)

    def document(self, unit: int) -> NDArray[np.uint32]:
        """(R, T) document numbers of a unit's spine rows."""
        return self._read_spine("document", unit)

    def _read_spine(self, name: str, unit: int) -> NDArray[Any]:
        if unit not in self._spine:
            raise StoreError(f"unit {unit} of {self.path} is not committed; run `python -m harvest` again")
        return self.array(name).read(self.path, unit)

    # -- residuals ----------------------------------------------------------------------------------------------

    def missing(self, layers: Sequence[int]) -> dict[int, list[int]]:
        """Units that lack some of `layers`, with the layers that each lacks, in order."""
        lacking = {u: [layer for layer in layers if (layer, u) not in self._residuals] for u in range(self.units)}
        return {unit: needed for unit, needed in lacking.items() if needed}

    def complete(self, layer: int) -> bool:
        """Whether every unit of `layer` is committed."""
        return self.spine_complete and not self.missing([layer])

    def permutation(self, unit: int) -> NDArray[np.int64]:
        """(n,) the token of each stored row of a unit, as flat position in the unit's spine rows."""
        return self.token_index(unit).astype(np.int64) - unit * self.unit_tokens

    def piece_starts(self, unit: int) -> NDArray[np.bool_]:
        """(R, T) which tokens of a unit begin a document's piece: these are its BOS tokens."""
        document = self.document(unit)
        starts = np.ones(document.shape, np.bool_)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        return starts

    def commit_residuals(self, unit: int, rows: Mapping[int, NDArray[np.uint16]]) -> None:
        """Commit residuals of one unit for all of `rows`' layers at once.

        Args:
            rows: per layer, (n, d) bfloat16 bits in spine order; they are permuted here.
        """
        permutation = self.permutation(unit)
        bos = self.piece_starts(unit).ravel()[permutation]
        objects: dict[str, Written] = {}
        counts: dict[str, list[int]] = {}
        for layer, unordered in rows.items():
            bits = unordered[permutation]
            norms = norms_of(bits)
            moments = moments_of(bits, kinds_of(norms, bos))
            objects |= self._write(f"layer_{layer}", unit, bits)
            objects |= self._write(f"norm_{layer}", unit, norms)
            stacked = np.array([[[of_kind.mean, of_kind.m2] for of_kind in moments]])
            objects |= self._write(f"moments_{layer}", unit, stacked)
            counts[str(layer)] = [of_kind.count for of_kind in moments]
        body = {"unit": unit, "rows": len(bos), "objects": objects, "counts": counts}
        name = f"{unit:08d}.{'_'.join(map(str, sorted(rows)))}.json"
        if not records.create(self.path / "commits" / "residuals" / name, body):
            raise StoreError(f"another process committed unit {unit} of {self.path}; stop one of the two")
        for layer in rows:
            self._residuals[layer, unit] = body

    def declare_layers(self, layers: Sequence[int]) -> None:
        """Make room for `layers`; the spine must be closed, because their arrays have its final length."""
        assert self.spine_end is not None
        self._declare(layers)

    def non_finite(self, layer: int) -> int:
        """Rows of `layer` with NaN or infinity in the committed units."""
        return sum(r["rows"] - sum(r["counts"][str(layer)]) for (at, _), r in self._residuals.items() if at == layer)

    def token_index(self, unit: int) -> NDArray[Any]:
        """(n,) flat spine index of each stored row of a unit."""
        return self._read_spine("token_index", unit)

    def norms(self, layer: int, unit: int) -> NDArray[np.float32]:
        """(n,) Euclidean norms of a unit's stored rows."""
        self._require(layer, unit)
        return self.array(f"norm_{layer}").read(self.path, unit)

    def residuals(self, layer: int, unit: int) -> NDArray[np.uint16]:
        """(n, d) bfloat16 bits of a unit's stored rows."""
        self._require(layer, unit)
        return self.array(f"layer_{layer}").read(self.path, unit)

    def kinds(self, layer: int, unit: int) -> NDArray[np.int8]:
        """(n,) kind of each of a unit's stored rows: see data/kinds.py."""
        return kinds_of(self.norms(layer, unit), self.piece_starts(unit).ravel()[self.permutation(unit)])

    def moments(self, layer: int, units: Sequence[int], kinds: Sequence[int]) -> Moments:
        """Exact statistics of the rows of `units` that are of one of `kinds`."""
        array = self.array(f"moments_{layer}")
        parts = []
        for unit in units:
            self._require(layer, unit)
            counts = self._residuals[layer, unit]["counts"][str(layer)]
            groups = array.read(self.path, unit)[0]
            parts += [Moments(counts[kind], groups[kind, 0], groups[kind, 1]) for kind in kinds]
        return merge_all(parts, self.d_model)

    def _require(self, layer: int, unit: int) -> None:
        if (layer, unit) not in self._residuals:
            have = ", ".join(map(str, self.layers)) or "none"
            raise StoreError(f"unit {unit} of layer {layer} is not in {self.path} (layers there: {have})")

    def _write(self, name: str, unit: int, rows: NDArray[Any]) -> dict[str, Written]:
        array = self.array(name)
        return {array.key(unit): durable.write(self.path / array.key(unit), array.encode(rows, self._pool))}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
