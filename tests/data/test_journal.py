"""What is told while something works silently."""

from __future__ import annotations

import time

import pytest

from residual_saes.data import stopping
from residual_saes.data.journal import Progress, heartbeat, note, show, tell


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def wait_for_a_line(capsys: pytest.CaptureFixture[str]) -> list[str]:
    for _ in range(200):
        if lines := told(capsys):
            return lines
        time.sleep(0.05)
    pytest.fail("nothing was told")


def test_silent_work_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """By its last name, whether that was printed or not; and no longer once it is over."""
    with heartbeat("opening", interval_s=0.0):
        assert wait_for_a_line(capsys)[0].startswith("opening, ")
        tell("loading")
        assert told(capsys)[0] == "loading"
        assert wait_for_a_line(capsys)[0].startswith("loading, ")
        note("digest")
        assert wait_for_a_line(capsys)[0].startswith("digest, ")
    told(capsys)
    time.sleep(1.0)  # twice what the thread waits
    assert told(capsys) == []


def test_talking_work_is_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    with heartbeat("opening", interval_s=60.0):
        progress = Progress(interval_s=60.0)
        for number in range(3):
            progress.show(f"unit {number}", last=number == 2)
        time.sleep(0.7)
    assert told(capsys) == ["unit 0", "unit 2"]


def test_a_server_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    stopping.expected.set()
    try:
        with heartbeat("serving", interval_s=0.0):
            time.sleep(0.7)
    finally:
        stopping.expected.clear()
    assert told(capsys) == []


def test_what_is_said_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """By any way: a name with a line feed makes no second line, an escape recolours nothing."""
    hostile = "runs/a\nerror: b\r\x1b[2J\u202ec\udc80"
    with heartbeat(hostile, interval_s=0.0):
        lines = wait_for_a_line(capsys)
    tell(hostile)
    Progress().show(hostile, last=True)
    show(hostile)
    said = capsys.readouterr()
    lines += said.err.splitlines() + said.out.splitlines()
    assert len(lines) >= 4
    assert all(line.isprintable() and "error: b" in line for line in lines)
