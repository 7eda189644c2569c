"""One arm: a run to be trained, and the run while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data import durable, environment
from data.errors import PipelineError, StopRequest, StoreError
from data.journal import Metrics, read_metrics, tell
from data.rows.follower import Follower, FollowsNobody
from data.store import records
from train import checkpoint, run, sae_file
from train.checkpoint import Checkpoint
from train.parallel import Group
from train.stream import Stream
from train.trainer import TrainConfig, Trainer

Outcome = dict[str, Any] | PipelineError  # the final held-out record, or why there is none


@dataclass(frozen=True)
class Arm:
    """A run to be trained: what decides its bits, and where it lives."""

    config: TrainConfig
    stream: Stream
    folder: Path
    following: Follower = field(default_factory=FollowsNobody)
    facts: Mapping[str, Any] = field(
        default_factory=dict
    )  # written to config.yaml beside the settings


class Run:
    """One arm while it is trained, from the lock on its directory to the final file.

    In a group of processes, process 0 alone reads and writes the directory.
    """

    def __init__(self, arm: Arm, device: torch.device, group: Group, stop: StopRequest) -> None:
        """Begin, or go on from the last checkpoint.

        Raises:
            MismatchError: the directory holds a run with other settings or another store.
            StoreError: it is in use, damaged, or holds something else.
        """
        self.arm, self.group = arm, group
        self.outcome: Outcome | None = None
        self.trainer = Trainer(arm.config, arm.stream.reader, device, group)
        with ExitStack() as stack:
            if group.rank == 0:
                busy = f"another process is training in {arm.folder}; wait for it, or choose another run="
                stack.enter_context(durable.locked(arm.folder, busy))
                durable.make_directory(arm.folder / run.CHECKPOINTS)
            self._settings = self._agree(device) if group.rank == 0 else ""
            if group.rank == 0:
                self._open(stack, stop)
            self._share()
            self._closing = stack.pop_all()

    def _agree(self, device: torch.device) -> str:
        """Compare with what the directory holds; the settings' digest."""
        arm, trainer = self.arm, self.trainer
        tokens = trainer.steps * arm.config.batch
        arm.following.require(tokens)
        order = {"span": arm.following.span} if arm.following.span else {}
        settings = {
            "store": {"identity": arm.stream.identity, **order},
            **asdict(arm.config),
            "tokens": tokens,
        }
        del settings["checkpoint_every"]
        found = {"lr": trainer.optim.lr, "dead_after": trainer.dead_after}
        shown = {**arm.facts, "scale": trainer.scale, "steps": trainer.steps, **found}
        if arm.config.optim.lr == "auto":
            tell(
                f"{arm.folder}: optim.lr=auto is {trainer.optim.lr:.3g} for {arm.config.sae.d_sae:,} latents and "
                f"{trainer.steps:,} steps (docs/method.md)"
            )
        for line in run.agree(
            arm.folder, settings, shown, environment.of_training(device, self.group.world)
        ):
            tell(line)
        return records.digest(settings)

    def _open(self, stack: ExitStack, stop: StopRequest) -> None:
        folder, following = self.arm.folder, self.arm.following
        saved = resume(folder, self._settings)
        if is_finished(folder):
            following.finish()
            tell(f"{folder} is finished: {folder / sae_file.FILE} is there, nothing to do")
            self.outcome = read_metrics(folder / run.METRICS)[-1]
            return
        following.begin(checkpoint.oldest(folder / run.CHECKPOINTS))
        if saved:
            self.trainer.restore(saved)
            tell(f"{folder}: going on from step {saved.step:,} of {self.trainer.steps:,}")
        elif needed := self.trainer.rows_to_begin:
            following.wait(min(-(-needed // self.arm.config.batch), self.trainer.steps) - 1, stop)
            stop.check()
            self.trainer.begin_(self.arm.stream.first(needed))
        metrics = Metrics(folder / run.METRICS, saved.metrics_bytes if saved else 0)
        self._metrics = stack.enter_context(closing(metrics))
        self._timings = stack.enter_context(closing(Metrics.continued(folder / run.TIMINGS)))
        durable.sync_directory(folder)

    def _share(self) -> None:
        """Let all processes begin with what process 0 found."""
        state, device = self.trainer.state, self.trainer.device
        step = torch.tensor([state.step], device=device)
        self.group.from_first_([step, *state.tensors().values()])
        state.step = self.start = self.saved = int(step)
        if self.group.any(self.outcome is not None) and self.outcome is None:
            self.outcome = {}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trainer.state.step

    @property
    def fresh(self) -> bool:
        """Whether it took a step here: what was due at the boundary where it goes on has been done
        there.
        """
        return self.step > self.start

    @property
    def last(self) -> bool:
        return self.step == self.trainer.steps

    @property
    def evaluation_due(self) -> bool:
        return self.fresh and (self.last or self.step % self.arm.config.eval_every == 0)

    @property
    def save_due(self) -> bool:
        round_of = self.arm.following.round
        entered = self.fresh and round_of(self.step) != round_of(self.step - 1)
        return self.fresh and (
            self.last or entered or self.step % self.arm.config.checkpoint_every == 0
        )

    def save(self) -> None:
        """Save a checkpoint unless this step's is there; what no kept one needs is free from then
        on.
        """
        if self.group.rank == 0 and self.saved != self.step:
            folder = self.arm.folder / run.CHECKPOINTS
            moment = Checkpoint(
                self.step, self._metrics.sync(), self._settings, self.trainer.state.tensors()
            )
            checkpoint.save(folder, moment)
            self.arm.following.release(checkpoint.oldest(folder))
        self.saved = self.step

    def note(self, record: dict[str, Any], speed: float | None = None) -> None:
        """Write a record to the metrics, and its step's speed in tokens/s beside them."""
        if self.group.rank == 0:
            self._metrics.write(record)
            if speed is not None:
                self._timings.write({"step": self.step, "tokens_per_s": round(speed)})

    def finish(self) -> None:
        """Write the final file."""
        final: dict[str, Any] = {}
        if self.group.rank == 0:
            state = self.trainer.state
            path = sae_file.write_final(state.sae, self.trainer.scale, self.arm.folder, state.basis)
            self.arm.following.finish()
            final = read_metrics(self.arm.folder / run.METRICS)[-1]
            tell(
                f"wrote {path}: held-out variance explained {final['variance_explained']:.4f}, "
                f"dead {final['dead_share']:.1%} of {self.arm.config.sae.d_sae:,} latents"
            )
        self.outcome = final
        self.close()

    def fail(self, error: PipelineError) -> None:
        """Leave it at its last checkpoint."""
        self.outcome = error
        self.close()

    def close(self) -> None:
        """Close its files."""
        self._closing.close()


def is_finished(folder: Path) -> bool:
    """Whether the final SAE is there; a damaged one is exported again from the last checkpoint."""
    try:
        sae_file.load(folder / sae_file.FILE)
    except StoreError:
        return False
    return True


def resume(folder: Path, settings: str) -> Checkpoint | None:
    saved, passed_over = checkpoint.latest(folder / run.CHECKPOINTS)
    for name in passed_over:
        tell(f"{folder}: checkpoint {name} is damaged and passed over")
    if saved and saved.settings != settings:
        raise StoreError(
            f"{folder / run.CHECKPOINTS} holds checkpoints of another run; choose another run="
        )
    return saved
