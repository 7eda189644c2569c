"""Data sets of the Hugging Face hub, read in their own order, by byte ranges.

`datasets` finds a data set's files. They are read here, because its streams reread a file from byte
0 when they resume inside it (2 GB in FineWeb-Edu), and wait for a busy hub without a message.
States are (file, rows, bytes), as those of local files.

The client's own file object (`HfFileSystem`) was looked at and not taken: version 2.4 retries up to
five times without a message and then gives up after half a minute; takes an answer of status 200,
the whole file, for the range that it asked for; and asks the API once more per file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.text import retry
from residual_saes.data.text.documents import Column, Document, State
from residual_saes.data.text.formats import format_of, read_files
from residual_saes.data.text.retry import persistent

TIMEOUT_S = 60.0  # of connecting, and of each silence while bytes arrive
BLOCK_BYTES = 8 << 20  # least size of a request


@dataclass(frozen=True)
class HubText:
    """A data set of the Hugging Face hub, or a local folder in its form."""

    kind: ClassVar[str] = "hub"
    dataset: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    messages: str | None = None  # column that holds a chat, in the place of `field`
    revision: str = "main"

    @property
    def chats(self) -> bool:
        return self.messages is not None

    @property
    def _column(self) -> Column:
        return Column.chosen(self.field, self.messages)

    @property
    def _local(self) -> bool:
        return Path(self.dataset).exists()

    def identity(self) -> dict[str, Any]:
        settings = {
            "kind": self.kind,
            "dataset": self.dataset,
            "config": self.config,
            "split": self.split,
            **self._column.identity(),
        }
        if not self._local:
            return {**settings, "revision": self._commit}
        digests: dict[str, str] = {}
        for file in map(Path, self._files):
            digests[file.name] = durable.digest_file(file).xxh3_128
        return {**settings, "files": digests}

    @cached_property
    def _commit(self) -> str:
        """The commit that `revision` names now: a branch moves on to other text."""
        from huggingface_hub import HfApi

        def ask() -> str | None:
            return HfApi().dataset_info(self.dataset, revision=self.revision).sha

        return str(persistent(self.dataset, ask))

    @cached_property
    def _files(self) -> list[str]:
        """The split's files in order: local paths, or hf:// addresses that hold the commit."""
        import datasets

        commit = None if self._local else self._commit
        builder = persistent(
            self.dataset,
            lambda: datasets.load_dataset_builder(self.dataset, self.config, revision=commit),
        )
        splits: dict[str, list[str]] = {}
        for name, found in (builder.config.data_files or {}).items():
            splits[str(name)] = list(map(str, found))
        if self.split not in splits:
            raise SettingError(
                f"{self.dataset} has no split={self.split}; it has {', '.join(splits) or 'none'}"
            )
        files = splits[self.split]
        for file in files:
            # `datasets` takes a line of a .txt file for a row.
            if format_of(file) in (None, ".txt"):
                raise SettingError(
                    f"{file} is neither .parquet nor .jsonl; the hub's own copy in Parquet is "
                    "often revision=refs/convert/parquet"
                )
        return files

    def documents(self, state: State) -> Iterator[Document]:
        return read_files(self._files, _open, self._column, state)


def _open(name: str) -> BinaryIO:
    """A local path, or hf://datasets/OWNER/NAME@COMMIT/PATH, opened for reading."""
    if not name.startswith("hf://datasets/"):
        return Path(name).open("rb")
    from huggingface_hub import hf_hub_url

    repository, _, rest = name.removeprefix("hf://datasets/").partition("@")
    commit, _, path = rest.partition("/")
    url = hf_hub_url(repository, path, repo_type="dataset", revision=commit)
    return cast(BinaryIO, io.BufferedReader(RemoteFile(url), BLOCK_BYTES))


class RemoteFile(io.RawIOBase):
    """A file behind a URL; each read is one request for a byte range.

    Raises:
        StoreError: the server refuses, does not serve ranges, or failed for all tries.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        _, self._size = persistent(url, lambda: self._request(0, 1))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position
        stop = min(start + len(buffer), self._size)
        if stop <= start:
            return 0
        data, _ = persistent(self._url, lambda: self._request(start, stop))
        buffer[: len(data)] = data
        self._position = stop
        return len(data)

    def _request(self, start: int, stop: int) -> tuple[bytes, int]:
        """The bytes from `start` up to `stop`, and the size of the whole file."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",  # ranges count bytes of the file, not of a coding of it
        }
        response = get_session().get(self._url, headers=headers, timeout=TIMEOUT_S)
        content_range = response.headers.get("Content-Range", "")
        described = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", content_range)
        size = int(described[1]) if described else 0
        if response.status_code == 416 and described and size <= start:
            return b"", size  # an empty file has no first byte
        hf_raise_for_status(response)
        if response.status_code != 206 or not described:
            raise StoreError(
                f"{self._url} is not served in parts; download it and use text.path=FILE"
            )
        retry.text_came.set()
        data = bytes(response.content)
        expected = min(stop, size) - start
        if len(data) != expected:
            raise retry.ShortBody(f"{len(data)} of {expected} bytes")
        return data, size
