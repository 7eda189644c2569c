"""What rounding the encoder product's operands costs: `python -m tests.bench.precision
--activations DIR [--out FILE]`.

DIR holds train.npy and heldout.npy, as `python -m tests.bench.real_rows` makes them. Each precision
trains the same SAE on the same batches, once for each seed; a seed decides the initial weights, and
where in train.npy the run begins. What is compared is variance explained of all rows of
heldout.npy, which are encoded in float32 whatever the precision, as `python -m train` does. A
difference is between two runs of one seed, to fp32's; it is given for each seed, and beside it how
much fp32 itself differs from seed to seed.

    fp32        train.matmul=fp32
    fp32_22bit  the control: operands rounded to 22 bits of mantissa, of 23. Top k makes a run
                depend on the last bit, so this differs from fp32 too. A difference no larger is
                not due to the precision.
    tf32        on CUDA train.matmul=tf32. A CPU has no tf32: there operands are rounded to its 10
                bits, to nearest even, and the product is float32. A GPU may round otherwise (cut
                off), and adds up in another order.
    bf16        train.matmul=bf16. On a CPU its sums are rounded to bfloat16 as well, on CUDA they
                stay float32.
    bf16_cuda   on a CPU alone, what CUDA's bf16 is: operands rounded to 7 bits of mantissa, the
                product float32

Left out: speed (tests.bench.train_speed and train_phases have it), other activations than TopK,
AuxK unless --sae names settings with it, and long runs, in which errors might add up: 300,000
tokens are 146 steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.train import product
from residual_saes.train.blocks import Matmul
from residual_saes.train.evaluate import evaluate
from residual_saes.train.kernels import Kept
from residual_saes.train.optim import OptimConfig
from residual_saes.train.sae import SAEConfig
from residual_saes.train.stream import first_rows
from residual_saes.train.trainer import TrainConfig, Trainer
from tests.bench.outcome import finish

CONF = Path(__file__).resolve().parents[2] / "conf"
EMULATED = {"fp32_22bit": 22, "tf32": 10, "bf16_cuda": 7}  # bits of mantissa, by name
_MANTISSA = 23  # bits of float32's
_SHARE = 13  # statistics are of every 13th row
_OFFSET = 433_333  # rows by which a seed's run begins later


def settings(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """The settings in conf/GROUP/NAME.yaml and in what it builds on, but for `changes`."""
    found: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    below: dict[str, Any] = {}
    for base in found.pop("defaults", []):
        if isinstance(base, str):  # else it is an option of another group
            below |= settings(group, base)
    found.pop("name", None)
    return {**below, **found, **changes}


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 `x` with `bits` bits of mantissa, to nearest, ties to even."""
    dropped = _MANTISSA - bits
    raw = x.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((raw >> dropped) & 1)
    return ((raw + half) & -(1 << dropped)).view(torch.float32)


def as_in_training(deterministic: bool = True) -> None:
    """What train.loop sets while it trains; or not deterministic, as torch is by itself."""
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]


class InFile:
    """Rows of a .npy file from one of them on: what Trainer asks of data.rows.reader.Reader."""

    def __init__(self, every: NDArray[np.float32], batch: int) -> None:
        self._every, self._batch, self._first = every, batch, 0
        self.rows = len(every)
        self.widths = [every.shape[1]]
        few = np.asarray(every[::_SHARE])
        self.mean_norms = [float(np.linalg.norm(few, axis=1).mean())]
        self.mean, self.variance = few.mean(0, dtype=np.float64), few.var(0, dtype=np.float64)

    def begin_at(self, row: int) -> None:
        self._first = row

    def batches(self, start: int) -> Iterator[Tensor]:
        while True:
            at = (self._first + start * self._batch) % (self.rows - self._batch + 1)
            yield torch.from_numpy(np.array(self._every[at : at + self._batch]))
            start += 1


def products(precision: str, cuda: bool) -> tuple[Matmul, AbstractContextManager[Any]]:
    """train.matmul, and what must be in place while training, for a precision."""
    if precision not in EMULATED or (precision == "tf32" and cuda):
        return {"fp32": "fp32", "tf32": "tf32", "bf16": "bf16"}[precision], nullcontext()  # type: ignore[return-value]
    bits, encode = EMULATED[precision], product.encode

    def emulated(
        x: Tensor, encoder: Tensor, b_enc: Tensor, k: int, matmul: Matmul = "fp32"
    ) -> Kept:
        return encode(rounded(x, bits), rounded(encoder, bits), b_enc, k, matmul)

    return "fp32", mock.patch.object(product, "encode", emulated)


@torch.no_grad()
def trained(
    precision: str, config: TrainConfig, rows: InFile, held_out: Tensor, device: torch.device
) -> float:
    """Held-out variance explained of one run."""
    trainer = Trainer(config, rows, device)
    if trainer.rows_to_begin:
        trainer.begin_(first_rows(rows, trainer.rows_to_begin))
    with products(precision, device.type == "cuda")[1]:
        for batch in islice(rows.batches(0), trainer.steps):
            trainer.step_(batch)
    evaluation = trainer.evaluation()
    evaluate([evaluation], (held_out[at : at + 4096] for at in range(0, len(held_out), 4096)))
    return float(evaluation.figures()["variance_explained"])


def compared(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """By precision, of each seed's differences to fp32 the mean and the range; and fp32's range
    over the seeds.
    """
    base = found["fp32"]
    figures: dict[str, Any] = {
        "fp32_mean": statistics.mean(base),
        "fp32_range_over_seeds": max(base) - min(base),
    }
    for name, values in found.items():
        if name == "fp32":
            continue
        differences = [value - reference for value, reference in zip(values, base, strict=True)]
        figures |= {
            f"{name}_minus_fp32": statistics.mean(differences),
            f"{name}_minus_fp32_lowest": min(differences),
            f"{name}_minus_fp32_highest": max(differences),
        }
    return figures


def show(figures: dict[str, Any]) -> None:
    """A line for each precision; `finish` would print three decimals."""
    print(
        f"{'held-out variance explained':>30}  {'mean':>9}  {'lowest':>9}  {'highest':>9}"
        "   over the seeds"
    )
    base = figures["variance_explained"]["fp32"]
    print(f"{'fp32':>30}  {figures['fp32_mean']:9.5f}  {min(base):9.5f}  {max(base):9.5f}")
    for name in (name for name in figures if name.endswith("_minus_fp32")):
        lowest, highest = figures[f"{name}_lowest"], figures[f"{name}_highest"]
        print(f"{name:>30}  {figures[name]:+9.5f}  {lowest:+9.5f}  {highest:+9.5f}")
    print(
        f"{'fp32 from seed to seed':>30}  {figures['fp32_range_over_seeds']:9.5f}"
        "  (highest less lowest)"
    )


def measure(asked: argparse.Namespace, precisions: Sequence[str]) -> dict[str, Any]:
    """Every precision with every seed; seed by seed, so that a broken run leaves whole
    comparisons.
    """
    device = torch.device(asked.device)
    every = np.load(asked.activations / "train.npy", mmap_mode="r")
    held_out = torch.from_numpy(np.load(asked.activations / "heldout.npy"))
    if asked.held_out:
        held_out = held_out[: asked.held_out]
    rows = InFile(every, asked.batch)
    sae = SAEConfig(**settings("sae", asked.sae, d_sae=asked.d_sae, k=asked.k))
    optim = OptimConfig(**settings("optim", asked.optim))
    if sae.activation != "topk":
        sys.exit(f"--sae {asked.sae} is {sae.activation}, and this bench knows topk alone")
    found: dict[str, list[float]] = {name: [] for name in precisions}
    for seed in asked.seeds:
        rows.begin_at(seed * _OFFSET)
        for name in precisions:
            began, matmul = time.process_time(), products(name, device.type == "cuda")[0]
            shape: dict[str, Any] = {
                "tokens": asked.tokens,
                "batch": asked.batch,
                "log_every": asked.tokens,
            }
            config = TrainConfig(layer=0, seed=seed, matmul=matmul, sae=sae, optim=optim, **shape)
            found[name].append(trained(name, config, rows, held_out, device))
            took = time.process_time() - began
            said = (
                f"{name} seed {seed}:  variance explained {found[name][-1]:.5f}  {took:.1f} CPU s"
            )
            print(said, file=sys.stderr, flush=True)
    return {**compared(found), "variance_explained": found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.precision")
    parser.add_argument(
        "--activations", type=Path, required=True, help="folder with train.npy and heldout.npy"
    )
    for name, default in (("d_sae", 4096), ("k", 32), ("batch", 2048), ("tokens", 300_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--precisions", nargs="+", choices=["tf32", "bf16", "fp32_22bit", "bf16_cuda"]
    )
    parser.add_argument(
        "--sae", default="rows_32k", help="a file of conf/sae; d_sae and k are this command's"
    )
    parser.add_argument("--optim", default="rows", help="a file of conf/optim")
    parser.add_argument("--held-out", type=int, help="rows to measure on; default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    as_in_training()
    cuda = asked.device == "cuda"
    precisions = [
        "fp32",
        *(asked.precisions or ["fp32_22bit", "tf32", "bf16", *([] if cuda else ["bf16_cuda"])]),
    ]
    figures = measure(asked, precisions)
    shape = {
        name: value
        for name, value in vars(asked).items()
        if name not in ("out", "activations", "precisions")
    }
    show(figures)
    with redirect_stdout(None):
        finish({"activations": asked.activations.name, **shape}, figures, asked.out)


if __name__ == "__main__":
    main()
