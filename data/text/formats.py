"""Files of text by their format, read from any position on.

A position is (rows, bytes): rows of the file already read and, where a line is a row, the bytes
that they take, uncompressed. A restart needs nothing else. A .jsonl file goes on with a seek, a
.parquet file at the row group that holds the row, and a .txt file is one document. A compressed
file is read again up to its position.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from decimal import Decimal
from typing import Any, BinaryIO, cast

from residual_saes.data.errors import DocumentError, caused, first_line
from residual_saes.data.text.documents import Column, Content, Document, State

Position = tuple[int, int]  # rows read, bytes read
Read = tuple[
    Content | DocumentError, str, Position
]  # document, its place in messages, what is read

FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")

_BATCH_ROWS = 1024  # decoded at a time: a row group may hold a million
_HEAD_BYTES = 1 << 16  # of a .json file, that tell whether a line is a row
_BLOCK_BYTES = 1 << 20  # decompressed at a time
# A document in a compressed file has at most 64 MiB, and 64 times the file's bytes.
_EXPANDED_BYTES = 1 << 26
_EXPANSION = 64
_INTEGER_DIGITS = 640  # Python reads so many whatever its limit is


def format_of(name: str) -> str | None:
    """Which of `FORMATS` a file of this name has, in letters of either case; None: no text."""
    name = name.lower()
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            inner = format_of(name.removesuffix(compression))
            return None if inner == ".parquet" else inner
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def read_files(
    names: Sequence[str], open_file: Callable[[str], BinaryIO], column: Column, state: State
) -> Iterator[Document]:
    """The documents of several files in order, behind `state` = [file, rows, bytes].

    A file that is damaged gives one `DocumentError` for its rest.

    Args:
        names: each with an ending that `format_of` knows.
        open_file: opens a name for reading; the file is able to seek.

    Raises:
        StoreError: a file cannot be read.
    """
    first, rows, nbytes = state or (0, 0, 0)
    for number, name in enumerate(names[first:], first):
        start = (rows, nbytes) if number == first else (0, 0)
        row = start[0]
        with closing(open_file(name)) as file:
            try:
                for content, where, position in read(file, name, column, start):
                    row = position[0]
                    yield Document(content, [number, *position], where)
            except DocumentError as error:
                yield Document(error, [number + 1, 0, 0], name)
            except (EOFError, zlib.error, OSError) as error:
                # The errors of damaged bytes have no number; those of the system have one.
                if isinstance(error, OSError) and error.errno is not None:
                    got = f"{name} cannot be read: {error.strerror}"
                    raise caused(error, got, "mend the file's rights") from error
                damage = f"{name} is damaged behind row {row}: {first_line(error)}"
                yield Document(DocumentError("damaged", damage), [number + 1, 0, 0], name)


def read(file: BinaryIO, name: str, column: Column, start: Position) -> Iterator[Read]:
    """The documents of a file behind `start`, each with its place and the position behind it.

    Args:
        file: opened for reading, able to seek.
        name: the file's name; its ending tells the format.

    Raises:
        DocumentError: the rest of the file holds no document.
        EOFError, zlib.error, OSError: the bytes are damaged.
    """
    kind = format_of(name)
    data = decompressed(file, name)
    if kind == ".parquet":
        return _parquet(data, name, column, start[0])
    # Bytes of a document: a small compressed file may hold any number of zeros.
    most = -1
    if data is not file:
        most = _EXPANDED_BYTES + _EXPANSION * file.seek(0, io.SEEK_END)
        file.seek(0)
    if kind == ".txt":
        return _whole(data, name, start, most)
    if kind == ".json" and _is_one_value(data):
        return _rows_of_value(data, name, column, start[0], most)
    return _lines(data, name, column, start, most)


def _within(data: bytes, most: int) -> bytes:
    """Raise EOFError, as for damaged bytes, if there are `most`; -1: none are too many."""
    if len(data) == most:
        raise EOFError(f"a document of more than {most:,} bytes in a small compressed file")
    return data


def _whole(file: BinaryIO, name: str, start: Position, most: int) -> Iterator[Read]:
    if start[0] == 0:
        data = _within(file.read(most), most)
        yield _made(_decoded, name, data), name, (1, len(data))


def _lines(file: BinaryIO, name: str, column: Column, start: Position, most: int) -> Iterator[Read]:
    row, byte = start
    file.seek(byte)
    for line in file if most < 0 else iter(lambda: _within(file.readline(most), most), b""):
        row += 1
        byte += len(line)
        if line.removeprefix(codecs.BOM_UTF8).strip():
            where = f"{name} line {row}"
            yield _made(_in_line, line, column, where), where, (row, byte)


def _in_line(line: bytes, column: Column, where: str) -> Content:
    return column.document(_json(where, line), where)


def _made(make: Callable[..., Content], *arguments: Any) -> Content | DocumentError:
    """The document that `make` gives, or why there is none."""
    try:
        return make(*arguments)
    except DocumentError as error:
        return error


def _decoded(where: str, data: bytes) -> str:
    """Bytes as text, without a byte order mark.

    Raises:
        DocumentError: they are not UTF-8.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        kind = "UTF-16" if utf16 else "LATIN1"  # what Windows and old files of the West have
        hint = "begins as UTF-16 does:" if utf16 else "is perhaps Latin-1:"
        raise DocumentError(
            "not UTF-8",
            f"{where} is not UTF-8 text (byte {error.start}; it {hint} "
            f"`iconv -f {kind} -t UTF-8` converts it)",
        ) from error


# -- JSON ------------------------------------------------------------------------------------------


def _json(where: str, data: bytes) -> Any:
    """The JSON value in `data`.

    Raises:
        DocumentError: it is not UTF-8, not JSON, or nested too deep.
    """
    text = _decoded(where, data)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DocumentError("not JSON", f"{where} is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise DocumentError(
            "nested too deep", f"{where} is not JSON that can be read: too deeply nested"
        ) from error


def _integer(digits: str) -> int | Decimal:
    """An integer of any length; Python refuses to read some, for the time that they take."""
    return int(digits) if len(digits) <= _INTEGER_DIGITS else Decimal(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def _is_one_value(file: BinaryIO) -> bool:
    """Whether a .json file is one value over several lines: a list of rows, or a row alone."""
    head = file.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return bool(re.match(rb"\[|\{[ \t\r]*\n", head))


def _rows_of_value(
    file: BinaryIO, name: str, column: Column, start: int, most: int
) -> Iterator[Read]:
    """The documents behind row `start` of a file that is one JSON value."""
    value = _json(name, _within(file.read(most), most))
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows[start:], start + 1):
        where = f"{name} row {number}"
        yield _made(column.document, row, where), where, (number, 0)


# -- Parquet ---------------------------------------------------------------------------------------


def _parquet(file: BinaryIO, name: str, column: Column, start: int) -> Iterator[Read]:
    """The documents behind row `start`; row groups that end before it are not read."""
    import pyarrow as arrow
    from pyarrow import parquet

    row = start  # rows read
    try:
        # Without pre_buffer, this thread reads a group's column in one request when it is needed.
        table = parquet.ParquetFile(file, pre_buffer=False)
        names = table.schema_arrow.names
        if column.name not in names:
            column.document(dict.fromkeys(names), name)  # raises
        wanted = [wanted for wanted in column.read if wanted in names]
        group_start = 0
        for group in range(table.num_row_groups):
            group_rows = table.metadata.row_group(group).num_rows
            if row < group_start + group_rows:
                batch_start = group_start
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted):
                    for cells in _cells(batch.slice(max(0, row - batch_start)), wanted):
                        row += 1
                        where = f"{name} row {row}"
                        yield _made(_in_cells, cells, column, where), where, (row, 0)
                    batch_start += batch.num_rows
            group_start += group_rows
    except arrow.ArrowException as error:
        raise EOFError(f"not a readable Parquet file: {first_line(error)}") from error


def _cells(batch: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a batch; a cell that is not UTF-8 is given as the error."""
    columns: list[list[Any]] = []
    for name in names:
        cells = batch.column(name)
        try:
            columns.append(cells.to_pylist())
        except UnicodeDecodeError:
            columns.append([_cell(cell) for cell in cells])
    for row in zip(*columns, strict=True):
        yield dict(zip(names, row, strict=True))


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error


def _in_cells(cells: dict[str, Any], column: Column, where: str) -> Content:
    """The document in a row of a Parquet file."""
    for cell in cells.values():
        if isinstance(cell, UnicodeDecodeError):
            raise DocumentError("not UTF-8", f"{where} holds text that is not UTF-8")
    if column.chat:
        cells = _without_nulls(cells)
        cells.setdefault(column.name, None)
    return column.document(cells, where)


def _without_nulls(cell: Any) -> Any:
    """A nested cell less its nulls: a column has one type, so each row has every row's fields."""
    if isinstance(cell, dict):
        kept = {name: inner for name, inner in cell.items() if inner is not None}
        return {name: _without_nulls(inner) for name, inner in kept.items()}
    if isinstance(cell, list):
        return [_without_nulls(inner) for inner in cell]
    return cell


# -- compression -----------------------------------------------------------------------------------


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """The file itself, or what it holds where its name ends in one of `COMPRESSIONS`."""
    begin = next((COMPRESSIONS[end] for end in COMPRESSIONS if name.lower().endswith(end)), None)
    if begin is None:
        return file
    return cast(BinaryIO, io.BufferedReader(_Decompressed(file, begin)))


def _gzip(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file)


def _by_arrow(codec: str) -> Callable[[BinaryIO], Any]:
    def begin(file: BinaryIO) -> Any:
        import pyarrow as arrow

        return arrow.CompressedInputStream(arrow.PythonFile(_Borrowed(file), mode="r"), codec)

    return begin


class _Borrowed:
    """A file that Arrow reads from: it closes what it has read from."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read

    def close(self) -> None:
        """Leave the file open."""


COMPRESSIONS = {".gz": _gzip, ".zst": _by_arrow("zstd"), ".bz2": _by_arrow("bz2")}
"""Endings behind those of `FORMATS` (but .parquet, which has its own compression), and how the
reading of such a file begins."""


class _Decompressed(io.RawIOBase):
    """What a compressed file holds. Going back begins anew.

    It is read in blocks at fixed places. So which documents stand before a damage does not depend
    on where a restart goes on.
    """

    def __init__(self, file: BinaryIO, begin: Callable[[BinaryIO], Any]) -> None:
        self._file = file
        self._begin = begin
        self._rewind()

    def _rewind(self) -> None:
        self._file.seek(0)
        self._stream = self._begin(self._file)
        self._block = b""
        self._block_start = 0
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence != io.SEEK_END, "the end is not known before it is read"
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if target < self._block_start:
            self._rewind()
        self._position = target
        return target

    def readinto(self, buffer: Any) -> int:
        while self._position >= self._block_start + len(self._block):
            block = self._stream.read(_BLOCK_BYTES)
            if not block:
                return 0
            self._block_start += len(self._block)
            self._block = block
        start = self._position - self._block_start
        part = self._block[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)
