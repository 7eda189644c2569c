"""A text that breaks, in a file of its own: the process that reads it imports this and no torch."""

from __future__ import annotations

from collections.abc import Iterator

from residual_saes.data.errors import StoreError
from residual_saes.data.text.documents import Document, State
from residual_saes.data.text.sources import FileText


class Breaking(FileText):
    """A source that raises in the middle, once."""

    def documents(self, state: State) -> Iterator[Document]:
        for number, document in enumerate(super().documents(state)):
            if number == 100 and not (self.path.parent / "broke").exists():
                (self.path.parent / "broke").touch()
                raise StoreError("the line went dead; the same command goes on")
            yield document
