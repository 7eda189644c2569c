"""Text sources, and packing their documents into rows of `context` tokens.

A source is an endless or finite sequence of documents with a fixed order, so that a document's number is a complete
cursor. Sources never shuffle: rows are shuffled when they are written and when they are read, where it is exact
(streams that shuffle by themselves lost 309 rows and doubled 59 at one resume).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data import durable
from data.errors import SettingError, StoreError
from data.store import Cursor
from data.tiny import problems

SUFFIXES = (".txt", ".jsonl", ".parquet")


class TextSource(Protocol):
    """Where text comes from."""

    def identity(self) -> dict[str, Any]:
        """What the manifest records of it: equal identities give equal documents."""
        ...

    def documents(self, start: int) -> Iterator[str]:
        """Documents number `start`, `start` + 1, ..."""
        ...


@dataclass(frozen=True)
class TinyText:
    """The embedded word problems, with their solutions: an endless source that needs no file."""

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "tiny",
            "sample": durable.digest(*(d.encode() for d in islice(self.documents(0), 64))),
        }

    def documents(self, start: int) -> Iterator[str]:
        return map(problems.document, problems.problems("train", start))


@dataclass(frozen=True)
class FileText:
    """Local files in the order of their names: a .txt is one document, .jsonl and .parquet give one a row."""

    path: Path  # a file, or a folder that is searched for such files
    field: str = "text"  # column of .jsonl and .parquet that holds the document

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise SettingError(f"text.path={self.path} does not exist")
        if not self._files():
            raise SettingError(f"text.path={self.path} holds no text; allowed are {', '.join(SUFFIXES)} files")

    def _files(self) -> list[Path]:
        candidates = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        return [path for path in candidates if path.suffix in SUFFIXES and path.is_file()]

    def identity(self) -> dict[str, Any]:
        root = self.path if self.path.is_dir() else self.path.parent
        files = {str(file.relative_to(root)): durable.digest_file(file).xxh3_128 for file in self._files()}
        return {"kind": "files", "field": self.field, "files": files}

    def documents(self, start: int) -> Iterator[str]:
        every = (document for file in self._files() for document in self._read(file))
        return islice(every, start, None)

    def _read(self, file: Path) -> Iterator[str]:
        if file.suffix == ".txt":
            yield _decode(file, file.read_bytes())
        elif file.suffix == ".jsonl":
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield self._row(f"{file} line {number}", _json(file, number, line))
        else:
            yield from self._read_parquet(file)

    def _read_parquet(self, file: Path) -> Iterator[str]:
        import pyarrow as arrow
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(file)
        except (arrow.ArrowException, OSError) as error:
            raise StoreError(f"{file} is not a readable Parquet file: {error}") from error
        if self.field not in table.schema_arrow.names:
            self._row(str(file), dict.fromkeys(table.schema_arrow.names))
        for batch in table.iter_batches(columns=[self.field]):
            for value in batch.column(0).to_pylist():
                yield self._row(str(file), {self.field: value})

    def _row(self, where: str, row: Any) -> str:
        if not isinstance(row, dict) or self.field not in row:
            have = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise SettingError(f"{where} has no text.field={self.field!r}; it has {have}")
        if not isinstance(row[self.field], str):
            raise SettingError(f"{where}: {self.field!r} holds {type(row[self.field]).__name__}, not text")
        return str(row[self.field])


@dataclass(frozen=True)
class HubText:
    """A data set of the Hugging Face hub (or a local folder in its form), streamed in its own order."""

    dataset: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    revision: str = "main"

    def identity(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"kind": "hub", **settings, "revision": self._commit}

    @cached_property
    def _commit(self) -> str:
        """The commit that `revision` names now: a branch's name would go on to mean other text."""
        if Path(self.dataset).exists():
            return self.revision
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.dataset, revision=self.revision).sha)
        except Exception as error:  # network, gate, unknown name: the hub's client has a dozen kinds
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> StoreError:
        return StoreError(
            f"text.dataset={self.dataset} cannot be opened ({type(error).__name__}); check the name and the network, "
            "use text.path=FILE, or text=tiny, which needs no network"
        )

    def documents(self, start: int) -> Iterator[str]:
        import datasets

        try:
            stream = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self._commit, streaming=True
            )
        except Exception as error:  # the hub's client raises its own, requests', and fsspec's kinds
            raise self._unreachable(error) from error
        if stream.column_names and self.field not in stream.column_names:
            raise SettingError(f"{self.dataset} has no text.field={self.field!r}; it has {stream.column_names}")
        for number, row in enumerate(stream.skip(start), start):
            if not isinstance(row.get(self.field), str):
                raise SettingError(f"document {number} of {self.dataset} has no text in text.field={self.field!r}")
            yield row[self.field]


def _decode(file: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SettingError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error


def _json(file: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(_decode(file, line))
    except json.JSONDecodeError as error:
        raise SettingError(f"{file} line {number} is not JSON: {error.msg}") from error


class Row(NamedTuple):
    """One packed row."""

    tokens: NDArray[np.uint32]  # (T,)
    document: NDArray[np.uint32]  # (T,) document number of each token
    end: Cursor  # where the next row starts


def tokenized(
    documents: Iterator[str], encode: Callable[[list[str]], list[list[int]]], batch: int = 64
) -> Iterator[list[int]]:
    """Token ids of each document, without special tokens; `encode` gets `batch` documents at a time."""
    while texts := list(islice(documents, batch)):
        yield from encode(texts)


def pack(documents: Iterator[list[int]], start: Cursor, context: int, bos: int) -> Iterator[Row]:
    """Fill rows of `context` tokens with documents, end to end, each piece behind a BOS of its own.

    `documents` begins with document number `start.document`. A document that does not fit goes on in the next row,
    again behind a BOS; a row with one place left takes the next document's BOS alone. A last row that is not full is
    not given out. Documents without tokens take no place.
    """
    tokens: list[int] = []
    owner: list[int] = []
    number, offset = start
    for ids in documents:
        at, offset = offset, 0
        while at < len(ids):
            taken = min(len(ids) - at, context - len(tokens) - 1)
            tokens += [bos, *ids[at : at + taken]]
            owner += [number] * (taken + 1)
            at += taken
            if len(tokens) == context:
                end = Cursor(number, at) if at < len(ids) else Cursor(number + 1, 0)
                yield Row(np.array(tokens, np.uint32), np.array(owner, np.uint32), end)
                tokens, owner = [], []
        number += 1
