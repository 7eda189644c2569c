"""digests.json: what is flipped, cut, missing or unnamed is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from residual_saes.data import digests
from residual_saes.data.errors import StoreError

NAMES = ("sae.pt", "data/tokens.js")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two recorded files."""
    (tmp_path / "data").mkdir()
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode() * 20)
    digests.write(tmp_path, NAMES, {"seed": 1})
    return tmp_path


def read(folder: Path) -> digests.Digests:
    found = digests.read(folder, "make it again")
    assert found
    return found


def test_a_whole_folder_has_no_faults(folder: Path) -> None:
    found = read(folder)
    assert set(found.files) == set(NAMES)
    assert found.about == {"seed": 1}
    assert list(found.faults()) == []
    found.require(NAMES, "make it again")


@pytest.mark.parametrize("name", NAMES)
def test_every_flip_and_every_cut_is_found(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    for at in np.linspace(0, len(whole) - 1, 40).astype(int):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        for content in (bytes(flipped), whole[:at]):
            path.write_bytes(content)
            (line,) = read(folder).faults()
            assert str(path) in line
            with pytest.raises(StoreError, match="make it again"):
                read(folder).require([name], "make it again")
    path.unlink()
    (line,) = read(folder).faults()
    assert "missing" in line


def test_a_file_that_is_not_named_does_not_count(folder: Path) -> None:
    (folder / "late.json").write_text("{}")
    with pytest.raises(StoreError, match=r"late\.json"):
        read(folder).require(["late.json"], "make it again")


def test_every_flip_in_the_record_itself_is_found(folder: Path) -> None:
    path = folder / digests.FILE
    whole = path.read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match=r"digests\.json .*; make it again"):
            read(folder)


def test_no_record_is_none(tmp_path: Path) -> None:
    assert digests.read(tmp_path, "make it again") is None
    assert digests.read(tmp_path / "nowhere", "make it again") is None
