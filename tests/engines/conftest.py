"""A Slurm cluster for each test that asks for one, and a text that takes long to read."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.slurm import Slurm, lacking, until
from tests.harvest.test_launchers import contents, environment


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    """Four idle nodes, whose jobs find this checkout and its Python."""
    if reason := lacking():
        pytest.skip(reason)
    work = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path is short
    cluster = Slurm(work)
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cluster.environment |= {
        **environment(),
        "PATH": binaries,
        "SLURM_CONF": str(work / "slurm.conf"),
    }
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(work, ignore_errors=True)


class Slow:
    """A text that takes long to read, and the store that one process makes of it."""

    def __init__(self, folder: Path, documents: int = 1300) -> None:
        """Each row carries 2 MB of blanks, of which the file has 2 kB."""
        path = folder / "slow.jsonl.gz"
        blanks = gzip.compress(b" " * 2_000_000)
        with path.open("wb") as file:
            for number in range(documents):
                row = json.dumps({"text": f"Tom has {number} apples and gives away {number % 7}."})
                file.write(gzip.compress(row[:-1].encode() + b', "blanks": "'))
                file.write(blanks + gzip.compress(b'"}\n'))
        self.settings = (
            "model=tiny",
            "context=64",
            "layer=5",
            f"text.path={path}",
            "tokens=20000",
            "unit=1024",
        )
        command = [sys.executable, "-m", "harvest", *self.settings, "store=s.zarr"]
        subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
        self.whole = contents(folder / "s.zarr")


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Slow:
    return Slow(tmp_path_factory.mktemp("slow"))


def wait_for_text(folder: Path) -> None:
    """Return in the midst of the reading."""
    until(lambda: len([*folder.glob("s.zarr/commits/spine/*")]) > 1, 300, "the first text read")
