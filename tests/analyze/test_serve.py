"""The server of pages: raw requests, from those who ask oddly, slowly or in another's name."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from residual_saes.analyze.pages.browser import serve
from residual_saes.data import digests, stopping
from residual_saes.data.errors import StoreError

SECRET = b"CANARY"
OUTSIDE = [
    *("/../secret.txt", "/..%2fsecret.txt", "/%2e%2e/secret.txt", "/%252e%252e/secret.txt"),
    *("/data/../../secret.txt", "/data/..%2f..%2fsecret.txt", "/....//secret.txt"),
    *("{parent}/secret.txt", "/{parent}/secret.txt", "//{parent}/secret.txt"),
    *("/%2f{parent}/secret.txt", "/link.txt", "/linked/secret.txt", "/data/linked.txt"),
    *("/..\\secret.txt", "/%5c..%5csecret.txt", "/index.html/../../secret.txt", "/./index.html"),
    *("/%00", "/index.html%00", "/\0", "/index.html/", "/data//meta.js", "/data", "/data/"),
    *("/pipe", "/unnamed.txt", "/%c0%ae%c0%ae/secret.txt"),
    *("http://evil.example/index.html", "evil.example:443", "*", "/" + "a" * 5000, "/%ff%fe"),
]  # fmt: skip

Ask = Callable[..., bytes]


@pytest.fixture(params=["sealed", "of an earlier version"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of pages, reached by a link, with much in it and beside it that is not of them."""
    pages = tmp_path / "there" / "pages"
    (pages / "data").mkdir(parents=True)
    (pages / "index.html").write_text("<title>page</title>")
    (pages / "data" / "meta.js").write_text("loaded()")
    for path in (tmp_path / "secret.txt", tmp_path / "there" / "secret.txt"):
        path.write_bytes(SECRET)
    (pages / "link.txt").symlink_to(tmp_path / "secret.txt")
    (pages / "data" / "linked.txt").symlink_to("../../secret.txt")
    (pages / "linked").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(pages / "pipe")
    if request.param == "sealed":
        (pages / "unnamed.txt").write_bytes(SECRET)
        digests.write(pages, ["index.html", "data/meta.js"])
    (tmp_path / "way").symlink_to(pages, target_is_directory=True)
    return tmp_path / "way"


@pytest.fixture
def ask(folder: Path) -> Iterator[Ask]:
    """Send bytes to a server of the folder, and read what comes."""
    with serve.server(folder, 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        port = running.server_port

        def asked(request: str | bytes, *, open_only: bool = False) -> bytes | socket.socket:
            connection = socket.create_connection(("127.0.0.1", port), 5)
            text = request if isinstance(request, bytes) else request.encode("latin-1")
            connection.sendall(text.replace(b"PORT", b"%d" % port))
            return connection if open_only else everything(connection)

        yield asked  # type: ignore[misc]
        running.shutdown()
        thread.join()


def everything(connection: socket.socket) -> bytes:
    answer = b""
    with connection, suppress(ConnectionError):
        while block := connection.recv(65536):
            answer += block
    return answer


def get(path: str, host: str = "127.0.0.1:PORT", method: str = "GET", version: str = "1.1") -> str:
    return f"{method} {path} HTTP/{version}\r\nHost: {host}\r\n\r\n"


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def test_its_own_files_and_no_others(ask: Ask, folder: Path) -> None:
    for path in ("/", "/index.html", "/index.html?x=../y", "/%69ndex.html"):
        answer = ask(get(path))
        assert status(answer) == 200 and answer.endswith(b"<title>page</title>")
    head = ask(get("/data/meta.js", method="HEAD"))
    assert status(head) == 200 and head.endswith(b"\r\n\r\n") and b"\nContent-Length: 8\r" in head
    for path in OUTSIDE:
        if path == "/unnamed.txt" and not (folder / "unnamed.txt").exists():
            continue
        answer = ask(get(path.replace("{parent}", str(folder.parent.resolve()))))
        assert status(answer) in (400, 404), path
        assert SECRET not in answer
    assert b"residual-saes\r" in head and b"Python" not in head


def test_names_of_this_machine_alone(ask: Ask) -> None:
    """A page of another name that leads to 127.0.0.1 is DNS rebinding."""
    for host in ("127.0.0.1:PORT", "localhost:PORT", "LocalHost", "localhost:80"):
        assert status(ask(get("/", host))) == 200
    foreign = ["evil.example", "evil.example:PORT", "localhost.evil.example", "127.0.0.1.evil:PORT"]
    foreign += ["", "127.0.0.1@evil", "[::1]:PORT", "0.0.0.0:PORT", "127.0.0.1:PORT, evil"]
    for host in foreign:
        answer = ask(get("/", host))
        assert status(answer) == 421 and b"<title>page" not in answer, host
    assert status(ask("GET / HTTP/1.1\r\n\r\n")) == 421
    twice = "GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    assert status(ask(twice)) == 421
    assert status(ask("GET / HTTP/1.0\r\n\r\n")) == 200


def test_no_other_page_may_embed_or_load_it(ask: Ask) -> None:
    for answer in (ask(get("/data/meta.js")), ask(get("/none")), ask(get("/", "evil.example"))):
        head = answer.partition(b"\r\n\r\n")[0]
        for line in (
            b"Cross-Origin-Resource-Policy: same-origin",
            b"X-Frame-Options: DENY",
            b"X-Content-Type-Options: nosniff",
            b"frame-ancestors 'none'",
        ):
            assert line in head
        assert b"Access-Control" not in head


def test_odd_requests_are_refused_quietly(ask: Ask, capfd: pytest.CaptureFixture[str]) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get"):
        assert status(ask(get("/", method=method))) == 501
    for request in (
        b"\x16\x03\x01" + bytes(range(256)) + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET\r\n\r\n",
        b"\r\n\r\n",
    ):
        answer = ask(request)
        assert not answer or b"<title>page" not in answer
    two = ask(get("/") + get("/data/meta.js"))
    assert two.count(b"HTTP/1.") == 1
    for _ in range(3):  # resets: the peer goes before it is answered
        connection = ask(get("/"), open_only=True)
        assert isinstance(connection, socket.socket)
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    assert status(ask(get("/"))) == 200
    assert capfd.readouterr() == ("", "")


def test_who_asks_slowly_costs_little(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that never end their request: few threads, and soon room for others again."""
    monkeypatch.setattr(serve, "ASKING_S", 0.5)
    threads = threading.active_count()
    slow = [ask("GET / HTTP/1.1\r\nA: ", open_only=True) for _ in range(3 * serve.CONNECTIONS)]
    deadline = time.monotonic() + 20
    while status(ask(get("/"))) != 200:
        assert threading.active_count() <= threads + serve.CONNECTIONS
        for connection in slow:  # a byte now and then keeps none of them
            assert isinstance(connection, socket.socket)
            with suppress(ConnectionError):
                connection.send(b"x")
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(b"<title>page" not in everything(connection) for connection in slow)  # type: ignore[arg-type]


def test_ctrl_c_is_how_it_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: taking the interpreter down takes seconds once torch is loaded."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", stopped)
    try:
        with pytest.raises(SystemExit) as end:
            serve.serve(folder, 0)
        stopping.leave(end.value)
    finally:
        stopping.expected.clear()
    assert ended == [0]


def stopped(_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_folder_is_not_served(folder: Path) -> None:
    if digests.read(folder, "") is None:
        pytest.skip("nothing vouches for pages of an earlier version")
    script = folder / "data" / "meta.js"
    with serve.server(folder, 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        script.write_text("l0aded()")
        with socket.create_connection(("127.0.0.1", running.server_port), 5) as connection:
            connection.sendall(get("/data/meta.js", "localhost").encode())
            answer = everything(connection)
        assert status(answer) == 500 and b"meta.js" in answer and b"l0aded" not in answer
        running.shutdown()
    with pytest.raises(StoreError, match=r"meta\.js .*study=browser"):
        serve.server(folder, 0)
    script.unlink()
    with pytest.raises(StoreError, match=r"meta\.js .*study=browser"):
        serve.server(folder, 0)
