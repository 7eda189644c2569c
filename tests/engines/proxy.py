"""A proxy before an S3 server: it notes every request, and fails or delays some."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

_BUSY = b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>"
_ALLOWED_HEAD = 1 << 20  # bytes


class Faults(NamedTuple):
    """What goes wrong, as shares of all requests."""

    busy: float = 0.0  # answered with 503
    reset: float = 0.0  # the connection dies before the server has seen the request
    lost: float = 0.0  # the server does what it was asked for, and its answer is lost
    latency_s: float = 0.0  # before each request


class Sent(NamedTuple):
    """A request that was sent."""

    when: float  # time.monotonic()
    kind: str  # LIST, GET, HEAD, DELETE, PUT; PUT-create (If-None-Match), PUT-match (If-Match)
    key: str  # without bucket and store; the prefix of a LIST
    status: int  # of the answer; 0 if the server never saw it


class Proxy:
    """Passes requests on to a server; a context manager."""

    def __init__(self, upstream: int, faults: Faults, seed: int = 0) -> None:
        self.sent: list[Sent] = []
        self.faults = faults
        self.port = 0
        self._upstream = upstream
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_ALLOWED_HEAD, backlog=512)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(60)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def counts(self) -> dict[str, int]:
        """Requests by kind and area, as "PUT layer_5"."""
        counted = Counter(f"{sent.kind} {area(sent.key)}" for sent in self.sent)
        return dict(sorted(counted.items()))

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer the requests of one connection."""
        up: tuple[StreamReader, StreamWriter] | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line, headers = _parsed(head)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                kind, key = _named(line, headers)
                await asyncio.sleep(self.faults.latency_s)
                now, drawn = time.monotonic(), self._random.random()
                if drawn < self.faults.busy:
                    self.sent.append(Sent(now, kind, key, 503))
                    writer.write(_busy(kind))
                    continue
                if drawn < self.faults.busy + self.faults.reset:
                    self.sent.append(Sent(now, kind, key, 0))
                    return
                if up is None:
                    up = await asyncio.open_connection(
                        "127.0.0.1", self._upstream, limit=_ALLOWED_HEAD
                    )
                up[1].write(head + body)
                status, answer = await _answer(up[0], kind)
                self.sent.append(Sent(now, kind, key, status))
                if self._random.random() < self.faults.lost:
                    return
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # a client that goes away
        finally:
            for opened in (writer, *(up[1:] if up else ())):
                opened.transport.abort()


def _parsed(head: bytes) -> tuple[str, dict[str, str]]:
    """The first line of a message, and its headers."""
    line, *rest = head.decode("latin1").rstrip("\r\n").split("\r\n")
    pairs = [header.partition(":") for header in rest]
    return line, {name.lower(): value.strip() for name, _, value in pairs}


def _named(line: str, headers: dict[str, str]) -> tuple[str, str]:
    """Kind and key of a request."""
    kind, target, _ = line.split(" ", 2)
    path, _, query = target.partition("?")
    if kind == "GET" and "list-type" in query:
        prefix = parse_qs(query).get("prefix", [""])[0]
        return "LIST", prefix.partition("/")[2]
    if kind == "POST" and "delete" in query:  # obstore's way; the keys are in the body
        kind = "DELETE"
    if kind == "PUT" and "if-none-match" in headers:
        kind = "PUT-create"
    if kind == "PUT" and "if-match" in headers:
        kind = "PUT-match"
    return kind, unquote(path.lstrip("/")).partition("/")[2].partition("/")[2]


def area(key: str) -> str:
    """The part of a store that a key lies in: commits/residuals, layer_5."""
    first, _, rest = key.partition("/")
    return f"{first}/{rest.partition('/')[0]}" if first == "commits" else first


def _busy(kind: str) -> bytes:
    head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(_BUSY)}\r\n\r\n".encode()
    return head if kind == "HEAD" else head + _BUSY


async def _answer(server: StreamReader, kind: str) -> tuple[int, bytes]:
    """Status and bytes of the server's answer."""
    head = await server.readuntil(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head = await server.readuntil(b"\r\n\r\n")
    line, headers = _parsed(head)
    status, parts = int(line.split()[1]), [head]
    if kind == "HEAD" or status in (204, 304):
        return status, head
    if headers.get("transfer-encoding") != "chunked":
        return status, head + await server.readexactly(int(headers.get("content-length", 0)))
    size = -1
    while size:
        parts.append(await server.readline())
        size = int(parts[-1].split(b";")[0], 16)
        parts.append(await server.readexactly(size + 2))
    return status, b"".join(parts)
