"""The text read in this process: another one takes a second of CPU to start, nine for chats.

For tests of other things; that process itself has tests/harvest/test_encoder.py.
"""

from __future__ import annotations

from typing import Any

from residual_saes.harvest.spine_writer import write_spine


class SpineHere:
    """In SpineProcess's place: writes the spine at once."""

    @staticmethod
    def begin() -> None:
        """No process is needed."""

    def __init__(self, store: Any, source: Any, tokenizer: Any, bad: Any, *_: Any) -> None:
        write_spine(store, source, tokenizer, bad=bad)

    def finished(self) -> bool:
        return True

    def stop(self) -> None:
        """Nothing is left to end."""
