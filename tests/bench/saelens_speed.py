"""Text to finished store, against SAELens: `python -m tests.bench.saelens_speed [--out FILE]`.

Both sides get the same documents, tokenizer, random Llama in float32, layer, context and number of
tokens, and as many threads. The clock runs from text to the finished store on disk; imports,
loading the model and a warm-up of a quarter of the tokens are outside it on both sides. Rounds
alternate, each side in a process of its own, so that a busy machine slows both; a ratio is of
tokens/s within one round, and beside it one of CPU seconds, those of child processes included.
`process` is both for a whole process, from its imports on.

Where the sides differ, the difference is SAELens' gain: prompts per batch and buffers are chosen
for it by trial on every model before the rounds, and ours are the defaults; its documents lie in
memory, ours are read from a file; it does not sync its files; it does not keep documents apart.
`saelens_tokens` is also given its tokens ready-made. It has no bfloat16: float16 is as many bytes,
float32 its default. `harvest_two` stores two layers, in which tokens/s count the text once; SAELens
would have to run again.

SAELens may live in another interpreter, named by --saelens-python; where it cannot be imported,
nothing is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.bench.outcome import finish

PROMPTS, BUFFERS = (
    (8, 32),
    (1, 8),
)  # what is tried for SAELens: rows per batch, parts the store is written in
OURS = {"harvest": 1, "harvest_two": 2}  # layers
SAELENS = {
    "saelens_float32": "float32",
    "saelens_float16": "float16",
    "saelens_tokens": "float16",
}


@dataclass(frozen=True)
class Case:
    """A model and how much of it is stored."""

    name: str
    width: int  # d_model
    heads: int
    head_dim: int
    inner: int  # of the MLP
    depth: int  # decoder layers; the last but one is stored, and for two layers the one before it
    tokens: int
    context: int = 128


CASES = (
    Case(
        "thin", width=1024, heads=1, head_dim=32, inner=32, depth=3, tokens=65_536
    ),  # 0.9 MFLOP a token: the writer
    Case("short", width=1024, heads=1, head_dim=32, inner=32, depth=3, tokens=8192),
    Case("long", width=1024, heads=1, head_dim=32, inner=32, depth=3, tokens=499_712),
    Case(
        "middle", width=512, heads=8, head_dim=64, inner=2048, depth=4, tokens=8192
    ),  # 25 MFLOP a token
)


class Spent(NamedTuple):
    """What a run took."""

    seconds: float  # of the clock
    cpu_s: float  # of this process and of the children that it waited for

    @classmethod
    def so_far(cls) -> Spent:
        """Since some moment."""
        return cls(time.perf_counter(), sum(os.times()[:4]))

    def since(self, before: Spent) -> Spent:
        return Spent(self.seconds - before.seconds, self.cpu_s - before.cpu_s)


def save_inputs(folder: Path, case: Case) -> None:
    """The model's folder, and documents.jsonl with a fifth more text than is needed."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from residual_saes.data.tiny import problems
    from residual_saes.data.tiny.embedded import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=case.width,
        intermediate_size=case.inner,
        num_hidden_layers=case.depth,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        head_dim=case.head_dim,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    documents = map(problems.document, problems.problems("train", 0))
    wanted = case.tokens * 6 // 5
    with (folder / "documents.jsonl").open("w") as file:
        while wanted > 0:
            batch = list(islice(documents, 256))
            wanted -= sum(map(len, tokenizer(batch)["input_ids"]))
            file.writelines(json.dumps({"text": text}) + "\n" for text in batch)


def harvest_spent(folder: Path, case: Case, tokens: int, layers: int) -> Spent:
    """What one harvest of ours takes."""
    from residual_saes.data.text.sources import FileText
    from residual_saes.harvest.config import HarvestConfig
    from residual_saes.harvest.loop import harvest
    from residual_saes.harvest.model import ModelConfig, load

    lm = load(ModelConfig(str(folder / "model"), dtype="float32"))
    chosen = tuple(range(case.depth - 1 - layers, case.depth - 1))
    config = HarvestConfig(folder / "ours.zarr", chosen, tokens, case.context)
    began = Spent.so_far()
    store = harvest(config, lm, FileText(folder / "documents.jsonl"))
    spent = Spent.so_far().since(began)
    assert store.rows == tokens
    shutil.rmtree(config.store)
    return spent


def saelens_spent(
    folder: Path, case: Case, tokens: int, arm: str, prompts: int, buffers: int
) -> Spent:
    """What one run of SAELens' runner that stores the same layer takes."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from transformers import AutoTokenizer

    buffers = math.gcd(
        buffers, tokens // (prompts * case.context)
    )  # it writes whole buffers of whole batches
    width_bytes = case.width * torch.finfo(getattr(torch, SAELENS[arm])).bits // 8
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name=str(folder / "model"),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=prompts,
        hook_name=f"model.layers.{case.depth - 2}",
        d_in=case.width,
        training_tokens=tokens,
        context_size=case.context,
        new_cached_activations_path=str(folder / "saelens"),
        shuffle=False,
        dtype=SAELENS[arm],
        device="cpu",
        buffer_size_gb=(tokens // buffers * width_bytes + 0.5) / 1e9,
    )
    texts = [
        json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()
    ]
    documents = Dataset.from_dict({"text": texts})
    if arm == "saelens_tokens":
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        ids = [token for one in tokenizer(texts)["input_ids"] for token in one][
            : tokens + case.context
        ]
        rows = [ids[at : at + case.context] for at in range(0, tokens, case.context)]
        documents = Dataset.from_dict({"tokens": rows}).with_format("torch")
    runner = CacheActivationsRunner(config, override_dataset=documents)
    assert config.n_buffers * config.n_tokens_in_buffer == tokens
    began = Spent.so_far()
    stored = runner.run()
    spent = Spent.so_far().since(began)
    assert len(stored) * case.context == tokens
    del stored, runner
    shutil.rmtree(folder / "saelens")
    return spent


def work(
    arm: str, folder: Path, case: Case, settings: dict[str, int], warm: bool
) -> dict[str, Any]:
    """What a process of one side does: warm up, then measure; or try SAELens' settings and keep the
    fastest; or run once, if not `warm`, for whoever measures the process.
    """

    def spent(tokens: int, prompts: int = 0, buffers: int = 0) -> Spent:
        if arm in OURS:
            return harvest_spent(folder, case, tokens, OURS[arm])
        return saelens_spent(folder, case, tokens, arm, prompts, buffers)

    warm_up = max(case.tokens // 4, max(PROMPTS) * case.context)
    if arm in SAELENS and not settings:
        spent(warm_up, PROMPTS[0], BUFFERS[0])
        pairs = itertools.product(PROMPTS, BUFFERS)
        _, prompts, buffers = min((spent(warm_up, *pair), *pair) for pair in pairs)
        return {"prompts": prompts, "buffers": buffers}
    if not warm:
        spent(case.tokens, **settings)
        return {"threads": torch.get_num_threads()}
    spent(warm_up, **settings)
    return {**spent(case.tokens, **settings)._asdict(), "threads": torch.get_num_threads()}


def ask(
    python: str, arm: str, folder: Path, case: Case, settings: dict[str, int], warm: bool = True
) -> dict[str, Any]:
    """The answer of a process of one side; if not `warm`, with what the whole process took.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    task = json.dumps(
        {
            "arm": arm,
            "folder": str(folder),
            "case": asdict(case),
            "settings": settings,
            "warm": warm,
        }
    )
    began = Spent.so_far()
    done = subprocess.run(
        [python, "-m", "tests.bench.saelens_speed", "--work", task],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{arm} failed:\n{done.stderr[-3000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if not warm:
        answer |= Spent.so_far().since(began)._asdict()
    assert isinstance(answer, dict)
    print(f"{case.name} {arm}: {answer}", file=sys.stderr, flush=True)
    return answer


def measure(case: Case, rounds: int, saelens_python: str) -> dict[str, Any]:
    """Alternate all arms on one model: tokens/s and MB/s of each, and ours over each of
    SAELens'.
    """
    folder = Path(tempfile.mkdtemp())
    try:
        save_inputs(folder, case)
        pythons = {**dict.fromkeys(OURS, sys.executable), **dict.fromkeys(SAELENS, saelens_python)}
        tuned = ask(saelens_python, "saelens_float16", folder, case, {})
        settings = {arm: tuned if arm in SAELENS else {} for arm in pythons}
        answers = []
        whole = []  # of processes that run once
        for _ in range(rounds):
            for kept, warm in ((answers, True), (whole, False)):
                round_ = {}
                for arm in pythons:
                    round_[arm] = ask(pythons[arm], arm, folder, case, settings[arm], warm)
                kept.append(round_)
    finally:
        shutil.rmtree(folder)
    threads = {answer["threads"] for one in answers + whole for answer in one.values()}
    assert len(threads) == 1, f"the sides ran with {threads} threads"
    figures: dict[str, Any] = {"saelens_settings": tuned}
    for arm in pythons:
        rate = statistics.median(case.tokens / one[arm]["seconds"] for one in answers)
        row_bytes = case.width * (4 if SAELENS.get(arm) == "float32" else 2 * OURS.get(arm, 1))
        figures[arm] = {"tokens_per_s": rate, "MB_per_s": rate * row_bytes / 1e6}
        for name, of in (("cpu_s", answers), ("process_cpu_s", whole)):
            figures[arm][name] = statistics.median(one[arm]["cpu_s"] for one in of)
    for arm in SAELENS:
        figures[f"harvest_over_{arm}"] = {
            kind: spread([one[arm][spent] / one["harvest"][spent] for one in of])
            for kind, of, spent in (
                ("clock", answers, "seconds"),
                ("cpu", answers, "cpu_s"),
                ("process_cpu", whole, "cpu_s"),
            )
        }
    return figures


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def without_saelens(python: str) -> str | None:
    """Why this interpreter cannot run SAELens, in one line, or None; and never a download."""
    try:
        done = subprocess.run(
            [python, "-c", "import sae_lens"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return str(error)
    return (
        (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None
    )


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.saelens_speed")
    parser.add_argument(
        "--saelens-python", default=sys.executable, help="an interpreter that has sae-lens"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        task = json.loads(asked.work)
        say(
            json.dumps(
                work(
                    task["arm"],
                    Path(task["folder"]),
                    Case(**task["case"]),
                    task["settings"],
                    task["warm"],
                )
            )
        )
    elif reason := without_saelens(asked.saelens_python):
        say(
            f"skipped: {asked.saelens_python} cannot import sae_lens ({reason}); "
            "give --saelens-python=PYTHON"
        )
    else:
        chosen = [case for case in CASES if case.name in asked.cases]
        figures = {case.name: measure(case, asked.rounds, asked.saelens_python) for case in chosen}
        finish(
            {"rounds": asked.rounds, "cases": [asdict(case) for case in chosen]}, figures, asked.out
        )


if __name__ == "__main__":
    main()
