"""What a transcoder had best start from: `python -m tests.bench.transcoder_starts --model NAME`.

Rows are what an MLP reads and what it adds to the stream, side by side, in three parts that share
no document (tests.bench.real_rows): of the embedded model's layer 5, or of MiniLM's third block.
Rates are chosen on choice.npy with seed 0, by factors of 2 until the best has a worse one on either
side; figures are of heldout.npy, with three other seeds.

    rows        sae.init=rows: decoder along rows of y, encoder along the same tokens' rows of x
    random      sae.init=random: both random
    sparsify    as sparsify 1.3.3: encoder as nn.Linear draws it, decoder 0
    linear      as nn.Linear draws it, decoder random
    map         decoder random, encoder W_dec M^T by the least-squares map y = x M
    rows-map    decoder along rows of y, encoder W_dec M^T

In all of them b_dec is the mean of y. Those of map have their encoder scaled as sae.init=rows has.
With --skip there is a W_skip; `skip-map` starts it at M, `skip-zero` at 0, both from rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from residual_saes.data.tiny import problems
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.train import kernels, product
from residual_saes.train.evaluate import evaluate
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import SAE, SAEConfig
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.bench.method import rate
from tests.bench.outcome import finish
from tests.bench.real_rows import Model, activations, minilm

STARTS = ("rows", "random", "sparsify", "linear", "map", "rows-map")
SKIPS = ("skip-zero", "skip-map")
SEEDS = (1, 2, 3)
_LAYER = 5  # of the embedded model
_DOCUMENTS = 30_000  # word problems
_MOST_RATES = 8
_JUDGED = 16_384  # rows of each part


class Tapped:
    """A model whose last hidden state is what an MLP reads and what it gives, side by side."""

    def __init__(self, model: Any, reads: torch.nn.Module, gives: torch.nn.Module) -> None:
        self._model = model
        self._taken: dict[str, Tensor] = {}
        reads.register_forward_pre_hook(lambda _, given: self._taken.update(x=given[0]))
        gives.register_forward_hook(lambda _, __, out: self._taken.update(y=out))
        self.config = SimpleNamespace(hidden_size=2 * model.config.hidden_size)

    def __call__(self, **given: Tensor) -> SimpleNamespace:
        self._model(**given)
        return SimpleNamespace(last_hidden_state=torch.cat([self._taken["x"], self._taken["y"]], 2))


def mlp_of_minilm() -> Model:
    """The MLP of the last block that real_rows runs; its output is taken before it is added."""
    found = minilm()
    block = found.model.encoder.layer[-1]
    tapped = Tapped(found.model, block.intermediate.dense, block.output.dense)
    return replace(found, model=tapped)


def mlp_of_embedded() -> Model:
    """The MLP of a layer of the embedded model, behind its norm."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    block = model.model.layers[_LAYER]
    tapped = Tapped(model.model, block.mlp, block.post_feedforward_layernorm)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return Model(tokenizer, tapped, [tokenizer.bos_token_id], [])


MODELS = {"embedded": mlp_of_embedded, "minilm": mlp_of_minilm}


def made(model: str, folder: Path, texts: list[Path], rows: int) -> Path:
    """The folder of the three parts; it is made unless it is there."""
    if not (folder / "choice.npy").exists():
        with tempfile.TemporaryDirectory() as scratch:
            if model == "embedded":
                texts = [Path(scratch) / "problems.jsonl"]
                told = (problems.problem("train", i) for i in range(_DOCUMENTS))
                lines = (json.dumps({"text": problems.document(one)}) for one in told)
                texts[0].write_text("\n".join(lines))
            activations(MODELS[model](), folder, texts, rows)
    return folder


class Rows:
    """Rows (N, 2 d) in memory: what Trainer asks of data.rows.reader.Reader."""

    def __init__(self, every: NDArray[np.float32], batch: int, seed: int) -> None:
        self.every, self.batch, self.rows = torch.from_numpy(every), batch, len(every)
        width = every.shape[1] // 2
        self.widths = [width, width]
        norms = (self.every[:, part].norm(dim=1) for part in (slice(width), slice(width, None)))
        self.mean_norms = [float(norm.mean()) for norm in norms]
        self.mean, self.variance = every.mean(0, dtype=np.float64), every.var(0, dtype=np.float64)
        self._order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))

    def batches(self, start: int) -> Iterator[Tensor]:
        for number in range(start, self.rows // self.batch):
            yield self.every[self._order[number * self.batch : (number + 1) * self.batch]]


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """(d, d_out) the map M of least |x M - y|^2, of centred rows."""
    solution: Tensor = torch.linalg.lstsq(x.double(), y.double()).solution
    return solution.float()


def best_scale_(sae: SAE, x: Tensor, y: Tensor) -> None:
    """Scale the encoder as train.start.from_rows_ does."""
    few, wanted = x[:4096], y[:4096]
    y_hat = kernels.decode(product.encode(few, sae.encoder, sae.b_enc, sae.k), sae.W_dec)
    sae.encoder.mul_((wanted * y_hat).sum() / y_hat.square().sum())


def begin_(start: str, trainer: Trainer, rows: Tensor) -> None:
    """Set the trainer's SAE as the start has it."""
    sae = trainer.state.sae
    assert sae.b_in is not None
    draw = torch.Generator().manual_seed(trainer.config.seed + 1000)
    x, y = trainer.columns.split(trainer.columns.scaled(rows))
    x, y = x - sae.b_in, y - sae.b_dec
    if start in ("sparsify", "linear"):
        bound = 1 / x.shape[1] ** 0.5
        sae.encoder.uniform_(-bound, bound, generator=draw)
        sae.b_enc.uniform_(-bound, bound, generator=draw)
        if start == "sparsify":
            sae.W_dec.zero_()
    elif start in ("map", "rows-map"):
        if start == "rows-map":
            sae.W_dec.copy_(normalize(y[: sae.d_sae], dim=1))
        sae.encoder.copy_(normalize(sae.W_dec @ least_squares(x, y).T, dim=1))
        best_scale_(sae, x, y)
    elif start != "random":
        if start == "skip-map":
            assert sae.W_skip is not None
            sae.W_skip.copy_(least_squares(x, y))
        trainer.begin_(rows)


def explained(start: str, lr: float, seed: int, judged: str, asked: argparse.Namespace) -> Any:
    """Figures of one run."""
    every = np.load(asked.rows / "train.npy", mmap_mode="r")[: asked.tokens]
    reader = Rows(np.array(every), asked.batch, seed)
    init = "rows" if start in ("rows", *SKIPS) else "random"
    sae = SAEConfig(
        d_sae=asked.d_sae,
        k=asked.k,
        k_aux=asked.d_sae // 16,
        aux_coef=1 / 32,
        aux_norm="variance",
        dead_after=None,
        resample=asked.resample,
        init=init,
        kind="transcoder",
        skip=start in SKIPS or asked.skip,
    )
    optim = OptimConfig(lr=lr, lr_floor=0.0, project_every=1, decay="linear", beta1=0.5, beta2=0.99)
    config = TrainConfig(
        layer=_LAYER, site="mlp_in", batch=asked.batch, seed=seed, sae=sae, optim=optim
    )
    with torch.no_grad():
        trainer = Trainer(config, reader, torch.device("cpu"))  # type: ignore[arg-type]
        first = torch.cat(list(islice(reader.batches(0), -(-4096 // asked.batch))))
        begin_(start, trainer, first if len(first) >= asked.d_sae else reader.every[: asked.d_sae])
        for batch in reader.batches(0):
            trainer.step_(batch)
        evaluation = trainer.evaluation()
        held_out = np.load(asked.rows / f"{judged}.npy", mmap_mode="r")[:_JUDGED]
        evaluate([evaluation], torch.split(torch.from_numpy(np.array(held_out)), 4096))
        return trainer.held_out_record(evaluation)


def figures(start: str, asked: argparse.Namespace) -> dict[str, Any]:
    """A start's row of the table, at the rate that explains most of choice.npy."""
    tried: dict[int, float] = {}
    wanted = {4, 5}
    while not wanted <= tried.keys() and len(tried) < _MOST_RATES:
        for step in sorted(wanted - tried.keys()):
            tried[step] = explained(start, rate(step), 0, "choice", asked)["variance_explained"]
        best = max(tried, key=lambda step: tried[step])
        wanted = {best - 1, best + 1}
    records = [explained(start, rate(best), seed, "heldout", asked) for seed in SEEDS]
    values = [record["variance_explained"] for record in records]
    return {
        "lr": rate(best),
        "choice_by_rate": {f"{rate(step):g}": tried[step] for step in sorted(tried)},
        "variance_explained": statistics.mean(values),
        "variance_explained_by_seed": values,
        "dead_share_by_seed": [record["dead_share"] for record in records],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="texts for MiniLM")
    parser.add_argument("--rows", type=Path, required=True, help="folder of the rows")
    for name, default in (("d_sae", 512), ("k", 16), ("batch", 1024), ("tokens", 300_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--starts", nargs="+", choices=(*STARTS, *SKIPS), default=STARTS)
    parser.add_argument("--skip", action="store_true", help="with a W_skip, which starts at 0")
    parser.add_argument("--resample", action="store_true", help="sae.resample=true")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    made(asked.model, asked.rows, asked.text, asked.tokens)
    table: dict[str, Any] = {}
    for start in asked.starts:
        table[start] = figures(start, asked)
        print(start, table[start], flush=True)
    names = ("model", "d_sae", "k", "batch", "tokens", "skip", "resample")
    finish({name: getattr(asked, name) for name in names}, {"starts": table}, asked.out)


if __name__ == "__main__":
    main()
