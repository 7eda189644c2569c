"""Claims keep living processes apart, and end with their process; or numbers divide the units."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data.errors import StoreError
from data.store.claims import SPINE, FileClaims, NoLocksError, NumberedClaims, unit_claim
from data.store.place import LocalPlace
from data.store.repair import repair
from tests.conftest import make_store

HOLD = """
import sys, time
from pathlib import Path
from data.store.claims import FileClaims, unit_claim
held = FileClaims(Path(sys.argv[1]) / "commits" / "claims", Path(sys.argv[1]))
print(held.take(unit_claim(3)), flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that has claimed unit 3."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_claim_is_refused_while_its_process_lives_and_free_when_it_is_killed(
    tmp_path: Path,
) -> None:
    with holder(tmp_path) as other:
        ours = FileClaims(tmp_path / "commits" / "claims", tmp_path)
        assert not ours.take(unit_claim(3))
        assert ours.take(unit_claim(4))
        assert not ours.alone()
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert ours.take(unit_claim(3))
        assert ours.alone()
        ours.close()


def test_what_a_killed_process_left_half_written_goes_when_nobody_is_there(tmp_path: Path) -> None:
    left = tmp_path / "layer_3" / ".c.0.0.89abcdef.tmp"
    left.parent.mkdir()
    left.touch()
    with holder(tmp_path) as other:
        assert not left.exists()  # it was alone when it came
        left.touch()
        FileClaims(tmp_path / "commits" / "claims", tmp_path).close()
        assert left.exists()  # it may be the other's
        ours = FileClaims(tmp_path / "commits" / "claims", tmp_path)
        other.kill()
        other.wait()
        assert left.exists()
        ours.close()  # the last to go
        assert not left.exists()


def test_repair_is_refused_beside_a_harvest(
    tmp_path: Path, random_bits: NDArray[np.uint16]
) -> None:
    make_store(tmp_path / "s.zarr", random_bits)
    with holder(tmp_path / "s.zarr") as other:
        with pytest.raises(StoreError, match=r"s\.zarr"):
            repair(LocalPlace(tmp_path / "s.zarr"))
        other.kill()
    assert repair(LocalPlace(tmp_path / "s.zarr")) == []


def test_a_file_system_without_locks_shares_out_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(NoLocksError):
        FileClaims(tmp_path / "claims", tmp_path)
    claims = LocalPlace(tmp_path).claims(1, 3)
    assert isinstance(claims, NumberedClaims)
    assert [claims.take(unit_claim(number)) for number in range(6)] == [False, True, False] * 2
    assert not claims.take(SPINE)
    claims.take_over()
    assert claims.take(SPINE) and all(claims.take(unit_claim(number)) for number in range(6))


def test_numbers_leave_nothing_out_and_give_nothing_twice() -> None:
    for world in (1, 2, 3, 7):
        takers = [
            [rank for rank in range(world) if NumberedClaims(rank, world).take(unit_claim(number))]
            for number in range(50)
        ]
        assert all(len(ranks) == 1 for ranks in takers)


def test_the_claims_file_alone_is_no_store(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "s")
    place.claims(0, 1).close()
    assert place.empty()
    (tmp_path / "s" / "letter.txt").touch()
    assert not place.empty()
    assert os.path.exists(tmp_path / "s" / "commits" / "claims")
