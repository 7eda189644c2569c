"""What a part of the check finds: checks that must hold, figures beside their aims, and tables."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from residual_saes.data.errors import first_line


class Notes:
    """Kept line by line in a file as they come, so that a part that dies loses none."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def check(self, what: str, fault: str | None, said: str = "") -> None:
        """Note whether something holds that must.

        Args:
            fault: what is wrong; None: it holds.
        """
        said = fault or said
        print(f"  {'FAILED' if fault else 'ok':<7} {what}{': ' * bool(said)}{said}", flush=True)
        self._keep("check", what=what, held=not fault, said=said)

    def figure(
        self, what: str, value: float, unit: str, aim: float | None = None, elsewhere: str = ""
    ) -> None:
        """Note a figure.

        Args:
            aim: what it had best be at least.
            elsewhere: what others tell of theirs.
        """
        print(f"  {what}: {value:,.4g} {unit}", flush=True)
        self._keep("figure", what=what, value=value, unit=unit, aim=aim, elsewhere=elsewhere)

    def table(self, title: str, lines: Sequence[str]) -> None:
        print(f"  {title}:", *lines, sep="\n    ", flush=True)
        self._keep("table", title=title, lines=list(lines))

    @contextmanager
    def piece(self, what: str) -> Iterator[None]:
        """A piece of a part: if it raises, that is a check that failed, and the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(what, f"{type(error).__name__}: {first_line(error)}")

    def _keep(self, kind: str, **found: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, **found}) + "\n")

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """All that is kept, by kind: check, figure, table."""
        found: dict[str, list[dict[str, Any]]] = {"check": [], "figure": [], "table": []}
        for line in self.file.read_text().splitlines():
            note = json.loads(line)
            found[note.pop("kind")].append(note)
        return found
