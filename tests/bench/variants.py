"""Changes of the recipe `sae=rows_32k optim=rows`, one at a time: what docs/method.md says of each.

    python -m tests.bench.real_rows --model minilm --text FILES... --rows 400000 --out minilm
    nice python -m tests.bench.variants --activations minilm --variants topk batchtopk \
        --runs runs.jsonl --out variants.json

A variant's rate is chosen on choice.npy, and its figures are of heldout.npy with three other seeds,
as in tests.bench.method. A seed decides the initial weights and the order of rows, so variants are
compared seed by seed: `gain` is the difference of variance explained to `topk`, the recipe as it
is. `dead_share` is the share of latents that fire on no held-out row, `dense_share` that of latents
that fire on more than a tenth of them. `explained_at_8` is the variance explained where only the 8
largest latents of a row are kept. `explained_by_batch` is that of SAEs with thresholds at L0 = k:
2,048 rows keep their 2,048 k largest, as in training.

What lost is kept here alone, as a subclass of the trainer or of the objective.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residual_saes.data.errors import NonFiniteError
from residual_saes.train import dead, product
from residual_saes.train.kernels import Kept
from residual_saes.train.objective import Main
from residual_saes.train.objectives.hierarchical import Hierarchical
from residual_saes.train.objectives.topk import TopK
from residual_saes.train.sae import SAE
from residual_saes.train.trainer import Trainer
from tests.bench.method import SEEDS, Runs, chosen, judged
from tests.bench.outcome import finish
from tests.bench.peer_trainers import Rows, Task, configured, load, trained
from tests.bench.peers import Figures

RECIPE = ["sae=rows_32k", "optim=rows"]
BUDGETS = (4, 8, 16, 32)  # values of k' at which TopK SAEs are read
_DENSE = 0.1  # of the held-out rows
_ANNEALED = 0.1  # of the run: dictionary_learning, pull request 50
_LEAST_PRODUCT = 0.1  # <w_enc, w_dec> by which an encoder is divided at the least
_FIRST = (3, 4, 5)  # of tests.bench.method's rates: 8e-3, 1.6e-2, 3.2e-2
_CHUNK = 2048  # rows at a time


class Annealed(Trainer):
    """k falls linearly from d_model to k over the first tenth of the run."""

    def step_(self, batch: Tensor) -> dict[str, Any] | None:
        settings = self.config.sae
        left = max(0.0, 1 - self.state.step / (_ANNEALED * self.steps))
        k = settings.k + round((len(self.columns.mean) - settings.k) * left)
        self.objective = replace(self.objective, config=replace(settings, k=k))
        return super().step_(batch)


class Shifted(Trainer):
    """Aligned training, as a projection: w_enc + (1 - <w_enc, w_dec>) w_dec after every step."""

    def step_(self, batch: Tensor) -> dict[str, Any] | None:
        record = super().step_(batch)
        sae = self.state.sae
        products = (sae.encoder * sae.W_dec).sum(1, keepdim=True)
        sae.encoder.add_((1 - products) * sae.W_dec)
        return record


@dataclass(frozen=True)
class Frequent(TopK):
    """TopK with a penalty on what fires often: weight sum_i p_i a_i / sum_i a_i.

    p_i is the share of the batch's rows on which latent i fires, a_i its mean activation; p and the
    denominator are constants of the gradient, since TopK's selection has none.
    """

    weight: float = 0.1

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        found = super().main(sae, centred, target, denominator)
        f = found.kept
        often = dead.firings(f, self.config.d_sae, found.bags) / len(centred)
        penalty = (often[f.indices] * f.values).sum() / f.values.detach().sum()
        return found._replace(loss=found.loss + self.weight * penalty)


@dataclass(frozen=True)
class Aligned(TopK):
    """Aligned training, as a reparameterisation: the encoder is v / <v, w_dec>, and v is learned.

    AuxK works on v itself.
    """

    def main(self, sae: SAE, centred: Tensor, target: Tensor, denominator: float) -> Main:
        return super().main(aligned(sae), centred, target, denominator)


def aligned(sae: SAE) -> SAE:
    """The same latents, each with <w_enc, w_dec> = 1, unless that is below `_LEAST_PRODUCT`."""
    products = (sae.encoder * sae.W_dec).sum(1, keepdim=True)
    return replace(sae, encoder=sae.encoder / products.clamp_min(_LEAST_PRODUCT))


@dataclass(frozen=True)
class Full(Hierarchical):
    """The paper's loss: every j up to k."""

    def budgets(self) -> list[int]:
        return list(range(1, self.config.k + 1))


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe."""

    settings: tuple[str, ...] = ()
    trainer: type[Trainer] = Trainer
    objective: type[TopK] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the objective
    finish: Callable[[SAE], SAE] = lambda sae: sae  # what is done to the trained SAE


VARIANTS = {
    "topk": Variant(),
    "k-annealing": Variant(trainer=Annealed),
    "aligned": Variant(objective=Aligned, finish=aligned),
    "aligned-shifted": Variant(trainer=Shifted),
    "frequency-0.1": Variant(objective=Frequent),
    "batchtopk": Variant(("sae.activation=batchtopk",)),
    "matryoshka": Variant(("sae.activation=matryoshka",)),
    "hierarchical": Variant(("sae.activation=hierarchical", "sae.nested=4")),
    "hierarchical-6": Variant(("sae.activation=hierarchical", "sae.nested=6")),
    "hierarchical-all": Variant(("sae.activation=hierarchical",), objective=Full),
}


def make(task: Task) -> Figures:
    """One run's figures."""
    rows = load(task)
    try:
        figures = judge(finished(task, rows), rows)
    except NonFiniteError:
        figures = {"variance_explained": -math.inf}  # diverged: never the rate that is chosen
    print(task.trainer, f"k {task.k} lr {task.lr:g} seed {task.seed}", figures, flush=True)
    return figures


def finished(task: Task, rows: Rows, recipe: Sequence[str] = RECIPE) -> SAE:
    """The trained SAE of a variant.

    Raises:
        NonFiniteError: training diverged.
    """
    torch.set_num_threads(1)
    variant = VARIANTS[task.trainer]
    config = configured(task, [*recipe, *variant.settings])
    trainer = variant.trainer(config, rows, torch.device("cpu"))
    if variant.objective is not None:
        trainer.objective = variant.objective(config.sae, **variant.arguments)
    every = rows.ordered(task.batch, task.seed)
    sae = trained(trainer, task, rows, (next(every) for _ in range(task.steps)))
    return variant.finish(sae)


@torch.no_grad()
def judge(sae: SAE, rows: Rows) -> Figures:
    """What an SAE makes of the rows that are judged."""
    mean = torch.from_numpy(rows.mean).float()
    budgets = [] if sae.threshold is not None else [k for k in BUDGETS if k < sae.k]
    squares = dict.fromkeys(["mean", "error", "by_batch", *budgets], 0.0)
    counts = torch.zeros(sae.d_sae)
    for x in torch.split(rows.held_out, _CHUNK):
        kept = sae.encode(x)
        counts += dead.firings(kept, sae.d_sae)
        squares["mean"] += _squared(x - mean)
        squares["error"] += _squared(x - sae.decode(kept))
        if sae.threshold is not None:
            most = product.encode_batch(sae.centred(x), sae.encoder, sae.b_enc, sae.k)
            squares["by_batch"] += _squared(x - sae.decode(most))
        for k in budgets:
            values, order = kept.values.view(len(x), -1).topk(k)
            fewer = Kept.even(values, kept.indices.view(len(x), -1).gather(1, order))
            squares[k] += _squared(x - sae.decode(fewer))
    explained = {key: 1 - value / squares["mean"] for key, value in squares.items()}
    often = counts / len(rows.held_out)
    by_batch = {} if sae.threshold is None else {"explained_by_batch": explained["by_batch"]}
    return {
        "variance_explained": explained["error"],
        **by_batch,
        "dead_share": float((often == 0).float().mean()),
        "dense_share": float((often > _DENSE).float().mean()),
        "l0": float(often.sum()),
        **{f"explained_at_{k}": explained[k] for k in budgets},
    }


def _squared(difference: Tensor) -> float:
    return float(difference.double().square().sum())


def table(runs: Runs, tasks: Iterable[Task]) -> Figures:
    """A row for each task, by its variant and k; gains are over `topk` at that k, seed by seed."""
    found: Figures = {}
    for task in tasks:
        lr, tried = chosen(runs, task, _FIRST)
        answers = judged(runs, replace(task, lr=lr))
        name = f"{task.trainer}, k {task.k}"
        found[name] = {"lr": lr, "choice_by_rate": tried, **answers}
        if base := found.get(f"topk, k {task.k}"):
            key = "variance_explained_by_seed"
            found[name]["gain_by_seed"] = np.subtract(answers[key], base[key]).tolist()
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activations", type=Path, required=True, help="folder of the three parts")
    for name, default in (("d_sae", 2048), ("k", 32), ("batch", 1024), ("tokens", 150_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--per-k", nargs="*", type=int, default=[], help="of TopK SAEs beside them")
    parser.add_argument("--runs", type=Path, required=True, help="finished runs, a line each")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    task = Task(
        trainer="",
        d=np.load(asked.activations / "train.npy", mmap_mode="r").shape[1],
        d_sae=asked.d_sae,
        k=asked.k,
        batch=asked.batch,
        tokens=asked.tokens,
        lr=0.0,
        seed=0,
        activations=str(asked.activations.absolute()),
        quality=True,
    )
    shape = {"activations": asked.activations.name, "seeds": SEEDS}
    shape |= {name: getattr(asked, name) for name in ("d_sae", "k", "batch", "tokens")}
    tasks = [replace(task, trainer=name) for name in asked.variants]
    tasks += [replace(task, trainer="topk", k=k) for k in asked.per_k]
    found = table(Runs(asked.runs, make), tasks)
    finish(shape, {"variants": found}, asked.out)


if __name__ == "__main__":
    main()
