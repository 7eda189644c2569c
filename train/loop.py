"""Training one SAE on one layer's stream of rows.

All that changes is in one State. A run that was killed and started again ends with the same bits, metrics included,
as one that was not, within one recorded environment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import durable, records
from data.errors import NonFiniteError, SettingError, StopRequest, StoreError
from data.journal import Metrics, Progress, duration, read_metrics, tell
from data.reader import Policy
from train import activations, checkpoint, dead, export, loss, run, sae
from train.checkpoint import Checkpoint
from train.evaluate import Fidelity, evaluate
from train.loss import Losses
from train.optim import Adam, OptimConfig, learning_rate
from train.sae import SAE, SAEConfig


class Rows(Protocol):
    """What training needs of data.reader.Reader."""

    rows: int  # kept training rows in one pass
    d_model: int
    mean_norm: float  # E||x|| over them
    mean: NDArray[np.float64]  # (d,)
    variance: NDArray[np.float64]  # (d,)

    def batches(self, start: int) -> Iterator[Tensor]:
        """Batch number `start` and all later ones, each (batch, d)."""
        ...


class Following(Protocol):
    """How a run and the harvest that it follows wait for each other: data.reader.RingFollower."""

    span: int | None  # units per round; None: the store is whole

    def require(self, rows: int) -> None:
        """Raise SettingError if there are not as many."""
        ...

    def begin(self, batch: int) -> None:
        """Everything from batch number `batch` on is needed."""
        ...

    def round(self, batch: int) -> int:
        """The round in which a batch begins; a checkpoint is saved in each."""
        ...

    def wait(self, batch: int, stop: StopRequest) -> None:
        """Come back when a batch can be read, or a signal came."""
        ...

    def release(self, batch: int) -> None:
        """Nothing before batch number `batch` is needed any more."""
        ...

    def finish(self) -> None:
        """Nothing is needed any more."""
        ...


class Whole:
    """Following nobody: the store is whole, and stays."""

    span: int | None = None

    def require(self, rows: int) -> None:
        pass

    def begin(self, batch: int) -> None:
        pass

    def round(self, batch: int) -> int:
        return 0

    def wait(self, batch: int, stop: StopRequest) -> None:
        pass

    def release(self, batch: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(frozen=True)
class Stream:
    """One layer's rows, as one run reads them."""

    identity: str  # digest of the store
    reader: Rows
    held_out: Callable[[], Iterator[Tensor]]  # (n, d) batches of all held-out rows
    following: Following = field(default_factory=Whole)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's bits, with the store and the environment."""

    layer: int
    tokens: int | None = None  # kept rows to train on; None: one pass over the store, more: several passes
    batch: int = 4096  # rows per optimizer step
    seed: int = 0  # of the initial weights and of the order of rows
    log_every: int = 10  # optimizer steps
    eval_every: int = 5_000  # optimizer steps; the end is evaluated in any case
    eval_rows: int = 262_144  # held-out rows per evaluation; all of them at the end
    checkpoint_every: int = 1_000  # optimizer steps; decides no bit, so it may change between starts
    policy: Policy = field(default_factory=Policy)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("batch", "log_every", "eval_every", "eval_rows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1")
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

    def __init__(self, config: TrainConfig, reader: Rows, device: torch.device) -> None:
        self.config, self.device = config, device
        self.steps = config.steps(reader.rows)
        self.scale = math.sqrt(reader.d_model) / float(reader.mean_norm)  # E||x|| -> sqrt(d), as Gao et al.
        self.mean = torch.from_numpy(reader.mean).to(device) * self.scale
        self.mean_variance = float(reader.variance.mean()) * self.scale**2
        fresh = sae.initial(config.sae, self.mean.float(), config.seed)
        self.activation = activations.activation(config.sae)
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
        x = batch.to(self.device).float() * self.scale
        # Device sync: nonzero must know how many latents are dead.
        dying = dead.dead_latents(state.silent, config.sae.dead_after)
        if state.step == 0:
            self.activation.begin_(state.sae, x - state.sae.b_dec)
        result = loss.losses(self.activation, state.sae, x, dying, config.sae, self.mean_variance)
        # Device sync, once a step: one NaN would spoil every weight in one update.
        value = result.loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(_blame(batch, state.step, value))
        lr = learning_rate(state.step, self.steps, config.optim)
        state.adam.step_(result.gradients, lr)
        self.activation.after_(state.sae, result.kept)
        state.step += 1
        if state.step % config.optim.project_every == 0 or state.step == self.steps:
            state.sae.project_()
        dead.count_(state.silent, result.kept)
        if state.step % config.log_every == 0 or state.step in (1, self.steps):
            return self._record(x, result, value, len(dying), lr)
        return None

    def _record(self, x: Tensor, result: Losses, value: float, dead_count: int, lr: float) -> dict[str, Any]:
        """Figures of the batch just trained on, from before its update, on raw rows."""
        fidelity = Fidelity(self.mean, self.config.sae.d_sae, self.scale)
        fidelity.add(x, result.error, result.kept)
        return {
            "split": "train",
            **self._position(),
            "loss": value,
            "aux_loss": result.aux.item(),  # Device sync, in steps that are logged
            **fidelity.figures(),
            "dead": dead_count,
            "dead_share": dead_count / self.config.sae.d_sae,
            "lr": lr,
        }

    def evaluate(self, rows: Iterator[Tensor]) -> dict[str, Any]:
        """Figures of held-out rows: all of them at the end, `eval_rows` before."""
        state, limit = self.state, None if self.state.step == self.steps else self.config.eval_rows
        figures = evaluate(state.sae, rows, self.mean, self.scale, limit)
        dead_count = len(dead.dead_latents(state.silent, self.config.sae.dead_after))
        share = dead_count / self.config.sae.d_sae
        return {"split": "held_out", **self._position(), **figures, "dead": dead_count, "dead_share": share}

    def _position(self) -> dict[str, int]:
        return {"step": self.state.step, "tokens": self.state.step * self.config.batch}


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


@contextmanager
def _deterministic() -> Iterator[None]:
    """Only deterministic algorithms; the former setting comes back."""
    fill = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every torch.empty here is written first
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fill.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def train(
    config: TrainConfig, stream: Stream, folder: Path, device: torch.device, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Train, or go on training, in `folder`; the final held-out record.

    Args:
        facts: written to config.yaml beside the settings.

    Raises:
        Interrupted: a signal came; a checkpoint is saved.
        MismatchError: `folder` holds a run with other settings or another store.
        NonFiniteError: a loss was not finite.
    """
    busy = f"another process is training in {folder}; wait for it, or choose another run="
    with durable.locked(folder, busy), _deterministic(), torch.no_grad(), StopRequest() as stop:
        durable.make_directory(folder / run.CHECKPOINTS)
        trainer = Trainer(config, stream.reader, device)
        tokens = trainer.steps * config.batch
        stream.following.require(tokens)
        order = {"span": stream.following.span} if stream.following.span else {}
        settings = {"store": {"identity": stream.identity, **order}, **asdict(config), "tokens": tokens}
        del settings["checkpoint_every"]
        shown = {**(facts or {}), "scale": trainer.scale, "steps": trainer.steps}
        for line in run.agree(folder, settings, shown, run.environment(device)):
            tell(line)
        saved = _resume(folder, records.digest(settings))
        if _is_finished(folder):
            stream.following.finish()
            tell(f"{folder} is finished: {folder / export.FILE} is there, nothing to do")
            return read_metrics(folder / run.METRICS)[-1]
        if saved:
            trainer.restore(saved)
            tell(f"going on from step {saved.step:,} of {trainer.steps:,}")
        stream.following.begin(checkpoint.oldest(folder / run.CHECKPOINTS))
        with closing(Metrics(folder / run.METRICS, saved.metrics_bytes if saved else 0)) as metrics:
            durable.sync_directory(folder)
            _run(trainer, stream, metrics, stop, folder, records.digest(settings))
        path = export.write_final(trainer.state.sae, trainer.scale, folder)
        stream.following.finish()
        final = read_metrics(folder / run.METRICS)[-1]
        tell(
            f"wrote {path}: held-out variance explained {final['variance_explained']:.4f}, "
            f"dead {final['dead_share']:.1%} of {config.sae.d_sae:,} latents"
        )
        return final


def _is_finished(folder: Path) -> bool:
    """Whether the final SAE is there; a damaged one is exported again from the last checkpoint."""
    try:
        sae.load(folder / export.FILE)
    except StoreError:
        return False
    return True


def _resume(folder: Path, settings: str) -> Checkpoint | None:
    saved, passed_over = checkpoint.latest(folder / run.CHECKPOINTS)
    for name in passed_over:
        tell(f"checkpoint {name} is damaged and passed over")
    if saved and saved.settings != settings:
        raise StoreError(f"{folder / run.CHECKPOINTS} holds checkpoints of another run; choose another run=")
    return saved


def _run(trainer: Trainer, stream: Stream, metrics: Metrics, stop: StopRequest, folder: Path, settings: str) -> None:
    """Steps N + 1 times, so that the last boundary, where there is no batch any more, is like the others."""
    config, state, steps, following = trainer.config, trainer.state, trainer.steps, stream.following
    start, progress, began = state.step, Progress(), time.monotonic()
    with (
        closing(stream.reader.batches(start)) as batches,  # type: ignore[type-var]
        closing(Metrics.continued(folder / run.TIMINGS)) as timings,
    ):
        while True:
            last = state.step == steps
            fresh = state.step > start  # what was due at the boundary where a run goes on has been done there
            entered = fresh and following.round(state.step) != following.round(state.step - 1)
            due = fresh and (last or entered or state.step % config.checkpoint_every == 0)
            if fresh and (last or state.step % config.eval_every == 0):
                metrics.write(trainer.evaluate(stream.held_out()))
            if due:
                _save(state, following, metrics, folder, settings)
            if last:
                break
            following.wait(state.step, stop)  # behind the checkpoint, on which what is waited for may depend
            if stop.signum is not None:
                if fresh and not due:
                    _save(state, following, metrics, folder, settings)
                stop.check()
            if record := trainer.step_(next(batches)):
                metrics.write(record)
                speed = (state.step - start) / (time.monotonic() - began)
                timings.write({"step": state.step, "tokens_per_s": round(speed * config.batch)})
                progress.show(_line(record, steps, speed, config.batch), last=state.step == steps)


def _save(state: State, following: Following, metrics: Metrics, folder: Path, settings: str) -> None:
    """Save a checkpoint; what no kept one needs is free from then on."""
    moment = Checkpoint(state.step, metrics.sync(), settings, state.tensors())
    checkpoint.save(folder / run.CHECKPOINTS, moment)
    following.release(checkpoint.oldest(folder / run.CHECKPOINTS))


def _line(record: Mapping[str, Any], steps: int, steps_per_s: float, batch: int) -> str:
    left = (steps - record["step"]) / steps_per_s
    return (
        f"step {record['step']:,}/{steps:,}  {record['tokens']:,} tokens  "
        f"variance explained {record['variance_explained']:.4f}  mse {record['mse']:.4g}  l0 {record['l0']:.1f}  "
        f"dead {record['dead_share']:.1%}  lr {record['lr']:.2g}  {steps_per_s * batch:,.0f} tokens/s  "
        f"{duration(left)} left"
    )
