"""The studies at the size of the reference's SAE on a CPU: `python -m tests.bench.true_size`.

32,768 latents on rows of width 2,560, and a random language model of that width with 262,144 token
ids. Nothing is trained: what a study finds is worthless, and what it costs is not. Each study runs
as a user runs it, and its output is timed:

    silence_s   the longest stretch in which nothing was printed
    stop_s      from a signal at a random moment to the process' end, the largest of `--stops`
    peak_GB     the largest resident memory, mapped files too
    needs_GB    what the study said beforehand
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from residual_saes.data.durable import make_directory
from tests.bench.outcome import finish

D, F, K, LAYER, LAYERS, VOCABULARY = 2560, 32_768, 128, 1, 3, 262_144
ANSWERS = ["problems=tiny", "answers.questions=48", "answers.new_tokens=8", "answers.batch=16"]
# What each study is given beside run=: less text than by default, in pieces of full size.
STUDIES: dict[str, list[str]] = {
    "quality": [],
    "splice": ["study.tokens=400"],
    "logit_lens": ["study.prompts=3", "study.tokens=48"],
    "reason_score": ["study.words=[the,of]"],
    "catalogue": [],
    "saebench": [],
    "stability": ["study.other={run}_other"],
    "cross_layer": ["study.to={run}_other"],
    "browser": [],
    "gsm8k": ANSWERS,
    "contrast": ANSWERS,
    "stage_gate": ANSWERS,
    "steering": [*ANSWERS, "study.n_random=2", "study.n_shuffled=1", "study.scales=[2]"],
    "report": [],
}


# -- what is measured ------------------------------------------------------------------------------


def language_model(folder: Path) -> None:
    """A random decoder as wide as Gemma 4 E4B and with as many token ids, but of few layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from residual_saes.data.tiny.embedded import MODEL_DIR

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=20,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=2,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    for file in MODEL_DIR.iterdir():
        if file.name.startswith(("tokenizer", "chat")):
            (folder / file.name).write_bytes(file.read_bytes())


def build(root: Path, tokens: int, unit: int) -> None:
    """The language model, a store of its residuals, and two runs on it."""
    from residual_saes.data.store.store import Store
    from residual_saes.train.sae import SAE, SAEConfig
    from tests.analyze.conftest import write_run

    model = root / "model"
    if not (model / "config.json").exists():
        make_directory(model)
        language_model(model)
    store = root / "s.zarr"
    harvest = ["-m", "harvest", f"model.path={model}", "model.dtype=bfloat16", "text=tiny"]
    shape = [f"tokens={tokens}", f"unit={unit}", "context=256", f"layer={LAYER}", "device=cpu"]
    subprocess.run([sys.executable, *harvest, *shape, f"store={store}"], check=True)
    opened = Store.open(store)
    for seed, run in enumerate(("run", "run_other")):
        if not (root / run).exists():
            bits = torch.from_numpy(opened.residuals(LAYER, 0))
            rows = bits.view(torch.bfloat16).float()
            generator = torch.Generator().manual_seed(seed)
            W_dec = torch.randn(F, D, generator=generator)
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            made = SAE.of(W_dec.T.clone(), W_dec, torch.zeros(F), rows.mean(0), K)
            config = SAEConfig(d_sae=F, k=K, k_aux=K, dead_after=1000)
            write_run(root / run, opened, LAYER, config, made)


# -- measuring -------------------------------------------------------------------------------------


class Watched:
    """A command while it runs: when it printed something, and how much memory it took."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        """Start it."""
        self._began = time.monotonic()
        self._times = [self._began]
        self.lines: list[tuple[float, str]] = []
        self.peak_bytes = 0
        self._log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            now = time.monotonic()
            self._times.append(now)
            memory = f"{self._memory('VmRSS') / 1e9:5.2f} GB"
            self.lines.append((now - self._began, f"{memory}  {line.decode().rstrip()}"))

    def _memory(self, name: str) -> int:
        """Bytes by a name of /proc/PID/status; 0 once the process has ended."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+)", status)
        return int(found.group(1)) * 1024 if found else 0

    def wait(self, seconds: float) -> bool:
        """Whether it ended within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                return False
            self.peak_bytes = max(self.peak_bytes, self._memory("VmHWM"))
            time.sleep(0.05)
        self._reader.join()
        self._times.append(time.monotonic())
        with self._log.open("a") as log:
            for at, line in self.lines:
                log.write(f"{at:8.1f} {line}\n")
            log.write(f"{self._times[-1] - self._began:8.1f} exit {self.process.returncode}\n\n")
        return True

    @property
    def seconds(self) -> float:
        return self._times[-1] - self._began

    @property
    def silence(self) -> tuple[float, float]:
        """The longest stretch without a line, and when it began; both in seconds."""
        return max(
            (after - before, before - self._began) for before, after in pairwise(self._times)
        )

    @property
    def needs(self) -> float | None:
        """GB that it said it needs."""
        for _, line in self.lines:
            if found := re.search(r"needs about ([\d.]+) GB", line):
                return float(found.group(1))
        return None


def measure(arguments: list[str], log: Path, stops: int, limit_s: float) -> dict[str, Any]:
    """A command that is stopped `stops` times at random moments, and then let finish."""
    draw = random.Random(0)
    to_end = []
    codes = []
    spans = [5.0]
    for number in range(stops):
        watched = Watched(arguments, log)
        if watched.wait(draw.uniform(4, 4 + 10 * (number + 1))):
            break
        began = time.monotonic()
        watched.process.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
        watched.wait(60)
        to_end.append(time.monotonic() - began)
        codes.append(watched.process.returncode)
        spans.append(watched.seconds)
    watched = Watched(arguments, log)
    if not watched.wait(limit_s):
        watched.process.kill()
        watched.wait(10)
    silence, since = watched.silence
    return {
        "s": round(watched.seconds, 1),
        "exit": watched.process.returncode,
        "silence_s": round(silence, 1),
        "since_s": round(since, 1),
        "stop_s": round(max(to_end), 2) if to_end else None,
        "stopped": codes,
        "peak_GB": round(watched.peak_bytes / 1e9, 2),
        "needs_GB": watched.needs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where to make it and keep it")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--unit", type=int, default=8192)
    parser.add_argument("--studies", nargs="*", default=[*STUDIES])
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of a study, at most")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    make_directory(given.folder)
    build(given.folder, given.tokens, given.unit)
    run = given.folder / "run"
    figures = {}
    for name in given.studies:
        options = [option.format(run=run) for option in STUDIES[name]]
        arguments = ["analyze", f"study={name}", f"run={run}", "device=cpu"]
        arguments += [f"model.path={given.folder / 'model'}", *options]
        figures[name] = measure(arguments, given.folder / f"{name}.log", given.stops, given.limit)
        print(name, figures[name], flush=True)
    shape = {"d_model": D, "d_sae": F, "k": K, "vocabulary": VOCABULARY, "layers": LAYERS}
    finish({**shape, "tokens": given.tokens, "unit": given.unit}, figures, given.out)


if __name__ == "__main__":
    main()
