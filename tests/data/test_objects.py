"""A store in a bucket, on a real S3 server on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.store import bucket as objects
from residual_saes.data.store.bucket import ObjectPlace
from residual_saes.data.store.place import LocalPlace, place_of
from residual_saes.data.store.repair import damage, repair
from residual_saes.data.store.store import Store
from residual_saes.harvest.thinning import thin
from tests.conftest import commit
from tests.conftest import make_store as make_store_of_16
from tests.faults import tree

moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
pytest.importorskip("obstore", reason="obstore is not installed")


def make_store(path: Path | str, bits: NDArray[np.uint16]) -> Store:
    """A store of six units: a request to a server in Python takes 10 ms."""
    return make_store_of_16(path, bits[:384])


class Gate(ThreadingHTTPServer):
    """Passes requests on to S3; cuts puts short when told to."""

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.upstream = upstream
        self.refuse_puts_of = ""  # puts of keys with this in them are cut half-way
        self.cut = 0
        # moto looks and then puts: of 16 creations at once two succeed, 1 time in 100. S3's do not.
        self.one_put = threading.Lock()


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the headers' acknowledgement
    server: Gate

    def _pass(self) -> None:
        body = self._body()
        if (
            self.command == "PUT"
            and self.server.refuse_puts_of
            and self.server.refuse_puts_of in self.path
        ):
            self.server.cut += 1
            self.close_connection = (
                True  # the client sees its connection die with the put half done
            )
            return
        url = f"http://127.0.0.1:{self.server.upstream}{self.path}"
        dropped = ("host", "connection", "transfer-encoding", "content-length")
        kept = {"Content-type": "application/octet-stream"}  # else urllib says it is a form
        kept |= {key: value for key, value in self.headers.items() if key.lower() not in dropped}
        request = Request(
            url, body if self.command in ("PUT", "POST") else None, kept, method=self.command
        )
        with self.server.one_put if self.command == "PUT" else nullcontext():
            try:
                answer = urlopen(request)
            except HTTPError as error:
                answer = error
            data = answer.read()
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            if key.lower() not in (
                "transfer-encoding",
                "connection",
                "content-length",
                "server",
                "date",
            ):
                self.send_header(key, value)
        if self.command == "HEAD":
            self.send_header("Content-Length", answer.headers.get("Content-Length", "0"))
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    passing = Gate(server._server.server_port)
    threading.Thread(target=passing.serve_forever, daemon=True).start()
    yield passing
    passing.shutdown()
    passing.server_close()
    server.stop()


@pytest.fixture
def bucket(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{gate.server_port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        objects, "RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=2)}
    )
    gate.refuse_puts_of = ""
    url = f"http://127.0.0.1:{gate.upstream}"
    urlopen(Request(f"{url}/bucket", method="PUT"))
    return f"s3://bucket/{np.random.default_rng().integers(2**60)}"


def test_a_bucket_holds_the_bytes_of_a_folder(
    tmp_path: Path, bucket: str, random_bits: NDArray[np.uint16]
) -> None:
    local, remote = make_store(tmp_path / "s.zarr", random_bits), make_store(bucket, random_bits)
    ours = {
        file.relative_to(tmp_path / "s.zarr").as_posix(): file
        for file in (tmp_path / "s.zarr").rglob("*")
    }
    files = {key: file for key, file in ours.items() if file.is_file()}
    del files["commits/claims"]  # a folder's locks
    assert len(files) > 50
    for key, file in files.items():
        assert remote.place.read(key) == file.read_bytes(), key
    assert remote.identity == local.identity
    assert not list(damage(remote.place))


def test_zarr_reads_it_through_its_own_object_store(
    bucket: str, random_bits: NDArray[np.uint16]
) -> None:
    import zarr
    from zarr.storage import ObjectStore

    import residual_saes.data.store.zarr_bfloat16  # noqa: F401 (registers the type of the rows)

    store = make_store(bucket, random_bits)
    assert isinstance(store.place, ObjectPlace)
    group = zarr.open_group(ObjectStore(store.place.store, read_only=True), mode="r")
    np.testing.assert_array_equal(group["layer_3"][:], random_bits[:384][group["token_index"][:]])


def test_batches_from_a_bucket_are_those_from_a_folder(
    tmp_path: Path, bucket: str, random_bits: NDArray[np.uint16]
) -> None:
    stores = make_store(tmp_path / "s.zarr", random_bits), make_store(bucket, random_bits)
    one, other = (
        Reader([Source.of(store, 3)], batch=64, seed=1, policy=Policy(), window=8)
        for store in stores
    )
    for a, b in zip(islice(one.batches(0), 8), islice(other.batches(0), 8), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("key", ["layer_3/c.2.0", "norm_3/c.2", "commits/residuals/00000002"])
def test_a_put_that_fails_half_way_commits_nothing_and_the_next_try_does(
    gate: Gate, bucket: str, random_bits: NDArray[np.uint16], key: str
) -> None:
    store = make_store(bucket, random_bits)
    place = store.place
    for name in ("layer_3/c.2.0", "norm_3/c.2", "commits/residuals/00000002.3.json"):
        place.delete(name)
    store = Store.open(bucket)
    before, gate.refuse_puts_of = gate.cut, key
    with pytest.raises(StoreError, match="s3://bucket/"):
        commit(store, 2, {3: random_bits[128:192]})
    assert gate.cut > before
    assert list(Store.open(bucket).missing([3])) == [2]
    gate.refuse_puts_of = ""
    commit(Store.open(bucket), 2, {3: random_bits[128:192]})
    again = Store.open(bucket)
    assert again.complete(3) and not list(damage(again.place))


def test_exactly_one_of_many_writers_creates_a_record(bucket: str) -> None:
    place = place_of(bucket)
    won: list[int] = []

    def write(number: int) -> None:
        if place.create("commits/spine/00000000.json", b"%d" % number):
            won.append(number)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 1
    assert place.read("commits/spine/00000000.json") == b"%d" % won[0]


def test_a_thin_store_goes_into_a_bucket_and_comes_back(
    tmp_path: Path, bucket: str, random_bits: NDArray[np.uint16]
) -> None:
    store = make_store(tmp_path / "s.zarr", random_bits)
    thin(store.place, None)
    thin(store.place, bucket)
    thin(place_of(bucket), str(tmp_path / "back.zarr"))
    files = tree.read(tmp_path / "back.zarr")
    assert files == tree.read(tmp_path / "s_thin.zarr")


def test_a_missing_and_a_damaged_object_are_found_and_repaired(
    bucket: str, random_bits: NDArray[np.uint16]
) -> None:
    store = make_store(bucket, random_bits)
    store.place.delete("norm_3/c.1")
    with pytest.raises(StoreError, match=r"norm_3/c\.1.*action=repair"):
        Store.open(bucket)
    data = bytearray(store.place.read("layer_3/c.4.0"))
    data[10] ^= 1
    store.place.write("layer_3/c.4.0", [bytes(data)])
    assert repair(store.place) == [
        "commits/residuals/00000001.3.json",
        "commits/residuals/00000004.3.json",
    ]
    assert list(Store.open(bucket).missing([3])) == [1, 4]


def test_urls_of_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"store=ftp://x.*s3://"):
        place_of("ftp://x")
    assert isinstance(place_of(str(tmp_path)), LocalPlace)
