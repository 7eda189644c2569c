"""A folder on 127.0.0.1, for where opening index.html from the disk will not do (a remote machine,
say).
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data.errors import SettingError, StoreError

HOST = "127.0.0.1"


class _Quiet(SimpleHTTPRequestHandler):
    """Files alone; a line for each would bury the address. A rebuilt folder is seen at once."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` on this machine alone, not yet running.

    Args:
        port: 0 takes one that is free.

    Raises:
        StoreError: there is no browser in `folder`.
        SettingError: the port cannot be had.
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
    """Serve `folder` until interrupted, and say where.

    Raises:
        StoreError, SettingError: see `server`.
    """
    with server(folder, port) as running:
        print(f"http://{HOST}:{running.server_port}/ until Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):  # which is how it ends
            running.serve_forever()
