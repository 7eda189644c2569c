"""What libraries raise on foreign bytes is one line; what is no fault of the bytes passes."""

from __future__ import annotations

import errno
import io
import json
import pickle
import struct
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load
from tokenizers import Tokenizer

from residual_saes.data.errors import (
    Interrupted,
    MismatchError,
    PipelineError,
    SettingError,
    StoreError,
    TemporaryError,
)
from residual_saes.data.foreign import reading
from residual_saes.data.neutral import neutral

PANIC = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


def fail(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


HOSTILE: dict[str, Callable[[], object]] = {
    "deep JSON": lambda: json.loads("[" * 100_000),
    "long number": lambda: json.loads("9" * 5_000),
    "bytes": lambda: b"\xff\xfe".decode(),
    "pickle": lambda: pickle.loads(b"\x80\x04."),
    "struct": lambda: struct.unpack("<q", b"1"),
    "YAML": lambda: yaml.safe_load("a: [\x00"),
    "key": lambda: dict[str, int]()["\x1b[31m"],
    "safetensors": lambda: load(b"\xff" * 20),
    "torch": lambda: torch.load(io.BytesIO(b"no zip"), weights_only=True),
    "memory of torch": lambda: torch.empty(2**48),
    "memory": fail(MemoryError()),
    "parquet": lambda: pyarrow.parquet.read_table(pa.BufferReader(b"PAR1PAR1")),
    "Rust": lambda: Tokenizer.from_str("{}"),
    "panic": fail(PANIC("called `Option::unwrap()` on a `None` value")),
    "many lines": fail(ValueError("first\n" + "x\n" * 1000)),
    "long line": fail(ValueError("x" * 10**6)),
    "no text": fail(SafetensorError()),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", [StoreError, SettingError])
def test_what_a_library_raises_is_one_short_line(name: str, kind: type[PipelineError]) -> None:
    with pytest.raises(kind) as caught, reading("a\nb.pt", "train it again", kind):
        HOSTILE[name]()
    line = str(caught.value)
    assert line.startswith("a\\nb.pt: ")
    assert line.endswith("; train it again")
    assert len(line) < 300
    assert line == neutral(line)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("name", "word"), [("deep JSON", "nested"), ("memory", "memory"), ("memory of torch", "memory")]
)
def test_the_line_says_what_was_wrong(name: str, word: str) -> None:
    with pytest.raises(StoreError, match=word), reading("a.pt", "train it again"):
        HOSTILE[name]()


def test_a_disk_that_failed_is_no_fault_of_the_bytes() -> None:
    with pytest.raises(TemporaryError), reading("a.pt", "train it again", SettingError):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        Interrupted(15),
        SystemExit(3),
        MismatchError("a", {"b": (1, 2)}, "c"),
        SettingError("one"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_stops_and_our_own_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("a.pt", "train it again"):
        raise error
    assert caught.value is error


OBEYED = "\n\r\x00\x1b\x7f\x9b\u061c\u200f\u2028\u202e\u2066\ud800"
HIDDEN = "\xad\u200b\u2060\u3164\ufeff\U000e0041"


@pytest.mark.parametrize("character", OBEYED + HIDDEN)
def test_what_a_terminal_obeys_becomes_an_escape(character: str) -> None:
    shown = neutral(f"a{character}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.encode().decode("unicode_escape").encode("utf-8", "surrogatepass") == (
        f"a{character}b".encode("utf-8", "surrogatepass")
    )


def test_other_writing_stays() -> None:
    text = "Zwölf 数 ٣ क्\u200dष 👩\u200d👩\u200d👧 \u0646\u200c\u062e ב 🏴\U000e0067\U000e007f a b"
    assert neutral(text) == text
