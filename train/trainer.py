"""One SAE in training: its settings, all that changes, and what a batch does to it.

Nothing here touches a disk. A step is a pure function of the state and the batch, within one recorded environment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from data.errors import NonFiniteError, SettingError
from data.reader import Policy
from train import activations, dead, loss, sae
from train.checkpoint import Checkpoint
from train.evaluate import Evaluation, Fidelity
from train.kernels import Matmul
from train.loss import Losses
from train.optim import Adam, OptimConfig, learning_rate
from train.parallel import Group
from train.sae import SAE, SAEConfig
from train.stream import Rows


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's bits, with the store and the environment."""

    layer: int
    tokens: int | None = None  # kept rows to train on; None: one pass over the store, more: several passes
    batch: int = 4096  # rows per optimizer step
    seed: int = 0  # of the initial weights
    data_seed: int = 0  # of the order of rows; runs that share it share the reading
    log_every: int = 10  # optimizer steps
    eval_every: int = 5_000  # optimizer steps; the end is evaluated in any case
    eval_rows: int = 262_144  # held-out rows per evaluation; all of them at the end
    checkpoint_every: int = 1_000  # optimizer steps; decides no bit, so it may change between starts
    matmul: Matmul = "fp32"  # of the encoder product; everything else is float32
    policy: Policy = field(default_factory=Policy)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("batch", "log_every", "eval_every", "eval_rows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1")
        if self.matmul not in get_args(Matmul):
            raise SettingError(f"train.matmul={self.matmul} must be one of {', '.join(get_args(Matmul))}")
        if self.batch < 2 and self.sae.aux_norm == "variance":
            raise SettingError("batch=1 has no variance to divide by; raise it, or set sae.aux_norm=raw")
        if self.tokens is not None and self.tokens < self.batch:
            raise SettingError(f"tokens={self.tokens} is less than one batch={self.batch}; raise it or lower batch=")

    def steps(self, rows: int) -> int:
        """Optimizer steps of the run; a last, incomplete batch is left out."""
        if self.tokens is None and rows < self.batch:
            raise SettingError(f"batch={self.batch} is more than the {rows} training rows; lower it, or set tokens=")
        return (self.tokens or rows) // self.batch


@dataclass
class State:
    """All that a step changes."""

    step: int  # optimizer steps done
    sae: SAE  # on scaled rows
    adam: Adam
    silent: Tensor  # (F,) tokens since each latent fired

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; a checkpoint holds them all, and `step`."""
        return {**self.sae.tensors(), **self.adam.tensors(), "silent": self.silent}


class Trainer:
    """The pure part: one state, and what a batch does to it."""

    def __init__(self, config: TrainConfig, reader: Rows, device: torch.device, group: Group | None = None) -> None:
        self.config, self.device, self.group = config, device, group or Group()
        _require_divisible(config, self.group.world)
        if config.matmul == "tf32" and device.type != "cuda":
            raise SettingError("train.matmul=tf32 is a precision of CUDA GPUs; on a CPU take fp32 or bf16")
        self.steps = config.steps(reader.rows)
        self.scale = math.sqrt(reader.d_model) / float(reader.mean_norm)  # E||x|| -> sqrt(d), as Gao et al.
        self.mean = torch.from_numpy(reader.mean).to(device) * self.scale
        self.mean_variance = float(reader.variance.mean()) * self.scale**2
        fresh = sae.initial(config.sae, self.mean.float(), config.seed)
        self.activation = activations.activation(config.sae, config.matmul)
        learned = {name: fresh.tensors()[name] for name in self.activation.learned}
        self.state = State(0, fresh, Adam(learned), dead.never_fired(config.sae.d_sae, device))

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint, tensor by tensor into the memory that is there."""
        for name, tensor in self.state.tensors().items():
            tensor.copy_(saved.tensors[name])
        self.state.step = saved.step

    def step_(self, batch: Tensor) -> dict[str, Any] | None:
        """One optimizer step on raw rows (batch, d); its record, if it is one to log.

        Raises:
            NonFiniteError: the loss is NaN or infinite; nothing was changed.
        """
        state, config = self.state, self.config
        x = self.group.share(batch).to(self.device).float() * self.scale
        # Device sync: nonzero must know how many latents are dead.
        dying = dead.dead_latents(state.silent, config.sae.dead_after)
        if state.step == 0:
            self.activation.begin_(state.sae, x - state.sae.b_dec)
        result = loss.losses(self.activation, state.sae, x, dying, config.sae, self.mean_variance, self.group)
        # Device sync, once a step: one NaN would spoil every weight in one update.
        value = self.group.mean_(result.loss).item()
        if not math.isfinite(value):
            raise NonFiniteError(_blame(batch, state.step, value))
        for gradient in result.gradients.values():
            self.group.mean_(gradient)
        lr = learning_rate(state.step, self.steps, config.optim)
        state.adam.step_(result.gradients, lr)
        self.activation.after_(state.sae, result.kept)
        state.step += 1
        if state.step % config.optim.project_every == 0 or state.step == self.steps:
            state.sae.project_()
        dead.count_(state.silent, self.group.sum_(dead.firings(result.kept, config.sae.d_sae)), len(batch))
        if state.step % config.log_every == 0 or state.step in (1, self.steps):
            return self._record(x, result, value, len(dying), lr)
        return None

    def _record(self, x: Tensor, result: Losses, value: float, dead_count: int, lr: float) -> dict[str, Any]:
        """Figures of the batch just trained on, from before its update, on raw rows."""
        fidelity = Fidelity(self.mean, self.config.sae.d_sae, self.scale)
        fidelity.add(x, result.error, result.kept)
        fidelity.over_(self.group)
        return {
            "split": "train",
            **self._position(),
            "loss": value,
            "aux_loss": self.group.mean_(result.aux).item(),  # Device sync, in steps that are logged
            **fidelity.figures(),
            "dead": dead_count,
            "dead_share": dead_count / self.config.sae.d_sae,
            "lr": lr,
        }

    def evaluation(self) -> Evaluation:
        """Of held-out rows: all of them at the end, `eval_rows` before."""
        limit = None if self.state.step == self.steps else self.config.eval_rows
        return Evaluation(self.state.sae, self.mean, self.scale, limit)

    def held_out_record(self, evaluation: Evaluation) -> dict[str, Any]:
        """The record of a finished evaluation."""
        dead_count = len(dead.dead_latents(self.state.silent, self.config.sae.dead_after))
        share = dead_count / self.config.sae.d_sae
        figures = evaluation.figures()
        return {"split": "held_out", **self._position(), **figures, "dead": dead_count, "dead_share": share}

    def _position(self) -> dict[str, int]:
        return {"step": self.state.step, "tokens": self.state.step * self.config.batch}


def _require_divisible(config: TrainConfig, world: int) -> None:
    if config.batch % world:
        raise SettingError(f"batch={config.batch} cannot be shared evenly by {world} processes; make it a multiple")
    if world > 1 and config.sae.activation != "topk":
        raise SettingError(
            f"sae.activation={config.sae.activation} looks at a whole batch, so {world} processes cannot share it; "
            "train it on one, or sweep with -m, which gives every process its own arms"
        )


def _blame(batch: Tensor, number: int, value: float) -> str:
    """Where a loss that is not finite comes from, and what to do."""
    bad = (~torch.isfinite(batch).all(1)).nonzero()
    if len(bad):
        return (
            f"batch {number} holds NaN or infinity, first in row {int(bad[0])} of {len(batch)} ({len(bad)} such rows); "
            "stopped before the step; `python -m harvest action=verify` names the unit"
        )
    return (
        f"the loss is {value} at batch {number} though all its {len(batch)} rows are finite: training diverged; "
        "stopped before the step; start another run with a lower optim.lr="
    )
