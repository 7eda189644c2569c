"""Counts of every scenario in one table, and none of them silent."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.faults import report
from tests.faults.power import EVERY
from tests.faults.report import Tally

_PROPERTY = "faults"


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    """Counts the faults of a test, which fails at its end if one was silent or broke something."""
    counted = Tally()
    yield counted
    record_property(_PROPERTY, counted.rows())
    if counted.bad:
        shown = "\n".join(counted.bad[:5])
        pytest.fail(f"{len(counted.bad)} of {counted.cases()} faults:\n{shown}", pytrace=False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, of whatever ran; FAULTS=FILE keeps it as JSON."""
    found: list[Any] = []
    for reports in terminalreporter.stats.values():
        for one in reports:
            if getattr(one, "when", None) == "teardown":
                found += [rows for name, rows in one.user_properties if name == _PROPERTY]
    sums = report.summed(row for rows in found for row in rows)
    if sums:
        terminalreporter.section("faults")
        terminalreporter.write("\n".join([*report.table(sums), ""]))
    if file := os.environ.get("FAULTS"):
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
        kept = {"date": str(date.today()), "commit": _commit(), "machine": machine, "every": EVERY}
        Path(file).write_text(json.dumps({**kept, "faults": sums}, indent=1) + "\n")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
