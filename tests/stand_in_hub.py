"""The part of the Hugging Face hub that readers of data sets and of models use, on this machine.

The hub's client reads its address when it is imported, so each check runs in a process of its own:
see `Alone`.
"""

from __future__ import annotations

import hashlib
import http.server
import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import close_session

from residual_saes.data.durable import digest

DATA = "datasets/me/data"
MODEL = "me/model"


class Hub(http.server.ThreadingHTTPServer):
    """One repository of a hub: a data set's or a model's.

    Files come by a redirect to /cdn, as large ones do. Each request takes the first of `faults`
    whose path it begins with: an HTTP status with headers, "cut" (half a body), or "drop" (no
    answer).
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes], repository: str = DATA) -> None:
        super().__init__(("127.0.0.1", int(os.environ["HF_ENDPOINT"].rpartition(":")[2])), _Answers)
        self.files = files
        self.repository = repository
        # Clients cache what they saw of a commit, so other files need another one.
        self.commit = digest(repr(sorted(files.items())).encode())[:32] + "0" * 8
        self.faults: list[tuple[str, Any]] = []
        self.ranges: list[tuple[str, int, int]] = []  # (file, start, stop) of each range request
        self.downloads: list[str] = []  # files that were asked for from end to end
        self.whole = False  # whether ranges are ignored

    @property
    def api(self) -> str:
        """Where the API answers for the repository."""
        kind = "" if self.repository.startswith("datasets/") else "models/"
        return f"/api/{kind}{self.repository}"

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no error."""


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the headers' acknowledgement

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        for number, (begins, fault) in enumerate(self.server.faults):
            if self.path.startswith(begins):
                del self.server.faults[number]
                if fault == "drop":
                    self.close_connection = True
                elif fault == "cut":
                    self._bytes(cut=True)
                elif fault is not None:
                    self._say(fault[0], b"no", fault[1])
                if fault is not None:
                    return
                break
        self._answer()

    do_HEAD = do_GET

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        server = self.server
        files, commit = server.files, server.commit
        tree, recursive = f"{server.api}/tree/{commit}", "recursive=true" in query.lower()
        resolved = path.removeprefix(f"/{server.repository}/resolve/{commit}/")
        if path in (f"{server.api}/revision/main", f"{server.api}/revision/{commit}"):
            name = server.repository.removeprefix("datasets/")
            info = {"id": name, "sha": commit, "siblings": [], "tags": [], "downloads": 0}
            self._json({**info, "private": False})
        elif path in (f"{server.api}/tree/{commit}/data", tree) and (path != tree or recursive):
            self._json([self._described(name) for name in files])
        elif path == tree:
            self._json([{"type": "directory", "path": "data", "oid": "c" * 40}])
        elif resolved in files:
            data = files[resolved]
            about = {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            if self.command == "HEAD":  # the client reads these before any redirect
                self._say(200, data, about)
            else:
                self._say(302, b"", {"Location": f"/cdn/{resolved}", **about})
        elif path.startswith("/cdn/"):
            self._bytes()
        else:
            missing = "RepoNotFound"
            if path.startswith(f"/{server.repository}/"):
                missing = "EntryNotFound"
            self._say(404, b"", {"X-Error-Code": missing, "X-Repo-Commit": commit})

    def _described(self, name: str) -> dict[str, Any]:
        return {
            "type": "file",
            "path": name,
            "size": len(self.server.files[name]),
            "oid": "b" * 40,
        }

    def _bytes(self, cut: bool = False) -> None:
        name = self.path.removeprefix("/cdn/")
        data = self.server.files[name]
        if self.server.whole or "Range" not in self.headers:
            if self.command == "GET":
                self.server.downloads.append(name)
            self._say(200, data, half=cut)
            return
        first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            self._say(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        part = data[first : last + 1]
        self.server.ranges.append((name, first, last + 1))
        headers = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}
        self._say(206, part, headers, half=cut)

    def _json(self, value: Any) -> None:
        self._say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _say(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, half: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = half


@contextmanager
def serving(files: Mapping[str, bytes], repository: str = DATA) -> Iterator[Hub]:
    """A hub with one repository of these files, at the address that the client was told."""
    with Hub(files, repository) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
        close_session()  # or the next hub's requests go on over the connections to this one


class Alone:
    """Runs checks, each in a process of its own whose hub is at a free port of this machine.

    The hub's client reads its address and its cache's folder when it is imported. A process imports
    all that once, with a link in the folder's place, and forks for each check.
    """

    def __init__(self, root: Path) -> None:
        """`root` is an empty folder."""
        with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as free:
            port = free.server_port
        self._cache = root / "cache"
        hub_is = {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(self._cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.stand_in_hub import fork; fork()"],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **hub_is},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, check: Callable[..., None], cache: Path, *arguments: str) -> None:
        """Run `check(*arguments)` with the client's folder at `cache`."""
        assert self._server.stdin and self._server.stdout
        cache.mkdir(exist_ok=True)
        self._cache.unlink(missing_ok=True)
        self._cache.symlink_to(cache)
        asked = {"module": check.__module__, "check": check.__name__, "arguments": arguments}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        failure = json.loads(self._server.stdout.readline())
        assert failure == "", failure

    def close(self) -> None:
        self._server.communicate()


def fork() -> None:
    """Run the checks that stdin asks for; tell stdout of each how it failed."""
    import datasets  # noqa: F401 (which takes a second, and each check would)

    for line in sys.stdin:
        asked = json.loads(line)
        module = importlib.import_module(asked["module"])
        reading, writing = os.pipe()
        if not os.fork():
            os.dup2(2, 1)
            with os.fdopen(writing, "w") as told:
                try:
                    getattr(module, asked["check"])(*asked["arguments"])
                except BaseException:
                    told.write(traceback.format_exc())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as failed:
            failure = failed.read()
        _, status = os.wait()
        print(json.dumps(failure or (f"ended by {status}" if status else "")), flush=True)
