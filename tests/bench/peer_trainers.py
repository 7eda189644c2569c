"""Four TopK trainers behind one surface, each in a process of its own: what tests.bench.peers
measures.

A trainer takes its batches from a Meter, which clocks what happens between two of them: a training
step of the library's own code. SAELens runs SAETrainer.fit and sparsify Trainer.fit, whole;
dictionary_learning runs TopKTrainer.update, the body of its trainSAE; ours runs Trainer.step_. All
train in float32.

Settings are each library's own, but for: the learning rate, which is searched for all; warm-up, 5 %
of the run, since 1,000 steps would be longer than it; the decay that each offers (SAELens,
dictionary_learning: linearly to 0 in the last fifth; sparsify-adam and ours: linearly to 0; signum
has none); no logs and no checkpoints. Rows are scaled as each recommends: SAELens and ours to
E||x|| = sqrt(d), dictionary_learning to E||x||^2 = 1, sparsify not at all (its loss is scale-free).
The peers' AuxK stays as each has it: none acts within the first 1,000 steps, and sparsify's is off.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:  # the peers' environments lack what these import
    from residual_saes.train.sae import SAE
    from residual_saes.train.trainer import TrainConfig, Trainer

RECENT = 100_000  # tokens at the end of training; a latent that fires on none of them is dead
_WARM_UP = 3  # steps that no clock counts
_BLOCK, _LONG_BLOCK, _PRODUCTS = (
    5,
    25,
    2,
)  # steps (those of a long run), and then bare products, in turns
_CHUNK = 2048  # rows at a time when the result is measured

# What a trained SAE does with raw rows (n, d): the reconstruction (n, d), and which latents fired
# (F,).
Trained = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """One run of one trainer."""

    trainer: str  # a key of TRAINERS
    d: int  # d_model; of real activations, what the files say
    d_sae: int
    k: int
    batch: int  # rows per step
    tokens: int  # rows to train on; a last, incomplete batch is left out
    lr: float
    seed: int  # of the initial weights and of the order of rows
    activations: str | None  # folder of tests.bench.real_rows; None: planted rows
    quality: bool  # whether the rows of `judged` are measured as well
    ours: tuple[str, ...] = ()  # settings of ours, as optim.lr_floor=0
    judged: str = "heldout"  # or choice: which part

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def warm_up(self) -> int:
        """Steps of the learning rate's warm-up."""
        return max(2, self.steps // 20)


@dataclass(frozen=True)
class Rows:
    """Rows in memory, and what is known of them beforehand: what Trainer asks of
    data.rows.reader.Reader, and more.
    """

    train: Tensor  # (N, d) float32
    held_out: Tensor  # (n, d) float32
    mean: NDArray[np.float64]  # (d,)
    variance: NDArray[np.float64]  # (d,)
    mean_norm: float  # E||x||
    mean_square: float  # E||x||^2

    @property
    def rows(self) -> int:
        return len(self.train)

    @property
    def widths(self) -> list[int]:
        return [self.train.shape[1]]

    @property
    def mean_norms(self) -> list[float]:
        return [self.mean_norm]

    def ordered(self, batch: int, seed: int) -> Iterator[Tensor]:
        """Batches (batch, d) without end, in an order that only the seed decides."""
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=draw)
        numbers = cycle(order[: len(order) // batch * batch].view(-1, batch))
        return (self.train[rows] for rows in numbers)


def load(task: Task) -> Rows:
    """The rows of a task; of real activations no more than it trains on."""
    if task.activations:
        folder = Path(task.activations)
        train = np.load(folder / "train.npy", mmap_mode="r")[: task.tokens]
        judged = np.load(folder / f"{task.judged}.npy", mmap_mode="r")[
            : None if task.quality else 1
        ]
        rows, rest = (
            torch.from_numpy(np.array(part, dtype=np.float32)) for part in (train, judged)
        )
    else:
        few = (
            4 * task.batch
        )  # speed needs no more; quality on planted rows is for trying the bench out
        rows, rest = planted(
            min(task.tokens, 200_000) if task.quality else few, few if task.quality else 1, task
        )
    variance, mean = torch.var_mean(rows, 0, correction=0)
    norms = torch.linalg.vector_norm(rows, dim=1).double()
    square = float(norms.square().mean())
    return Rows(
        rows, rest, mean.double().numpy(), variance.double().numpy(), float(norms.mean()), square
    )


def planted(train: int, held_out: int, task: Task) -> Iterator[Tensor]:
    """Rows (train, d) and (held_out, d) with k-sparse codes: d_sae / 2 directions that fire ever
    more rarely, a mean as long as the rest, and noise of a tenth of it.
    """
    draw = torch.Generator().manual_seed(0)
    directions = nn.functional.normalize(
        torch.randn(task.d_sae // 2, task.d, generator=draw), dim=1
    )
    often = torch.arange(1, len(directions) + 1).rsqrt()
    mean = nn.functional.normalize(torch.randn(task.d, generator=draw), dim=0) * math.sqrt(task.k)
    for count in (train, held_out):
        indices = torch.multinomial(often.expand(count, -1), task.k, generator=draw)
        values = torch.empty(count, task.k).exponential_(generator=draw) / math.sqrt(2)
        codes = nn.functional.embedding_bag(
            indices, directions, mode="sum", per_sample_weights=values
        )
        noise = torch.randn(count, task.d, generator=draw) * (0.1 * math.sqrt(task.k / task.d))
        yield codes.add_(mean).add_(noise)


class Meter:
    """Hands out batches, and clocks what is done between one and the next; in turns with the bare
    encoder product.

    The clock stands while a batch is gathered. The last step, which no next batch follows, is not
    counted.
    """

    def __init__(self, task: Task, batches: Iterator[Tensor]) -> None:
        self._task, self._batches = task, islice(batches, task.steps)
        self._given, self._started = 0, (0.0, 0.0)
        self._block = _LONG_BLOCK if task.steps > 4 * _LONG_BLOCK else _BLOCK
        self._open: list[tuple[float, float]] = []  # CPU and wall seconds of each step of the block
        self.blocks: list[
            tuple[float, float, float]
        ] = []  # CPU and wall seconds a step; CPU seconds a product
        self._weights = torch.randn(
            task.d_sae, task.d
        ).T  # W_enc lies like that in ours and in nn.Linear
        self._x, self._pre = torch.randn(task.batch, task.d), torch.empty(task.batch, task.d_sae)

    def __iter__(self) -> Meter:
        return self

    def __next__(self) -> Tensor:
        now = time.process_time(), time.perf_counter()
        if self._given > _WARM_UP:
            self._open.append((now[0] - self._started[0], now[1] - self._started[1]))
        if len(self._open) == self._block:
            cpu, wall = (statistics.mean(column) for column in zip(*self._open, strict=True))
            self.blocks.append((cpu, wall, self._product_seconds()))
            self._open.clear()
        batch = next(self._batches)
        self._given += 1
        self._started = time.process_time(), time.perf_counter()
        return batch

    def _product_seconds(self) -> float:
        """CPU seconds of one product of a batch with W_enc, after one that is not counted."""
        with torch.no_grad():
            torch.mm(self._x, self._weights, out=self._pre)
            began = time.process_time()
            for _ in range(_PRODUCTS):
                torch.mm(self._x, self._weights, out=self._pre)
        return (time.process_time() - began) / _PRODUCTS

    def figures(self) -> dict[str, float]:
        """Tokens per second, of which the encoder product's share is the limit."""
        if not self.blocks:
            raise ValueError(
                f"{self._task.steps} steps are too few to clock; at least {_WARM_UP + _BLOCK + 2}"
            )
        cpu, wall, product = (statistics.mean(column) for column in zip(*self.blocks, strict=True))
        return {
            "tokens_per_cpu_s": self._task.batch / cpu,
            "tokens_per_wall_s": self._task.batch / wall,
            "encoder_tokens_per_cpu_s": self._task.batch / product,
            "share_of_encoder_limit": statistics.median(
                bare / whole for whole, _, bare in self.blocks
            ),
        }


def ours(task: Task, rows: Rows, meter: Meter) -> Trained:
    """train.trainer.Trainer, under the settings of `sae=rows_32k optim=rows` but for the rate.

    `reference`: under those of `sae=topk_32k optim=adam`, whose floor is .3 of the rate; latents
    are dead after 1/25 of the run, since after 5,000 steps AuxK would never act.
    """
    recipe = ["sae=rows_32k", "optim=rows"]
    if task.trainer == "reference":
        recipe = ["sae=topk_32k", "sae.dead_after=null", f"optim.lr_floor={0.3 * task.lr}"]
    from residual_saes.train.trainer import Trainer

    trainer = Trainer(configured(task, recipe), rows, torch.device("cpu"))
    return applied(trained(trainer, task, rows, meter), task)


def configured(task: Task, recipe: list[str]) -> TrainConfig:
    """Settings of a recipe at a task's size and rate."""
    from hydra import compose, initialize_config_module

    from residual_saes.data.settings import build
    from residual_saes.train import objective
    from residual_saes.train.optim import OptimConfig
    from residual_saes.train.trainer import TrainConfig

    size = [f"sae.d_sae={task.d_sae}", f"sae.k={task.k}", f"sae.k_aux={task.d_sae // 16}"]
    with initialize_config_module("residual_saes.conf", version_base="1.3"):
        composed = compose("train", [*recipe, *size, f"optim.lr={task.lr}", *task.ours])
    sae, optim = dict(composed.sae), dict(composed.optim)
    del sae["name"]
    return TrainConfig(
        layer=0,
        tokens=task.steps * task.batch,
        batch=task.batch,
        seed=task.seed,
        log_every=task.steps,
        sae=build(objective.find(sae["activation"]).settings, "sae", sae),
        optim=build(OptimConfig, "optim", optim),
    )


def trained(trainer: Trainer, task: Task, rows: Rows, batches: Iterable[Tensor]) -> SAE:
    """The SAE on raw rows after all of `batches`."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # as train.loop sets it
    with torch.no_grad():
        if needed := trainer.rows_to_begin:
            first = islice(rows.ordered(task.batch, task.seed), -(-needed // task.batch))
            trainer.begin_(torch.cat(list(first))[:needed])
        for batch in batches:
            trainer.step_(batch)
    return trainer.state.sae.folded(trainer.scale, trainer.state.basis)


def applied(sae: SAE, task: Task) -> Trained:
    """What an SAE of ours does with raw rows."""

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        kept = sae.encode(x)
        return sae.decode(kept), _fired(kept.indices, kept.values, task.d_sae)

    return apply


def saelens(task: Task, rows: Rows, meter: Meter) -> Trained:
    """SAELens 6: TopKTrainingSAE and SAETrainer.fit."""
    saes, config = import_module("sae_lens.saes.topk_sae"), import_module("sae_lens.config")
    trainers = import_module("sae_lens.training.sae_trainer")
    torch.manual_seed(task.seed)
    sparse = task.trainer == "saelens-sparse"
    sae = saes.TopKTrainingSAE(
        saes.TopKTrainingSAEConfig(
            d_in=task.d,
            d_sae=task.d_sae,
            k=task.k,
            normalize_activations="expected_average_only_in",
            # Of the two, its backward pass has only one on a CPU ("Could not run 'aten::view'" with
            # both).
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
        )
    )
    settings = config.SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=task.lr,
        lr_end=task.lr / 10,  # of a schedule that is not in use; there is none for "constant"
        lr_warm_up_steps=task.warm_up,
        lr_decay_steps=task.steps // 5,
    )
    trainer = trainers.SAETrainer(settings, sae, meter)
    some = min(
        50, len(rows.train) // task.batch
    )  # batches; its own estimate would take steps off the meter
    trainer.activation_scaler.estimate_scaling_factor(
        task.d, rows.ordered(task.batch, task.seed), some
    )
    trainer.fit()

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        features = sae.encode(x)
        dense = features.to_dense() if features.is_sparse else features
        return sae.decode(features), (dense > 0).any(0)

    return apply


class _Replay(nn.Module):
    """What sparsify takes for a language model: its one layer puts out the meter's batches."""

    def __init__(self, d: int, meter: Meter) -> None:
        super().__init__()
        self.rows = _ReplayedLayer(d, meter)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(num_hidden_layers=1)

    @property
    def base_model(self) -> _Replay:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        output: Tensor = self.rows(input_ids)
        return output


class _ReplayedLayer(nn.Module):
    def __init__(self, d: int, meter: Meter) -> None:
        super().__init__()
        self._d, self._meter = d, meter

    def forward(self, input_ids: Tensor) -> Tensor:
        """(1, n, d); zeros for the one token by which sparsify asks for the width."""
        return (
            torch.zeros(1, 1, self._d) if input_ids.numel() == 1 else next(self._meter).unsqueeze(0)
        )


def sparsify(task: Task, rows: Rows, meter: Meter) -> Trained:
    """sparsify: SparseCoder and Trainer.fit, on documents of one batch each."""
    config, trainers = import_module("sparsify.config"), import_module("sparsify.trainer")
    with tempfile.TemporaryDirectory() as folder:
        settings = config.TrainConfig(
            config.SparseCoderConfig(num_latents=task.d_sae, k=task.k),
            batch_size=1,
            optimizer=task.trainer.removeprefix("sparsify-"),
            lr=task.lr,
            lr_warmup_steps=task.warm_up,
            hookpoints=["rows"],
            init_seeds=[task.seed],
            save_every=task.steps + 1,
            log_to_wandb=False,
            save_dir=folder,
        )
        documents = [{"input_ids": torch.zeros(task.batch, dtype=torch.long)}] * task.steps
        trainer = trainers.Trainer(settings, documents, _Replay(task.d, meter))
        trainer.fit()
        coder_type = import_module("sparsify.sparse_coder").SparseCoder
        coder = coder_type.load_from_disk(
            f"{folder}/unnamed/rows"
        )  # signum's average, which only the file has

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = coder.encode(x)
        return coder.decode(values, indices), _fired(indices, values, task.d_sae)

    return apply


def dictionary_learning(task: Task, rows: Rows, meter: Meter) -> Trained:
    """dictionary_learning: TopKTrainer.update, with trainSAE's normalize_activations."""
    trainers = import_module("dictionary_learning.trainers.top_k")
    trainer = trainers.TopKTrainer(
        steps=task.steps,
        activation_dim=task.d,
        dict_size=task.d_sae,
        k=task.k,
        layer=0,
        lm_name="",
        lr=task.lr,
        warmup_steps=task.warm_up,
        decay_start=task.steps - task.steps // 5,
        seed=task.seed,
        device="cpu",
    )
    norm = math.sqrt(rows.mean_square)
    for step, batch in enumerate(meter):
        trainer.update(step, batch.div_(norm))
    trainer.ae.scale_biases(norm)

    def apply(x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, features = trainer.ae(x, output_features=True)
        return x_hat, (features > 0).any(0)

    return apply


def _fired(indices: Tensor, values: Tensor, d_sae: int) -> Tensor:
    """(F,) which latents have a positive value."""
    return torch.bincount(indices[values > 0], minlength=d_sae) > 0


# By name: the module that must be there, and the function that trains.
TRAINERS: dict[str, tuple[str, Callable[[Task, Rows, Meter], Trained]]] = {
    "ours": ("residual_saes.train.trainer", ours),
    "reference": ("residual_saes.train.trainer", ours),
    "saelens": ("sae_lens", saelens),
    "saelens-sparse": ("sae_lens", saelens),
    "sparsify-signum": ("sparsify.trainer", sparsify),
    "sparsify-adam": ("sparsify.trainer", sparsify),
    "dictionary_learning": ("dictionary_learning.trainers.top_k", dictionary_learning),
}


def work(task: Task) -> dict[str, Any]:
    """Train once, in this process."""
    torch.set_num_threads(1)
    module, train = TRAINERS[task.trainer]
    import_module(module)
    rows = load(task)
    meter = Meter(task, rows.ordered(task.batch, task.seed))
    before = _memory("VmRSS", reset_peak=True)
    trained = train(task, rows, meter)
    figures = {**meter.figures(), "peak_growth_MiB": _memory("VmHWM") - before}
    return {**figures, **quality(task, rows, trained)} if task.quality else figures


@torch.no_grad()
def quality(task: Task, rows: Rows, trained: Trained) -> dict[str, float]:
    """Variance explained of held-out rows, centred per dimension, and the share of latents dead at
    the end.
    """
    mean = torch.from_numpy(rows.mean).float()
    error = total = 0.0
    for x in torch.split(rows.held_out, _CHUNK):
        error += float((x - trained(x)[0]).double().square().sum())
        total += float((x - mean).double().square().sum())
    fired = torch.zeros(task.d_sae, dtype=torch.bool)
    last = min(task.steps, max(1, RECENT // task.batch))
    for batch in islice(rows.ordered(task.batch, task.seed), task.steps - last, task.steps):
        fired |= trained(batch)[1]
    return {"variance_explained": 1 - error / total, "dead_share": 1 - float(fired.float().mean())}


def _memory(field: str, reset_peak: bool = False) -> float:
    """MiB of a line of /proc/self/status; VmHWM, the peak, from here on if it is reset."""
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
