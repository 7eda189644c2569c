"""Exit codes: 2 for what was given, 75 where the same command goes on later, 1 for our defects."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from residual_saes.conf.command import run_command
from residual_saes.data import durable, locks, stopping
from residual_saes.data.errors import (
    DocumentError,
    Interrupted,
    MismatchError,
    NonFiniteError,
    PipelineError,
    SettingError,
    StoreError,
    TemporaryError,
)
from residual_saes.data.journal import read_metrics
from residual_saes.data.store import bucket
from residual_saes.data.store.claims import NoLocksError
from residual_saes.data.store.place import LocalPlace, place_of
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.store import Store
from residual_saes.data.text import retry
from residual_saes.data.text.sources import FileText
from residual_saes.harvest.hub_model import asked_of_hub
from residual_saes.harvest.loop import OutOfMemory
from residual_saes.train.arm import is_done
from residual_saes.train.sae_file import load
from tests.conftest import Call, make_store
from tests.forked import run_forked, start_forked
from tests.train.test_command import SMALL
from tests.train.test_command import make_store as make_small_store

PASSING = ["ENOSPC", "EIO", "EDQUOT", "ESTALE", "ETIMEDOUT", "ECONNRESET", "EHOSTUNREACH"]
OF_THE_PATH = ["EACCES", "ENAMETOOLONG", "ENOTDIR", "EROFS", "ELOOP"]
OTHERS = ["EBADF", "EINVAL", "ENOENT", "ENOTEMPTY", "EISDIR", "EPERM", "EFBIG", "EOVERFLOW"]


def os_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), "/some/file")


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def call(*_: object, **__: object) -> NoReturn:
        raise error

    return call


def code_of(work: Callable[[], object]) -> int:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: (work(), None)[1])
    assert isinstance(ended.value.code, int)
    return ended.value.code


ERRORS = {
    2: [
        PipelineError("x"),
        SettingError("x"),
        StoreError("x"),
        DocumentError("empty", "x"),
        MismatchError("there", {"seed": (0, 1)}, "Go on."),
        NonFiniteError("x"),
        NoLocksError("x"),
        OutOfMemory(3, 16, 1024),
        MemoryError("x"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"),
        *map(os_error, [*OF_THE_PATH, *OTHERS]),
        OSError("neither errno nor file"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        SafetensorError("I/O error: Permission denied (os error 13)"),
    ],
    75: [
        TemporaryError("x"),
        *map(os_error, PASSING),
        ConnectionResetError("x"),
        TimeoutError("x"),
        SafetensorError("I/O error: Input/output error (os error 5)"),
        RuntimeError("unable to mmap 8 bytes from file </x>: Too many open files (24)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        OSError("6400 requested and 4080 written"),
        Interrupted(signal.SIGUSR1),
        Interrupted(signal.SIGUSR2),
    ],
    130: [Interrupted(signal.SIGINT), KeyboardInterrupt()],
    143: [Interrupted(signal.SIGTERM)],
}


@pytest.mark.parametrize("code", ERRORS)
def test_exceptions(
    code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "left", stopping.Left())  # a command may have run before
    for error in ERRORS[code]:
        assert code_of(raising(error)) == code, repr(error)
        assert capsys.readouterr().err.count("\n") == 1


def test_defects_keep_their_traceback() -> None:
    during = ZeroDivisionError()
    during.__context__ = os_error("EIO")  # a defect in what handles an error is one all the same
    for error in (ZeroDivisionError(), RuntimeError("x"), KeyError("EIO"), during):
        with pytest.raises(type(error)):
            run_command(raising(error))


def test_a_failed_call_names_file_reason_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(lambda: durable.digest_file(tmp_path)) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}: Is a directory (at data/durable.py:" in err and ", digest_file)" in err
    reason = "I/O error: Input/output error (os error 5)"
    assert code_of(raising(SafetensorError(reason))) == 75
    assert reason in capsys.readouterr().err


def test_errors_come_back_from_jobs_as_they_are() -> None:
    for code in (2, 75):
        for error in ERRORS[code]:
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), str(again)) == (type(error), str(error))


# -- the disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PASSING, "ENOENT"])
def test_a_disk_that_refuses_to_write(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(os_error(name)))
    for write in (
        lambda: durable.write(tmp_path / "a", [b"x"]),
        lambda: durable.create(tmp_path / "a", b"x"),
    ):
        assert code_of(write) == 75
    if name != "ENOENT":
        assert code_of(lambda: durable.make_directory(tmp_path / "new")) == 75


@pytest.mark.parametrize("name", OF_THE_PATH)
def test_a_path_that_cannot_be_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(os_error(name)))
    assert code_of(lambda: durable.write(tmp_path / "a", [b"x"])) == 2
    assert code_of(lambda: durable.make_directory(tmp_path / "new")) == 2


def test_a_disk_that_refuses_to_read(
    tmp_path: Path, random_bits: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged object is 2, since `action=repair` comes first; a failing disk is 75."""
    store = make_store(tmp_path / "s.zarr", random_bits)
    monkeypatch.setattr(LocalPlace, "open", raising(os_error("EIO")))
    assert code_of(lambda: store.tokens(1)) == 75
    monkeypatch.undo()
    part = tmp_path / "s.zarr" / "tokens" / "c.1.0"
    part.write_bytes(part.read_bytes()[:-9])
    assert code_of(lambda: store.tokens(1)) == 2
    assert code_of(lambda: Store.open(tmp_path / "s.zarr")) == 2


def test_only_damage_is_repaired(
    tmp_path: Path, random_bits: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that cannot be reached says nothing of its objects; a disk's error is of one."""
    place = make_store(tmp_path / "s.zarr", random_bits).place
    for error, code in ((ConnectionAbortedError(errno.ECONNABORTED, "x"), 75), (None, 0)):
        monkeypatch.setattr(LocalPlace, "digest", raising(error or os_error("EIO")))
        if code:
            assert code_of(lambda: repair(place)) == code
            assert code_of(lambda: list(damage(place))) == code
        else:
            assert len(repair(place)) > 10
        monkeypatch.undo()


def test_text_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("words")
    source = FileText(str(tmp_path / "a.txt"))
    for code, names in ((75, PASSING), (2, OF_THE_PATH)):
        for name in names:
            monkeypatch.setattr(Path, "open", raising(os_error(name)))
            assert code_of(lambda: list(source.documents(None))) == code
            assert code_of(source.identity) == code
            assert code_of(lambda: read_metrics(tmp_path / "metrics.jsonl")) == code


def test_a_final_file_that_cannot_be_read_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sae_final.pt"
    path.write_bytes(b"PK\x03\x04 and rubbish")
    assert not is_done(tmp_path, False)
    assert code_of(lambda: load(path)) == 2
    monkeypatch.setattr("zipfile.ZipFile", raising(os_error("EIO")))
    assert code_of(lambda: is_done(tmp_path, False)) == 75


# -- other processes -------------------------------------------------------------------------------


def test_a_store_that_is_written_is_repaired_later(
    tmp_path: Path, random_bits: NDArray[Any]
) -> None:
    place = make_store(tmp_path / "s.zarr", random_bits).place
    joined, leave = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        _claims = place.claims()
        os.write(joined[1], b"x")
        os.close(leave[1])
        os.read(leave[0], 1)
        os._exit(0)
    os.read(joined[0], 1)
    assert code_of(lambda: repair(place)) == 75
    os.close(leave[1])
    os.waitpid(child, 0)
    assert repair(place) == []


def test_a_run_that_is_trained_by_another_process(tmp_path: Path, call: Call) -> None:
    make_small_store(tmp_path / "s.zarr", units=2, layers=(3,))
    settings = ("store=s.zarr", *SMALL, "tokens=64")
    line = ("train", "residual_saes.train.command", "-m", *settings)
    with locks.locked(tmp_path / "a", "held"):
        assert call("train", "residual_saes.train.command", *settings, "run=a")[0] == 75
        # Of several jobs: 75 if that is all that is wrong, with a line for each.
        with locks.locked(tmp_path / "b", "held"):
            code, err = call(*line, "run=a,b")
            assert code == 75, err
            assert "another process is training in a;" in err
            assert "another process is training in b;" in err
        for launcher in ("one_pass", "basic"):
            code, err = call(*line, f"hydra/launcher={launcher}", "run=a", "sae.k=2,65")
            assert (code, err.count("error:")) == (2, 1)
    assert call(*line, "run=a,b")[0] == 0


# -- the hub ---------------------------------------------------------------------------------------


class RequestException(Exception):
    """As the hub's HTTP libraries name what goes wrong on the way."""


def answer(status: int) -> Exception:
    error = RequestException(f"HTTP {status}")
    error.response = SimpleNamespace(status_code=status, headers={})  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((answer(status), 2) for status in (400, 401, 403, 404, 410)),
        *((answer(status), 75) for status in (408, 429, 500, 502, 503, 504)),
        (RequestException("x"), 75),
        (os_error("ENOSPC"), 75),  # the cache's disk
        (ValueError("x"), 2),
    ],
    ids=repr,
)
def test_the_hub(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "sleep", lambda _: None)
    assert code_of(lambda: asked_of_hub("me/model", raising(error))) == code
    if not isinstance(error, OSError) or error.errno is None:
        assert code_of(lambda: retry.persistent("me/data", raising(error))) == code


# -- a bucket --------------------------------------------------------------------------------------


class Refusing(BaseHTTPRequestHandler):
    """Answers one status to everything."""

    protocol_version = "HTTP/1.1"
    status = 503

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Refusing]]:
    pytest.importorskip("obstore", reason="obstore is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    tries = {"max_retries": 1, "retry_timeout": timedelta(seconds=2)}
    monkeypatch.setattr(bucket, "RETRIES", tries)
    yield Refusing
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code"), [(400, 2), (401, 2), (403, 2), (301, 2), (429, 75), (500, 75), (503, 75)]
)
def test_a_bucket_that_refuses(
    status: int, code: int, refusing: type[Refusing], capsys: pytest.CaptureFixture[str]
) -> None:
    """No verdict of damage may come of it, or `repair` would drop what is whole."""
    refusing.status = status
    place = place_of("s3://bucket/store")
    for work in (
        lambda: Store.open(place),
        lambda: place.names("commits"),
        lambda: place.write("a", [b"x"]),
        lambda: place.create("a", b"x"),
        lambda: list(damage(place)),
        lambda: repair(place),
    ):
        assert code_of(work) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "bucket" in err


def test_a_bucket_that_is_not_there(refusing: type[Refusing]) -> None:
    refusing.status = 404
    place = place_of("s3://bucket/store")
    for work in (lambda: Store.open(place), lambda: place.write("a", [b"x"])):
        assert code_of(work) == 2


def test_a_bucket_that_cannot_be_reached(
    refusing: type[Refusing], monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    settings = ["model=tiny", "text=tiny", "layer=5", "tokens=3000", "context=64"]
    code, err = call(
        "harvest", "residual_saes.harvest.command", *settings, "store=s3://bucket/store"
    )
    assert code == 75 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    code, err = call("train", "residual_saes.train.command", "store=s3://bucket/store", *SMALL)
    assert code == 75 and err.count("\n") == 1


# -- standard streams ------------------------------------------------------------------------------

CLOSED = """
import os, sys
from residual_saes.conf.command import start
os.close({number}), setattr(sys, "{name}", None)
sys.argv = ["train", "lyer=1"]
try:
    start("train", "residual_saes.train.command")
finally:
    print(os.open(os.devnull, os.O_RDONLY) > 2, file=sys.__stdout__, flush=True)
"""


def test_a_full_disk_under_the_output_is_one_line(tmp_path: Path) -> None:
    make_small_store(tmp_path / "s.zarr", units=2, layers=(3,))
    command = ("-m", "harvest", "action=status", "store=s.zarr")
    for number, code in ((1, 75), (2, 0)):  # a result is lost, or a line about the work
        files = [tmp_path / "stdout", tmp_path / "stderr"]
        files[number - 1] = Path("/dev/full")
        child = start_forked(*command, files=files, cwd=tmp_path)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert (tmp_path / "stderr").read_text().count("error:") == 1
    assert "Exception ignored" not in (tmp_path / "stderr").read_text()


def test_a_closed_output_is_no_ones_file() -> None:
    for number, name in ((0, "stdin"), (2, "stderr")):
        done = run_forked("-c", CLOSED.format(number=number, name=name))
        assert (done.returncode, done.stdout) == (2, "True\n")
