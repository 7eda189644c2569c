"""What training without settings loses against a search: on a stranger's small models.

    nice python -m tests.bench.own_models --text BOOK.txt --work DIR --out own_models.json

In DIR it trains a GPT-2 and a Llama of width 64 and 96 for a minute or two on the text, harvests
each by `python -m harvest model.path= text.path=` alone, and so the embedded model, which is a
Gemma 4. Then it trains by `python -m train store=` alone, and with the rates and presets of GRID at
the same d_sae, k and batch. Figures are the held-out variance explained of each run. The best of
the grid is chosen on the rows that it is judged by, so the search is flattered.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from tests.bench.outcome import finish

VOCABULARY = 768
STEPS, LR, ROWS, CONTEXT = 600, 4e-3, 16, 64  # of the models' own training
RATES = (0.25, 0.5, 2, 4)  # times the rule's
OLD = ("batchtopk_32k", "topk_32k")  # presets, each at these rates
OLD_RATES = ("3e-3", "1e-2")
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=256,
        n_embd=64,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    ),
}


def make_model(config: Any, text: str, folder: Path) -> None:
    """Train a model and a byte-level tokenizer on some text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    inner.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    adam = torch.optim.AdamW(model.parameters(), LR)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        starts = torch.randint(len(tokens) - CONTEXT, (ROWS, 1))
        batch = tokens[starts + torch.arange(CONTEXT)]
        batch[:, 0] = 0
        adam.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(work: Path, *words: str) -> None:
    """Run one of our commands in a folder."""
    subprocess.run(
        [sys.executable, "-m", f"residual_saes.{words[0]}", *words[1:]], cwd=work, check=True
    )


def outcome(folder: Path) -> dict[str, Any]:
    """Held-out figures and resolved settings of a finished run."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    sae = config["settings"]["sae"]
    return {
        "variance_explained": last["variance_explained"],
        "l0": last["l0"],
        "dead": last["dead_share"],
        "lr": config["lr"],
        **{name: sae[name] for name in ("d_sae", "k", "k_aux")},
        "batch": config["settings"]["batch"],
        "tokens": config["settings"]["tokens"],
    }


def searched(work: Path, name: str, seeds: int) -> dict[str, Any]:
    """Runs by the rule, one a seed, and those of the grid."""
    store, runs = f"store=stores/{name}.zarr", work / "runs" / name
    common = ("device=cpu", store, "log_every=200")
    for seed in range(seeds):
        run(work, "train", *common, f"seed={seed}", f"run=runs/{name}/rule-{seed}")
    rule = [outcome(runs / f"rule-{seed}") for seed in range(seeds)]
    first = rule[0]
    sizes = [f"sae.{size}={first[size]}" for size in ("d_sae", "k", "k_aux")]
    grid: dict[str, Any] = {}
    arms = [(f"lr x {factor}", "batchtopk", first["lr"] * factor) for factor in RATES]
    arms += [(f"{preset} {rate}", preset, float(rate)) for preset in OLD for rate in OLD_RATES]
    for label, preset, rate in arms:
        folder = f"runs/{name}/{label.replace(' ', '_')}"
        words = (f"sae={preset}", *sizes, f"batch={first['batch']}", f"optim.lr={rate:.3g}")
        run(work, "train", *common, *words, f"run={folder}")
        grid[label] = outcome(work / folder)
    best = max(grid, key=lambda label: grid[label]["variance_explained"])
    behind = grid[best]["variance_explained"] - first["variance_explained"]
    return {"rule": rule, "grid": grid, "best": best, "behind": behind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a .txt file")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=[*CONFIGS, "embedded"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for name in asked.models:
        path, text = "embedded", ["text=tiny", "tokens=1e5"]
        if name in CONFIGS:
            path, text = f"models/{name}", [f"text.path={asked.text.resolve()}"]
            make_model(CONFIGS[name], asked.text.read_text(), asked.work / path)
        run(asked.work, "harvest", f"model.path={path}", *text, f"store=stores/{name}.zarr")
        figures[name] = searched(asked.work, name, asked.seeds)
        finish({"text": asked.text.name, "seeds": asked.seeds}, figures, asked.out)


if __name__ == "__main__":
    main()
