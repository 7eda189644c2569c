"""Model diffing from end to end: the embedded model beside a copy that learned one thing more.

    python -m tests.bench.model_diff --work DIR --out FILE

The copy is fine-tuned to write each answer backwards behind its problem. Both read the same text,
half of whose problems have that line. A crosscoder of layer 5 of both is trained, and one of the
base model with itself (store=[A,A]) by the same settings: the null. study=diff then says whose the
latents are. Where own latents fire is counted apart, on the text of the new line and elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from analyze.subject import Subject
from data.tiny.embedded import MODEL_DIR
from data.tiny.problems import Problem, document, problem
from tests.bench.outcome import finish
from tests.tiny.build import BOS, EOS, PAD, Batch, train_

MARK = "\nBackwards: "  # what the copy learns to go on with
LAYER = 5
TUNING_SEED = 11  # of the problems to learn on; the text is of another one
TEXT_SEED = 12


def backwards(one: Problem) -> str:
    """A problem with its solution, and the answer's digits from the last to the first."""
    return f"{document(one)}{MARK}{str(one.answer)[::-1]}"


def batches(tokenizer: Any, rows: int) -> Iterator[Batch]:
    """Endless batches of both kinds of documents, one after the other."""
    index = 0
    while True:
        texts = []
        for number in range(index, index + rows):
            one = problem("train", number, TUNING_SEED)
            texts.append(backwards(one) if number % 2 else document(one))
        index += rows
        every = [
            [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"], EOS] for text in texts
        ]
        width = max(map(len, every))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in every])
        yield Batch(ids, (ids != PAD).float())


@torch.inference_mode()
def loss_of_the_line(folder: Path, count: int = 200) -> float:
    """Cross entropy of the digits behind MARK, nats a token, of held-out problems."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for number in range(count):
        text = backwards(problem("heldout", number))
        head, digits = text[: text.index(MARK) + len(MARK)], text[text.index(MARK) + len(MARK) :]
        given, asked = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, digits)
        )
        logits = model(torch.tensor([[BOS, *given, *asked]])).logits[0, len(given) : -1]
        losses += cross_entropy(logits, torch.tensor(asked), reduction="none").tolist()
    return float(np.mean(losses))


def fine_tuned(folder: Path, steps: int) -> Path:
    """The copy, as a folder of a model."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    train_(model, batches(tokenizer, 16), steps, 1e-3)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL_DIR / file, folder / file)
    return folder


def write_text(path: Path, count: int) -> Path:
    """The text that both models read."""
    with path.open("w") as file:
        for number in range(count):
            one = problem("train", number, TEXT_SEED)
            file.write(json.dumps({"text": backwards(one) if number % 2 else document(one)}) + "\n")
    return path


def command(*words: str) -> None:
    """Run a command of ours, and show it."""
    print("python -m", *words, flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def where_own_fire(run: Path, target: int) -> dict[str, float]:
    """How often surviving own latents of a target fire, and shared ones: on the new line, and
    elsewhere; latents a token.
    """
    subject = Subject.open(run, None, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    table = pq.read_table(run / "studies" / "diff" / "features.parquet").to_pydict()
    survives = np.array([value == 1 for value in table["survives"]])
    share = np.array(table[f"share {subject.ports.writes[target].name}"])
    kinds = {"own": survives & (share > 0.5), "others": ~survives}
    counts = {name: np.zeros(2) for name in (*kinds, "tokens")}
    for firings in subject.firings(10**6):
        unit = firings.unit
        ids = subject.store.tokens(unit.number).ravel()
        is_line = _lines(tokenizer, ids)[unit.local]
        counts["tokens"] += np.bincount(is_line[firings.rows], minlength=2)
        for name, members in kinds.items():
            chosen = members[firings.latent]
            counts[name] += np.bincount(is_line[firings.row[chosen]], minlength=2)
    figures: dict[str, float] = {}
    for name in kinds:
        elsewhere, line = counts[name] / counts["tokens"]
        figures |= {f"{name}_on_the_line": float(line), f"{name}_elsewhere": float(elsewhere)}
    return figures


def _lines(tokenizer: Any, ids: NDArray[np.uint32]) -> NDArray[np.int64]:
    """(t,) 1 from MARK to the end of its document, 0 elsewhere."""
    mark = tokenizer(MARK, add_special_tokens=False)["input_ids"]
    inside = np.zeros(len(ids), np.int64)
    on = 0
    for place, token in enumerate(ids.tolist()):
        if token == BOS:
            on = 0
        elif ids[place : place + len(mark)].tolist() == mark:
            on = 1
        inside[place] = on
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--sae", default="tiny_crosscoder")
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    text = write_text(work / "text.jsonl", args.tokens // 20)
    tuned = fine_tuned(work / "tuned", args.steps)
    losses = {"loss_base": loss_of_the_line(MODEL_DIR), "loss_tuned": loss_of_the_line(tuned)}
    stores = {}
    for name, folder in (("base", MODEL_DIR), ("tuned", tuned)):
        stores[name] = work / f"{name}.zarr"
        command(
            *("harvest", f"model.path={folder}", "model.dtype=float32", f"text.path={text}"),
            *(f"layer={LAYER}", f"tokens={args.tokens}", "context=256", f"store={stores[name]}"),
        )
    runs = {}
    for name, pair in (("diff", ("base", "tuned")), ("self", ("base", "base"))):
        runs[name] = work / name
        both = ",".join(str(stores[one]) for one in pair)
        command(
            *("train", f"sae={args.sae}", "optim=tiny", "batch=512", f"store=[{both}]"),
            *(f"layer={LAYER}", f"run={runs[name]}"),
        )
    command("analyze", "study=diff", f"run={runs['self']}")
    command("analyze", "study=diff", f"run={runs['diff']}", f"study.null_run={runs['self']}")
    results = {}
    for name, run in runs.items():
        record = json.loads((run / "studies" / "diff" / "diff.json").read_text())
        figures = record["figures"]
        kept = ("rows", "documents", "features", "silent", "classes", "cosine", "own")
        results[name] = {key: figures[key] for key in (*kept, "variance_explained")}
    shape = {"steps": args.steps, "tokens": args.tokens, "layer": LAYER, "sae": args.sae}
    fires = where_own_fire(runs["diff"], 1)
    finish(shape, {**losses, **fires, **results}, args.out)


if __name__ == "__main__":
    main()
