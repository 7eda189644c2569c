"""A server of a folder on 127.0.0.1, for where the disk will not do, as on a remote machine.

Whoever can reach the port may ask: other users, and other pages in the same browser. So it answers
to its own names alone (a foreign name that leads here is DNS rebinding), gives the folder's own
files alone, lets no other page embed them, and a peer that asks or reads slowly costs little.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from residual_saes.analyze import results
from residual_saes.analyze.pages.browser.live import Live
from residual_saes.analyze.results import PAGE
from residual_saes.analyze.study import Study
from residual_saes.data import digests, stopping
from residual_saes.data.digests import Digests
from residual_saes.data.errors import SettingError, StoreError
from residual_saes.data.journal import show
from residual_saes.train.run import METRICS

HOST = "127.0.0.1"
# A tunnel may give it another port.
_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", re.IGNORECASE)
CONNECTIONS = 32  # at a time; a browser opens six
ASKING_S = 10.0  # for a request, headers and all
ANSWERING_S = 60.0  # for a file
ASKING = "X-Residual-SAEs"  # header of a question to the model
_LARGEST = 1 << 16  # bytes of a question
_WAY_OUT = "`python -m analyze study=browser run=...` makes it"
_AGAIN = "`python -m analyze study=NAME run=...` makes it again; of the report NAME is report"
_REPORTED = re.compile(rf"({results.FOLDER}/\w[\w.]*)/([\w.]+)")  # a file of a study
_STUDY_PAGE = re.compile(rf"{results.FOLDER}/\w[\w.]*/{PAGE}")
# Files in the run's own directory that a study leaves there, and who records them.
_BESIDE = {results.REPORT: ".report", "quality.json": ".quality"}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".jsonl": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # a rebuilt folder is seen at once
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    # The data are scripts, which any page could load.
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class _Answer(BaseHTTPRequestHandler):
    """Answers one request (HTTP/1.0: a connection has no second one), and logs nothing."""

    server: _Server
    timeout = ANSWERING_S

    def __init__(self, *arguments: Any, folder: Path, live: Live | None) -> None:
        self._folder = folder
        self._live = live
        super().__init__(*arguments)

    def setup(self) -> None:
        super().setup()
        self.server.asking[self.connection] = time.monotonic() + ASKING_S

    def parse_request(self) -> bool:
        """Whether the request is one, and meant for this server; else it was answered."""
        is_request = super().parse_request()
        self.server.asking.pop(self.connection, None)
        if not is_request:
            return False
        hosts = self.headers.get_all("Host", [])
        is_old = not hosts and self.request_version == "HTTP/1.0"  # no browser sends that
        if not is_old and (len(hosts) != 1 or not _NAMES.fullmatch(hosts[0].strip())):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "This server has another name")
            return False
        return True

    def finish(self) -> None:
        self.server.asking.pop(self.connection, None)
        super().finish()

    def do_GET(self) -> None:
        # The report leads to the browser as to studies/NAME/.
        path = unquote(self.path.partition("?")[0].removeprefix("/"))
        name = path.removeprefix(f"studies/{self._folder.name}/") or PAGE
        if name == "live":
            self._say(HTTPStatus.OK, self._live.about() if self._live else {})
            return
        try:
            content = _answer(self._folder, name)
        except StoreError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, "Damaged", str(error))
            return
        except (OSError, ValueError):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", _TYPES.get(Path(name).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer a question to the model, line by line as it is known."""
        if self._live is None:
            self.send_error(HTTPStatus.NOT_IMPLEMENTED)
            return
        if reason := self._foreign():
            self._say(HTTPStatus.FORBIDDEN, {"error": reason})
            return
        try:
            request = self._question()
        except (ValueError, RecursionError):
            most = f"a question is a JSON object of {_LARGEST:,} bytes at most"
            self._say(HTTPStatus.BAD_REQUEST, {"error": most})
            return
        name = self.path.removeprefix("/live/")
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        with closing(self._live.answer(name, request, self._is_gone)) as lines:
            for line in lines:
                self.wfile.write(json.dumps(line).encode("ascii") + b"\n")

    def _foreign(self) -> str | None:
        """Why a question does not come from this server's own page; None: it does."""
        origins = self.headers.get_all("Origin", [])
        own = f"http://{self.headers['Host'] or ''}".strip().lower()
        is_own = not origins or [origin.lower() for origin in origins] == [own]
        if not is_own or self.headers["Sec-Fetch-Site"] not in (None, "same-origin"):
            return "another page may not ask"
        is_json = self.headers.get_content_type() == "application/json"
        return None if is_json and self.headers[ASKING] == "1" else f"{ASKING}: 1 is missing"

    def _question(self) -> Mapping[str, Any]:
        length = self.headers["Content-Length"] or ""
        if not re.fullmatch(r"\d{1,6}", length) or int(length) > _LARGEST:
            raise ValueError(length)
        self.server.asking[self.connection] = time.monotonic() + ASKING_S
        question = json.loads(self.rfile.read(int(length)))
        self.server.asking.pop(self.connection, None)
        if not isinstance(question, dict):
            raise ValueError("no object")
        return question

    def _is_gone(self) -> bool:
        """Whether who asked has closed the connection: that is how a page cancels."""
        ready, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _say(self, status: HTTPStatus, value: Mapping[str, Any]) -> None:
        content = json.dumps(value).encode("ascii")
        self.send_response(status)
        self.send_header("Content-Type", _TYPES[".json"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def end_headers(self) -> None:
        # A report has a policy of its own, and a study's page too, which lets it style itself. A
        # bad request has no path.
        path = getattr(self, "path", "").partition("?")[0].removeprefix("/")
        name = path.removeprefix(f"{results.FOLDER}/{self._folder.name}/")
        is_report = name == results.REPORT or bool(_STUDY_PAGE.fullmatch(name))
        for name, value in _HEADERS.items():
            if not is_report or name != "Content-Security-Policy":
                self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "residual-saes"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a line for each file would bury the address."""


class _Server(ThreadingHTTPServer):
    """A thread for each of CONNECTIONS connections; what comes beyond is closed."""

    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self.asking: dict[socket.socket, float] = {}  # by connection, when its request is due
        self._free = threading.Semaphore(CONNECTIONS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def service_actions(self) -> None:
        """Cut off who has not asked in time. `serve_forever` calls this twice a second."""
        for connection, due in list(self.asking.items()):
            if time.monotonic() > due:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing if the peer has gone or was cut off."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _record(folder: Path) -> Digests | None:
    return digests.read(folder, _WAY_OUT)


def _content(folder: Path, name: str) -> bytes:
    """A file that is the folder's own.

    Raises:
        OSError, ValueError: there is none of this name.
        StoreError: it is damaged.
    """
    path = folder / name
    is_inside = {"", ".", ".."}.isdisjoint(name.split("/"))
    if not is_inside or path.resolve(strict=True) != path or not path.is_file():  # a link, a pipe
        raise FileNotFoundError(name)
    record = _record(folder)
    if record and name not in record.files:
        raise FileNotFoundError(name)
    return record.content(name, f"{_WAY_OUT} again") if record else path.read_bytes()


def _answer(folder: Path, name: str) -> bytes:
    """A file of the browser in `folder`, the report of its run, or a file that the report names.

    Raises:
        OSError, ValueError: there is none of this name.
        StoreError: it is damaged.
    """
    run = folder.parent.parent
    if name == f"{results.FOLDER}/{results.INDEX}":
        return results.index(run) + b"globalThis.SERVED = true;\n"
    if name == METRICS:
        return _content(run, name)
    if name in _BESIDE:
        return _recorded(run / results.FOLDER / _BESIDE[name], f"../../{name}")
    if of_study := _REPORTED.fullmatch(name):
        return _recorded(run / of_study[1], of_study[2])
    return _content(folder, name)


def _recorded(folder: Path, name: str) -> bytes:
    """A file that the record in `folder` names: of the run's studies, or the report.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is damaged.
    """
    record = digests.read(folder, _AGAIN)
    if record is None or name not in record.files:
        raise FileNotFoundError(name)
    if record.path(name).resolve() != record.path(name):  # a link
        raise FileNotFoundError(name)
    return record.content(name, _AGAIN)


def server(folder: Path, port: int, live: Live | None = None) -> ThreadingHTTPServer:
    """A server of `folder` on this machine alone; it does not run yet.

    Args:
        port: 0 takes a free one.
        live: answers questions to the model; None: there are none.

    Raises:
        StoreError: there is no browser in `folder`, or a file of it is damaged.
        SettingError: the port is taken or not allowed.
    """
    if not (folder / PAGE).is_file():
        raise StoreError(f"no {PAGE} in {folder}; {_WAY_OUT}")
    if record := _record(folder):
        record.require([PAGE, *record.files], f"{_WAY_OUT} again")
    try:
        return _Server((HOST, port), partial(_Answer, folder=folder.resolve(), live=live))
    except (OSError, OverflowError) as error:
        raise SettingError(
            f"port {port} on {HOST} cannot be had ({error}); give another"
        ) from error


def serve(folder: Path, port: int, study: Study | None = None) -> None:
    """Print the address and serve `folder` until Ctrl-C, which ends the command.

    Args:
        study: whose run and model answer questions; None: there are none.

    Raises:
        SystemExit: it has come, with code 0.
        StoreError, SettingError: see `server`.
    """
    with server(folder, port, Live(study) if study else None) as running:
        show(f"http://{HOST}:{running.server_port}/ until Ctrl-C")
        stopping.expected.set()
        with suppress(KeyboardInterrupt):  # which is how it ends
            running.serve_forever()
    sys.exit(0)
