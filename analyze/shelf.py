"""Small results of which a user asks for many: one folder each in RUN/studies/NAME, LIMIT at most.

The same question again finds its folder. The folders that were asked for longest ago are removed,
so that any number of questions takes bounded room.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from residual_saes.analyze import kept, results
from residual_saes.analyze import outcome as outcomes
from residual_saes.analyze.outcome import Outcome
from residual_saes.analyze.results import PAGE, digest_of
from residual_saes.analyze.study import Study
from residual_saes.data import digests, durable

LIMIT = 100  # folders of a study
_LONGEST = 40  # characters of a question in its folder's name


def outcome_of(
    study: Study, question: str, key: Mapping[str, Any], make: Callable[[], tuple[Outcome, bytes]]
) -> Outcome:
    """What `make` finds, or found when it was asked before; its page lies beside it.

    Args:
        question: a text of anybody; some letters of it are in the folder's name.
        key: everything that the result follows from.
        make: the outcome, and its page.
    """
    words = re.sub(r"[^0-9a-z]+", "-", question[: 4 * _LONGEST].lower()).strip("-")
    name = "-".join(filter(None, (words[:_LONGEST].strip("-"), digest_of(key))))
    place = results.made(study.place)
    folder = place / name

    def fill(folder: Path) -> None:
        found, page = make()
        outcomes.write(folder, study.name, key, found, finds=False)
        durable.write(folder / PAGE, [page])

    kept.filled(folder, key, fill)
    os.utime(folder)
    for old in _newest_first(place)[LIMIT:]:
        shutil.rmtree(old, ignore_errors=True)
    way_out = f"delete {folder}, and ask again"
    recorded = digests.read(folder, way_out)
    assert recorded is not None, "it was just filled"
    found = outcomes.read(recorded, study.name, way_out)
    page = f"The page is {folder / PAGE}: open it in a browser."
    return replace(found, summary=[*found.summary, page])


def _newest_first(place: Path) -> list[Path]:
    """The folders that were made here: whatever else lies beside them is somebody's own."""
    folders = []
    for path in place.iterdir():
        if re.search(r"(^|-)[0-9a-f]{12}$", path.name) and (path / digests.FILE).is_file():
            folders.append(path)
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)
