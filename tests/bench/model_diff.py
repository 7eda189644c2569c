"""Model diffing from end to end: the embedded model beside a copy that learned one thing more.

    python -m tests.bench.model_diff --work DIR --out FILE

The copy is fine-tuned to write each answer backwards behind its problem. Both read the same text,
half of whose problems have that line. A crosscoder of a layer of both is trained, and one of the
base model with itself (store=[A,A]) by the same settings: the null. study=diff then says whose the
latents are. Where each class fires is counted apart, on the text of the new line and elsewhere.

Planted models come first, of which the truth is known: tests/analyze/test_diff.py has the features.
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

from residual_saes.analyze.subject import Subject
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.data.tiny.problems import Problem, document, problem
from tests.analyze.test_diff import rows_of, world
from tests.bench.outcome import finish
from tests.conftest import make_spine, make_store
from tests.tiny.build import BOS, EOS, PAD, Batch, train_

MARK = "\nBackwards: "  # what the copy learns to go on with
PLANTED_ROWS = 65_536
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


def where_classes_fire(run: Path) -> dict[str, list[float]]:
    """Latents of each class that fire on a token: elsewhere, and on the new line."""
    subject = Subject.open(run, None, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    table = pq.read_table(run / "studies" / "diff" / "features.parquet").to_pydict()
    classes = np.array(table["class"])
    counts = {str(name): np.zeros(2) for name in np.unique(classes)}
    tokens = np.zeros(2)
    for firings in subject.firings(10**6):
        unit = firings.unit
        is_line = _lines(tokenizer, subject.store.tokens(unit.number).ravel())[unit.local]
        tokens += np.bincount(is_line[firings.rows], minlength=2)
        for name, count in counts.items():
            chosen = firings.row[classes[firings.latent] == name]
            count += np.bincount(is_line[chosen], minlength=2)
    return {name: (count / tokens).tolist() for name, count in counts.items()}


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


def planted(work: Path) -> dict[str, Any]:
    """What is found of planted models: directions that both have, or one alone; and the null."""
    made = world(PLANTED_ROWS)
    spine = make_spine(PLANTED_ROWS // 32, 32, np.random.default_rng(1))
    for name, written, codec in (("a", made.a, "blosc"), ("b", made.b, "none")):
        if not (work / f"{name}.zarr").exists():
            bits = rows_of(made.codes, written, ord(name)).bfloat16().view(torch.uint16).numpy()
            size: dict[str, Any] = {"context": 32, "unit": 4096, "chunk": 256, "layer": 3}
            make_store(work / f"{name}.zarr", bits, spine=spine, codec=codec, **size)
    for name, pair in (("planted", "ab"), ("planted_self", "aa")):
        both = ",".join(str(work / f"{letter}.zarr") for letter in pair)
        command(
            *("train", "sae=tiny_crosscoder", "optim=tiny", "sae.d_sae=64", "sae.k=4", "batch=512"),
            *("layer=3", f"store=[{both}]", f"run={work / name}", "tokens=600000"),
        )
    return studied(work / "planted", work / "planted_self")


def studied(run: Path, null: Path) -> dict[str, Any]:
    """What study=diff finds of a run beside its null, and of the null itself."""
    command("analyze", "study=diff", f"run={null}")
    command("analyze", "study=diff", f"run={run}", f"study.null_run={null}")
    kept = ("rows", "documents", "features", "silent", "classes", "cosine", "own")
    results = {}
    for name, folder in (("diff", run), ("self", null)):
        figures = json.loads((folder / "studies" / "diff" / "diff.json").read_text())["figures"]
        results[name] = {key: figures[key] for key in (*kept, "variance_explained")}
    return results


def real(work: Path, layer: int, tokens: int) -> dict[str, Any]:
    """The embedded model and its copy at a layer."""
    stores = {"base": MODEL_DIR, "tuned": work / "tuned"}
    for name, folder in stores.items():
        command(
            *("harvest", f"model.path={folder}", "model.dtype=float32"),
            *(f"text.path={work / 'text.jsonl'}", f"layer={layer}", f"tokens={tokens}"),
            *("context=256", f"store={work / name}.zarr"),
        )
    for name, pair in ((f"diff{layer}", ("base", "tuned")), (f"self{layer}", ("base", "base"))):
        both = ",".join(f"{work / one}.zarr" for one in pair)
        command(
            *("train", "sae=tiny_crosscoder", "optim=tiny", "batch=512", f"store=[{both}]"),
            *(f"layer={layer}", f"run={work / name}"),
        )
    found = studied(work / f"diff{layer}", work / f"self{layer}")
    return {**found, "fires": where_classes_fire(work / f"diff{layer}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="kept; a second start goes on")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10])
    args = parser.parse_args()
    work: Path = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "text.jsonl").exists():
        write_text(work / "text.jsonl", args.tokens // 20)
    if not (work / "tuned" / "chat_template.jinja").exists():
        fine_tuned(work / "tuned", args.steps)
    figures: dict[str, Any] = {"planted": planted(work)}
    figures["loss_base"] = loss_of_the_line(MODEL_DIR)
    figures["loss_tuned"] = loss_of_the_line(work / "tuned")
    for layer in args.layers:
        figures[f"layer_{layer}"] = real(work, layer, args.tokens)
    finish({"steps": args.steps, "tokens": args.tokens}, figures, args.out)


if __name__ == "__main__":
    main()
