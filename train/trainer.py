"""One SAE in training: its settings, all that changes, and what a batch does to it.

Nothing here touches a disk. A step is a pure function of the state and the batch, within one
recorded environment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from residual_saes.data import order
from residual_saes.data.errors import NonFiniteError, SettingError
from residual_saes.data.rows.reader import Reader
from residual_saes.data.rows.split import Policy
from residual_saes.data.site import RESID_POST
from residual_saes.train import dead, objective, refit, sae, start
from residual_saes.train.blocks import Matmul
from residual_saes.train.checkpoint import Checkpoint
from residual_saes.train.columns import Columns
from residual_saes.train.evaluate import Evaluation, Fidelity
from residual_saes.train.objective import Losses
from residual_saes.train.optim import Adam, OptimConfig, learning_rate, resolved
from residual_saes.train.parallel import Group
from residual_saes.train.ports import Ports, ports_of
from residual_saes.train.sae import SAE, SAEConfig, in_files, recorded
from residual_saes.train.view import Shared, View

_VERIFY = "`python -m harvest action=verify` names the unit"
_DEAD_AFTER = 10_000_000  # tokens, at most
_DEAD_PERIODS = (
    8  # of a latent of average frequency, at least: by chance one in 3,000 is silent so long
)
_DEAD_BATCHES = 2  # at least: what one batch leaves out is chance
_AUX_CHOICE = 4  # times k_aux: dead latents of which AuxK takes k_aux in a step
_RESAMPLE_AFTER = 3  # times dead_after without firing: AuxK is tried first
_RESAMPLE_UNTIL = 0.8  # of the run: what restarts later has no time to learn


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's bits, with the store and the environment."""

    layer: int | tuple[int, ...]  # several in a crosscoder
    # Kept rows to train on. None: one pass over the store; more than it has: several passes.
    tokens: int | None = None
    batch: int = 4096  # rows per optimizer step
    seed: int = 0  # of the initial weights
    data_seed: int = 0  # of the order of rows; runs that share it share the reading
    log_every: int = 10  # optimizer steps
    eval_every: int = 5_000  # optimizer steps; the end is evaluated in any case
    eval_rows: int = 262_144  # held-out rows per evaluation; all of them at the end
    checkpoint_every: int = 1_000  # optimizer steps; decides no bit, so it may change
    matmul: Matmul = "fp32"  # of the encoder product; everything else is float32
    policy: Policy = field(default_factory=Policy)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    site: str | tuple[str, ...] = RESID_POST  # what is read of each layer; several in a crosscoder
    stores: int = 1  # of which a crosscoder reads the same hook points
    start: str | None = None  # digest of the SAE that training starts from (train/warm.py)
    # What runs had before those settings were there, and do not record.
    LATER: ClassVar[Mapping[str, Any]] = {"site": RESID_POST, "stores": 1, "start": None}

    def __post_init__(self) -> None:
        assert self.ports  # a SettingError where there are none of these settings
        for name in ("batch", "log_every", "eval_every", "eval_rows", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1")
        if self.matmul not in get_args(Matmul):
            raise SettingError(
                f"train.matmul={self.matmul} must be one of {', '.join(get_args(Matmul))}"
            )
        if self.batch < 2 and self.sae.aux_norm == "variance":
            raise SettingError(
                "batch=1 has no variance to divide by; raise it, or set sae.aux_norm=raw"
            )
        if self.tokens is not None and self.tokens < self.batch:
            raise SettingError(
                f"tokens={self.tokens} is less than one batch={self.batch}; "
                "raise it or lower batch="
            )

    @property
    def ports(self) -> Ports:
        """The hook points that the dictionary reads and writes."""
        layers = (self.layer,) if isinstance(self.layer, int) else self.layer
        sites = (self.site,) if isinstance(self.site, str) else self.site
        return ports_of(self.sae.kind, layers, sites, self.sae.target, self.stores)

    def recorded(self) -> dict[str, Any]:
        """What a run records: settings that came later, only where they differ from before."""
        values = recorded(self, self.LATER)
        for name in ("layer", "site"):
            if isinstance(values.get(name), tuple):
                values[name] = list(values[name])
        return {
            **values,
            "sae": self.sae.recorded(),
            "optim": self.optim.recorded(),
            "policy": self.policy.recorded(),
        }

    def steps(self, rows: int) -> int:
        """Optimizer steps of the run; a last, incomplete batch is left out."""
        if self.tokens is None and rows < self.batch:
            raise SettingError(
                f"batch={self.batch} is more than the {rows} training rows; "
                "lower it, or set tokens="
            )
        return (self.tokens or rows) // self.batch


@dataclass
class State:
    """All that a step changes."""

    step: int  # optimizer steps done
    sae: SAE  # on scaled rows
    adam: Adam
    silent: Tensor  # (F,) tokens since each latent fired
    restarted: Tensor | None = None  # (F,) tokens since each latent was resampled
    basis: Tensor | None = None  # (d, d) orthogonal; the SAE works on scaled rows times this

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; a checkpoint holds them all, and `step`."""
        more = {"restarted": self.restarted, "basis": self.basis}
        there = {name: tensor for name, tensor in more.items() if tensor is not None}
        own = in_files({**self.sae.parameters(), **self.adam.tensors()})
        return {**own, "silent": self.silent, **there}


class Trainer:
    """The pure part: one state, and what a batch does to it."""

    def __init__(
        self, config: TrainConfig, reader: Reader, device: torch.device, group: Group | None = None
    ) -> None:
        self.config = config
        self.device = device
        self.group = group or Group()
        _require_divisible(config, self.group.world)
        if config.matmul == "tf32" and device.type != "cuda":
            raise SettingError(
                "train.matmul=tf32 is a precision of CUDA GPUs; on a CPU take fp32 or bf16"
            )
        self.steps = config.steps(reader.rows)
        self.columns = Columns.of(config.ports, reader, config.sae.scale_rows, device)
        self.mean_variance = self.columns.mean_variance(reader)
        self.objective = objective.find(config.sae.activation)(config.sae, config.matmul)
        b_in, b_dec = self.columns.split(self.columns.mean.float())
        own = None if self.columns.ports.is_autoencoder else b_in
        fresh = self.objective.started(sae.initial(config.sae, b_dec, config.seed, own))
        self.optim = resolved(config.optim, config.sae.d_sae, self.steps)
        self.dead_after = dead_after(config.sae, self.steps, config.batch)
        learned = self.objective.parameters(fresh)
        silent = dead.fresh_counters(config.sae.d_sae, device)
        if self.optim.first_step == 0:  # as if each latent had fired in the first batch
            silent -= config.batch
        self.state = State(0, fresh, Adam(learned, self.optim), silent)
        if config.sae.resample:
            self.state.restarted = torch.zeros_like(silent)
        if config.sae.rotate:
            self.state.basis = torch.eye(len(self.columns.mean), device=device)
        self._look()
        self.as_is: SAE | None = None  # what training started from, until it is evaluated

    @property
    def scale(self) -> float | Tensor:
        """What rows are multiplied by in training; (c,) where hook points differ in it."""
        return self.columns.scale(self.columns.ports.every)

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint, tensor by tensor into the memory that is there."""
        for name, tensor in self.state.tensors().items():
            tensor.copy_(saved.tensors[name])
        self.state.step = saved.step
        self._look()

    def _look(self) -> None:
        """See batches in the basis that the state has now."""
        self.view = View(self.columns, self.state.basis, self.config.sae.d_sae)

    @property
    def rows_to_begin(self) -> int:
        """Rows that `begin_` needs; 0: it is not to be called."""
        needed = start.rows_needed(self.config.sae, len(self.columns.mean))
        if self.config.start is not None:
            needed = max(needed, refit.ROWS)
        return min(needed, self.steps * self.config.batch)

    def begin_(self, first: Tensor) -> None:
        """Set basis, directions, the encoder's scale and b_dec by rows.

        Args:
            first: (rows_to_begin, c) the stream's first raw rows.

        Raises:
            NonFiniteError: some are NaN or infinite.
        """
        state = self.state
        config = self.config.sae
        x, y = self.columns.split(self._finite(first))
        if config.init == "kaiming":
            state.sae.b_dec.copy_(start.geometric_median(y))
        target = y - state.sae.b_dec
        if state.basis is not None:
            state.basis.copy_(start.principal_axes(target))
            target = target @ state.basis
            state.sae.b_dec.copy_(state.sae.b_dec @ state.basis)
            self._look()
        centred = target if state.sae.b_in is None else x - state.sae.b_in
        if config.init == "rows":
            start.from_rows_(state.sae, centred, target, whiten=state.basis is not None)
        if config.init == "map":
            start.by_map_(state.sae, centred, target)

    def begin_from_(self, named: SAE, first: Tensor) -> str:
        """Set all weights to those of an SAE on raw rows, made right for these; what was done.

        Args:
            first: as in `begin_`.

        Raises:
            NonFiniteError: as `begin_`.
        """
        state = self.state
        rows = self._finite(first)
        found = refit.refit(named.to(self.device), self.columns, rows[: refit.ROWS], self.objective)
        x, _ = self.columns.split(rows[: refit.ROWS])
        begun = found.sae
        if state.basis is not None:
            state.basis.copy_(start.principal_axes(rows - self.columns.mean.float()))
            begun = begun.folded(1.0, state.basis.T)
            x = x @ state.basis
            self._look()
        for name, tensor in begun.parameters().items():
            if name != "threshold":
                getattr(state.sae, name).copy_(tensor)
        if begun.threshold is None:
            self.objective.begin_(state.sae, state.sae.centred(x))
        else:
            self.objective.take_(state.sae, begun.threshold)
        self.as_is = found.as_is
        return found.told

    def _finite(self, first: Tensor) -> Tensor:
        """The stream's first rows, scaled. Raises NonFiniteError if some are NaN or infinite."""
        if bad := len(first) - int(torch.isfinite(first).all(1).sum()):
            raise NonFiniteError(
                f"{bad} of the {len(first)} rows to begin with hold NaN or infinity; {_VERIFY}"
            )
        return self.columns.scaled(first)

    def step_(self, batch: Tensor, shared: Shared | None = None) -> dict[str, Any] | None:
        """One optimizer step on raw rows (batch, c); its record, if it is one to log.

        Args:
            shared: what other arms of these rows made of them, for them to share.

        Raises:
            NonFiniteError: the loss is NaN or infinite; nothing was changed.
        """
        state = self.state
        config = self.config

        # The rows: this process's share, scaled, in the basis.
        rows, turned = self.view.of(self.group.share(batch), shared)
        x, y = self.columns.split(turned)

        # Losses and gradients. Device sync: nonzero must know how many latents are dead.
        dying = dead.dead_latents(state.silent, self.dead_after)
        if state.step == 0 and config.start is None:
            self.objective.begin_(state.sae, state.sae.centred(x))
        learning = dying
        if config.sae.bound_dead:
            learning = dead.in_turns(dying, _AUX_CHOICE * config.sae.k_aux, state.step)
        result = objective.losses(
            self.objective, state.sae, x, y, learning, self.mean_variance, self.group
        )

        # Stop before one NaN spoils every weight. Device sync, once a step.
        value = self.group.mean_(result.loss).item()
        if not math.isfinite(value):
            raise NonFiniteError(_blame(batch, state.step, value))

        # The update.
        for gradient in result.gradients.values():
            self.group.mean_(gradient)
        lr = learning_rate(state.step, self.steps, self.optim)
        state.adam.step_(result.gradients, lr)
        self.objective.after_(state.sae, result.kept)
        state.step += 1

        # Count tokens since each latent fired, and restart those that are dead for long.
        dead.count_(state.silent, result.fired, len(batch))
        if state.restarted is not None:
            self.resample_(x, result.error, len(batch))

        # Decoder directions have norm 1, in any case at the end.
        number = state.step - 1 + self.optim.first_step
        if number % self.optim.project_every == 0 or state.step == self.steps:
            state.sae.project_()
        if state.step % config.log_every == 0 or state.step in (1, self.steps):
            return self._record(rows, result, value, len(dying), lr)
        return None

    def resample_(self, x: Tensor, error: Tensor, tokens: int) -> None:
        """Restart latents that did not fire since their last restart, in the run's first 80 %.

        Args:
            x: (n, d) what was read of the batch just trained on.
            error: (n, d_out) of that batch.
            tokens: rows of that batch.
        """
        state = self.state
        assert state.restarted is not None
        state.restarted.add_(tokens)
        if state.step >= _RESAMPLE_UNTIL * self.steps:
            return
        # Device sync, once a step: how many are to be restarted.
        quiet = torch.minimum(state.silent, state.restarted)
        latents = dead.dead_latents(quiet, _RESAMPLE_AFTER * self.dead_after)
        if len(latents):
            count = max(len(error), len(latents))
            # Device sync: the draw's copy.
            drawn = order.permutation(count, self.config.seed, state.step) % len(error)
            draw = torch.from_numpy(drawn[: len(latents)]).to(error.device)
            read = None if state.sae.b_in is None else state.sae.centred(x)
            dead.resample_(state.sae, state.adam, latents, error, draw, read)
            self.objective.restart_(state.sae, state.adam, latents)
            state.restarted[latents] = 0

    def _record(
        self, rows: Tensor, result: Losses, value: float, dead_count: int, lr: float
    ) -> dict[str, Any]:
        """Figures of the batch just trained on, from before its update, on raw rows."""
        fidelity = Fidelity(self.columns, self.config.sae.d_sae, self.state.basis)
        fidelity.add(self.columns.split(rows)[1], result.error, result.kept)
        fidelity.over_(self.group)
        return {
            "split": "train",
            **self._position(),
            "loss": value,
            # Device sync, in steps that are logged.
            "aux_loss": self.group.mean_(result.aux).item(),
            **fidelity.figures(),
            "dead": dead_count,
            "dead_share": dead_count / self.config.sae.d_sae,
            "lr": lr,
        }

    def evaluation(self) -> Evaluation:
        """Of held-out rows: all of them at a warm start and at the end, `eval_rows` between."""
        limit = None if self.state.step in (0, self.steps) else self.config.eval_rows
        return Evaluation(self.state.sae, self.view, limit)

    def evaluation_as_is(self) -> Evaluation | None:
        """Of what training starts from, as it is; None: from nothing, or it was evaluated."""
        as_is, self.as_is = self.as_is, None
        return None if as_is is None else Evaluation(as_is, View(self.columns), None)

    def held_out_record(
        self, evaluation: Evaluation, as_is: Evaluation | None = None
    ) -> dict[str, Any]:
        """The record of a finished evaluation, and of that of the start as it is."""
        dead_count = len(dead.dead_latents(self.state.silent, self.dead_after))  # device sync
        share = dead_count / self.config.sae.d_sae
        figures = evaluation.figures()
        for name, value in as_is.figures().items() if as_is else ():
            if name in ("variance_explained", "l0"):
                figures[f"{name}_as_is"] = value
        return {
            "split": "held_out",
            **self._position(),
            **figures,
            "dead": dead_count,
            "dead_share": share,
        }

    def _position(self) -> dict[str, int]:
        return {"step": self.state.step, "tokens": self.state.step * self.config.batch}


def dead_after(config: SAEConfig, steps: int, batch: int) -> int:
    """Tokens without firing that make a latent dead, in a run of so many steps."""
    if config.dead_after is not None:
        return config.dead_after
    after = max(1, min(_DEAD_AFTER, steps * batch // 25))
    if config.bound_dead:  # in short runs nearly all would count as dead
        after = max(after, _DEAD_PERIODS * config.d_sae // config.k, _DEAD_BATCHES * batch)
    return after


def _require_divisible(config: TrainConfig, world: int) -> None:
    if config.batch % world:
        raise SettingError(
            f"batch={config.batch} cannot be shared evenly by {world} processes; make it a multiple"
        )
    if world > 1 and config.sae.resample:
        raise SettingError(
            f"sae.resample draws rows of a whole batch, so {world} processes cannot share it; "
            "use one, or take sae=topk sae.resample=false"
        )
    if world > 1 and objective.find(config.sae.activation).whole_batch:
        raise SettingError(
            f"sae.activation={config.sae.activation} looks at a whole batch, so {world} processes "
            "cannot share it; train it on one, or sweep with -m, which gives every process its own "
            "arms"
        )


def _blame(batch: Tensor, number: int, value: float) -> str:
    """Where a loss that is not finite comes from, and what to do."""
    bad = (~torch.isfinite(batch).all(1)).nonzero()
    if len(bad):
        return (
            f"batch {number} holds NaN or infinity, first in row {int(bad[0])} of {len(batch)} "
            f"({len(bad)} such rows); stopped before the step; {_VERIFY}"
        )
    return (
        f"the loss is {value} at batch {number} though all its {len(batch)} rows are finite: "
        "training diverged; stopped before the step; start another run with a lower optim.lr="
    )
