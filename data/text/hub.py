"""Data sets of the Hugging Face hub, read in their own order, by ranges of bytes.

`datasets` finds a data set's files; they are read here, because its streams read a file again from
its first byte when they go on inside it (2 GB in FineWeb-Edu), and wait out a busy hub without a
word. A request that fails for now is made again; whoever reads the file does not notice. States are
(file, row, byte), as those of local files.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from data import durable
from data.errors import PipelineError, SettingError, StoreError, first_line
from data.journal import tell
from data.text.documents import LINES, Column, Document, State, read_files

T = TypeVar("T")

TRIES = 8  # after the first: with the waits below, six minutes and six seconds
# after the first, while nothing answers and no text ever came: six seconds tell a machine is
# offline
FIRST_TRIES = 2
LONGEST_S = 120.0  # cap of our own waits, which double from 2 s
LONGEST_ASKED_S = 600.0  # cap of the waits that a server asks for
TIMEOUT_S = 60.0  # of connecting, and of each silence while bytes arrive
BLOCK_BYTES = 8 << 20  # least size of a request
sleep: Callable[[float], None] = time.sleep  # replaced where waiting has to end early

_text_came = threading.Event()  # whether this process has had bytes of any file from the hub

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that later requests may not meet


class _Cut(ConnectionError):
    """A body shorter than was asked for."""


@dataclass(frozen=True)
class HubText:
    """A data set of the Hugging Face hub, or a local folder in its form."""

    dataset: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    messages: str | None = None  # column that holds a chat, in the place of `field`
    revision: str = "main"

    def identity(self) -> dict[str, Any]:
        column = {"field": self.field} if self.messages is None else {"messages": self.messages}
        found = {
            "kind": "hub",
            "dataset": self.dataset,
            "config": self.config,
            "split": self.split,
            **column,
        }
        if Path(self.dataset).exists():
            return {
                **found,
                "files": {Path(f).name: durable.digest_file(Path(f)).xxh3_128 for f in self._files},
            }
        return {**found, "revision": self._commit}

    @cached_property
    def _commit(self) -> str:
        """The commit that `revision` names now: a branch's name would go on to mean other text."""
        from huggingface_hub import HfApi

        find = persistent(
            self.dataset, lambda: HfApi().dataset_info(self.dataset, revision=self.revision).sha
        )
        return str(find)

    @cached_property
    def _files(self) -> list[str]:
        """The split's files in order: local paths, or hf:// addresses that hold the commit."""
        import datasets

        local = Path(self.dataset).exists()
        revision = None if local else self._commit
        build = persistent(
            self.dataset,
            lambda: datasets.load_dataset_builder(self.dataset, self.config, revision=revision),
        )
        splits = {
            str(name): list(map(str, files))
            for name, files in (build.config.data_files or {}).items()
        }
        if self.split not in splits:
            raise SettingError(
                f"{self.dataset} has no split={self.split}; it has {', '.join(splits) or 'none'}"
            )
        other = [file for file in splits[self.split] if not file.endswith((".parquet", *LINES))]
        if other:
            raise SettingError(
                f"{other[0]} is neither .parquet nor .jsonl; the hub's own copy in Parquet is often "
                "revision=refs/convert/parquet"
            )
        return splits[self.split]

    def documents(self, state: State) -> Iterator[Document]:
        column = (
            Column(self.field) if self.messages is None else Column(self.messages, True, "messages")
        )
        return read_files(self._files, _opened, column, state)


def _opened(name: str) -> BinaryIO:
    if not name.startswith("hf://datasets/"):
        return Path(name).open("rb")
    from huggingface_hub import hf_hub_url

    repository, _, rest = name.removeprefix("hf://datasets/").partition("@")
    commit, _, path = rest.partition("/")
    return remote(hf_hub_url(repository, path, repo_type="dataset", revision=commit))


def remote(url: str) -> BinaryIO:
    """A file behind a URL, opened for reading anywhere in it.

    Raises:
        StoreError: the server refuses, does not serve ranges, or stayed away for all tries.
    """
    return cast(BinaryIO, io.BufferedReader(_Ranges(url), BLOCK_BYTES))


class _Ranges(io.RawIOBase):
    """A remote file, a request for each read."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        self._size = persistent(url, lambda: self._request(0, 1)[1])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = persistent(self._url, lambda: self._request(self._at, stop)[0])
        buffer[: len(data)] = data
        self._at = stop
        return len(data)

    def _request(self, start: int, stop: int) -> tuple[bytes, int]:
        """The bytes from `start` up to `stop`, and the size of the whole file."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        # A range counts bytes of the file, so that no coding of it may stand between.
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        response = get_session().get(self._url, headers=headers, timeout=TIMEOUT_S)
        described = re.fullmatch(
            r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", "")
        )
        if response.status_code == 416 and described and int(described[1]) <= start:
            return b"", int(described[1])
        hf_raise_for_status(response)
        if response.status_code != 206 or described is None:
            raise StoreError(
                f"{self._url} is not served in parts; download it and use text.path=FILE"
            )
        _text_came.set()
        size, data = int(described[1]), bytes(response.content)
        if len(data) != min(stop, size) - start:
            raise _Cut(f"{len(data)} of {min(stop, size) - start} bytes")
        return data, size


def persistent(what: str, request: Callable[[], T]) -> T:
    """What `request` returns; it is made again, later and later, while its errors are such as pass.

    Raises:
        StoreError: it was refused for good, or `TRIES` tries more did not help; `FIRST_TRIES` where
            nothing answers and no text has come before.
    """
    answered = False
    for number in range(1, TRIES + 2):
        try:
            return request()
        except PipelineError:
            raise
        except (
            Exception
        ) as error:  # the hub's client raises its own, its HTTP library's and fsspec's kinds
            trouble = _passing(error)
            if trouble is None:
                raise StoreError(_refusal(what, error)) from error
            reason, asked, an_answer = trouble
            answered = answered or an_answer
            tries = TRIES if answered or _text_came.is_set() else FIRST_TRIES
            if number > tries:
                raise StoreError(
                    f"{what} cannot be reached ({reason}, {number} times); {_way_out()}"
                ) from error
            wait = max(min(2.0**number, LONGEST_S), min(asked, LONGEST_ASKED_S))
            tell(f"text: {reason} from {what}, trying again in {wait:.0f} s ({number} of {tries})")
            sleep(wait)
    raise AssertionError("the last try returns or raises")


def _way_out() -> str:
    if _text_came.is_set():
        return "everything committed stays: the same command again goes on from there"
    return "check the network; or give text.path=FILES, or text=tiny, which needs no network"


def _passing(error: BaseException) -> tuple[str, float, bool] | None:
    """What passes by itself, the seconds that the server asks to wait, and whether it was a server
    that answered.

    None for an error that stays.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return None
        response = getattr(cause, "response", None)
        if response is not None:
            passes = response.status_code in _PASSING
            return (
                (f"HTTP {response.status_code}", _asked_s(response.headers), True)
                if passes
                else None
            )
        # By name: the hub's client has changed its HTTP library twice, and kept the name of its
        # base.
        network = any(
            kind.__name__ in ("RequestError", "RequestException") for kind in type(cause).__mro__
        )
        if network or isinstance(cause, ConnectionError | TimeoutError):
            return type(cause).__name__.lstrip("_"), 0.0, False
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it, the first of them first: wrappers hide an answer's
    status.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    yield from reversed(chain)


def _asked_s(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait: Retry-After, or the t of the hub's RateLimit; 0 where
    there is none.
    """
    if re.fullmatch(r"\d+(\.\d+)?", after := headers.get("Retry-After", "").strip()):
        return float(after)
    window = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(window[1]) if window else 0.0


def _refusal(what: str, error: Exception) -> str:
    answers = (getattr(cause, "response", None) for cause in _causes(error))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status in (401, 403):
        return f"{what} is not open to you (HTTP {status}): check its name, or accept its terms and set HF_TOKEN"
    reason = f"HTTP {status}" if status else type(error).__name__
    return (
        f"{what} cannot be opened ({reason}: {first_line(error)[:200]}); check the name and the network, use "
        "text.path=FILE, or text=tiny, which needs no network"
    )
