"""A server of a folder on 127.0.0.1, for where the disk will not do, as on a remote machine."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data import stopping
from data.errors import SettingError, StoreError
from data.journal import show

HOST = "127.0.0.1"


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files without logging: a line for each would bury the address.

    Nothing is cached, so a rebuilt folder is seen at once.
    """

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` on this machine alone; it does not run yet.

    Args:
        port: 0 takes a free one.

    Raises:
        StoreError: there is no browser in `folder`.
        SettingError: the port is taken or not allowed.
    """
    if not (folder / "index.html").is_file():
        raise StoreError(
            f"no index.html in {folder}; `python -m analyze study=browser run=...` makes it"
        )
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Quiet, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise SettingError(
            f"port {port} on {HOST} cannot be had ({error}); give another"
        ) from error


def serve(folder: Path, port: int) -> None:
    """Print the address and serve `folder` until Ctrl-C.

    Raises:
        StoreError, SettingError: see `server`.
    """
    with server(folder, port) as running:
        show(f"http://{HOST}:{running.server_port}/ until Ctrl-C")
        stopping.expected.set()
        with suppress(KeyboardInterrupt):  # which is how it ends
            running.serve_forever()
