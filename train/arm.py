"""One arm: a run to be trained, and the run while it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residual_saes.data import digests, durable, environment, locks
from residual_saes.data.errors import (
    NonFiniteError,
    PipelineError,
    StopRequest,
    StoreError,
    TemporaryError,
)
from residual_saes.data.journal import Metrics, read_metrics, tell
from residual_saes.data.rows import statistics
from residual_saes.data.rows.follower import Follower, FollowsNobody
from residual_saes.data.store import records
from residual_saes.train import checkpoint, recipe, run, sae_file, ways
from residual_saes.train.checkpoint import Checkpoint
from residual_saes.train.columns import widths_of
from residual_saes.train.optim import warmup_steps
from residual_saes.train.parallel import Group
from residual_saes.train.stream import Stream
from residual_saes.train.trackers import Trackers
from residual_saes.train.trainer import TrainConfig, Trainer
from residual_saes.train.warm import Start
from residual_saes.train.ways import Shape, Ways

Outcome = dict[str, Any] | PipelineError  # the final held-out record, or why there is none


@dataclass(frozen=True)
class Arm:
    """A run to be trained: what decides its bits, and where it lives."""

    config: TrainConfig
    stream: Stream
    folder: Path
    follower: Follower = field(default_factory=FollowsNobody)
    # Written to config.yaml beside the settings.
    facts: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None  # config.start is its digest
    log: tuple[str, ...] = ()  # programs that get the curves too: train/trackers.py
    ways: Mapping[str, str] | None = None  # asked for; None: recorded or measured (train/ways.py)


class Run:
    """One arm while it is trained, from the lock on its directory to the final file.

    In a group of processes, process 0 alone reads and writes the directory.
    """

    def __init__(
        self,
        arm: Arm,
        device: torch.device,
        group: Group,
        stop: StopRequest,
        tell_begin: Callable[[Arm, Trainer, int], None],
    ) -> None:
        """Begin, or go on from the last checkpoint.

        Args:
            tell_begin: tells the user that this begins, at a step.

        Raises:
            MismatchError: the directory holds a run with other settings or another store.
            StoreError: it is in use, damaged, or holds something else.
        """
        self.arm = arm
        self.group = group
        self.outcome: Outcome | None = None
        self._is_warned = False  # that the SAE is worse than the rows' mean
        self._tell_begin = tell_begin
        self._here = environment.of_training(device, group.world)
        self._ways = self._settled(device)
        self.trainer = Trainer(arm.config, arm.stream.reader, device, group)
        with ExitStack() as stack:
            if group.rank == 0:
                busy = (
                    f"another process is training in {arm.folder}; wait for it, or choose "
                    "another run="
                )
                stack.enter_context(locks.locked(arm.folder, busy))
                durable.make_directory(arm.folder / run.CHECKPOINTS)
                durable.sweep(arm.folder / run.CHECKPOINTS)
            self._settings = self._agree() if group.rank == 0 else ""
            if group.rank == 0:
                self._open(stack, stop)
            self._share()
            self._closing = stack.pop_all()

    def _settled(self, device: torch.device) -> Ways:
        """The ways of process 0, for all processes."""
        arm = self.arm
        sae = arm.config.sae
        widths = widths_of(arm.config.ports, arm.stream.reader)
        shape = Shape(*widths, sae.d_sae, sae.k, arm.config.batch // self.group.world)
        settled = Ways()
        if self.group.rank == 0:
            known = arm.ways
            if known is None:
                known = run.recorded_ways(arm.folder, self._here)
            settled = ways.settle(shape, device, arm.config.matmul, known)
            tell(*settled.lines)
        text = self.group.text_from_first(ways.written(settled))
        return settled if self.group.rank == 0 else ways.take(text, shape, device)

    def _agree(self) -> str:
        """Compare the settings with the directory's, or write them; their digest."""
        arm = self.arm
        trainer = self.trainer
        tokens = trainer.steps * arm.config.batch
        arm.follower.require(tokens)
        store: dict[str, Any] = {"identity": arm.stream.identity}
        if arm.stream.identities:  # of several stores
            store["identities"] = list(arm.stream.identities)
        if arm.follower.span:
            store["span"] = arm.follower.span
        settings = {
            "store": store,
            **arm.config.recorded(),
            "tokens": tokens,
        }
        del settings["checkpoint_every"]
        scales = {port.name: scale for port, scale in trainer.columns.scales.items()}
        scaled = {"scales": scales} if len(scales) > 1 else {"scale": trainer.scale}
        resolved = {"lr": trainer.optim.lr, "dead_after": trainer.dead_after}
        facts = {**arm.facts, **scaled, "steps": trainer.steps, **resolved}
        self._warn(
            recipe.rate_warning(float(trainer.optim.lr), arm.config.sae.d_sae, trainer.steps),
            recipe.size_warning(arm.config.sae.d_sae, arm.config.sae.k, tokens),
        )
        here = {**self._here, **({"ways": self._ways.taken} if self._ways.taken else {})}
        later = {"sae": arm.config.sae.LATER, "optim": arm.config.optim.LATER}
        unrecorded = {**arm.config.LATER, **later}
        for line in run.agree(arm.folder, settings, facts, here, unrecorded):
            tell(line)
        return records.digest(settings)

    def _warn(self, *warnings: str | None) -> None:
        """Tell the user; the report finds the same warnings in the run's settings and metrics."""
        for warning in filter(None, warnings):
            tell(f"warning: {self.arm.folder}: {warning}")

    def _open(self, stack: ExitStack, stop: StopRequest) -> None:
        """Take up the last checkpoint, or begin. A finished run has its outcome at once."""
        folder = self.arm.folder
        follower = self.arm.follower
        checkpoints = folder / run.CHECKPOINTS
        saved = resume(folder, self._settings)
        step = saved.step if saved else 0
        kept = [step, checkpoint.fallback(checkpoints, step)]
        if is_done(folder, step == self.trainer.steps):
            follower.finish()
            checkpoint.keep(checkpoints, kept)
            tell(f"{folder} is finished: {folder / sae_file.FILE} is there, nothing to do")
            records = run.metrics_of(folder)
            Trackers(self.arm.log, folder, records).close()  # what they lack
            self.outcome = records[-1]
            return
        self._tell_begin(self.arm, self.trainer, step)
        # Register for the rows first: what is damaged stays if they are gone. Remove it before the
        # metrics are cut: one that comes back must not find them shorter than it saw them.
        follower.begin(None if step == self.trainer.steps else step, kept[1])
        checkpoint.keep(checkpoints, kept)
        if saved:
            self.trainer.restore(saved)
        elif needed := self.trainer.rows_to_begin:
            batch = self.arm.config.batch
            batches = min(-(-needed // batch), self.trainer.steps)
            if follower.at_once is not None:  # the harvest waits for room until rows are released
                batches = min(batches, follower.at_once // batch)
            follower.wait(batches - 1, stop)
            stop.check()
            self._begin(self.arm.stream.first(min(needed, batches * batch)))
        seen = (saved.metrics_bytes, saved.metrics_digest) if saved else ()
        self._metrics = stack.enter_context(closing(Metrics(folder / run.METRICS, *seen)))
        records = read_metrics(folder / run.METRICS) if saved and self.arm.log else []
        self._trackers = stack.enter_context(closing(Trackers(self.arm.log, folder, records)))
        timings = _timings(folder / run.TIMINGS, saved)
        self._timings = stack.enter_context(closing(timings))
        if self._ways.choices:
            found = {choice.what: choice.recorded() for choice in self._ways.choices}
            self._timings.write({"step": step, "ways": found})
        durable.sync_directory(folder)

    def _begin(self, first: Tensor) -> None:
        """Set the first weights by the stream's first rows, and by the start if there is one."""
        start = self.arm.start
        if start is None:
            self.trainer.begin_(first)
            return
        done = self.trainer.begin_from_(start.sae(), first)
        tell(f"{self.arm.folder} starts from {start.named}: {done}")

    def _share(self) -> None:
        """Let all processes begin with process 0's state."""
        state = self.trainer.state
        step = torch.tensor([state.step], device=self.trainer.device)
        self.group.from_first_([step, *state.tensors().values()])
        state.step = self.start = self.saved = int(step)  # device sync, at the start
        if self.group.any(self.outcome is not None) and self.outcome is None:
            self.outcome = {}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trainer.state.step

    @property
    def fresh(self) -> bool:
        """True once this process has stepped: a resumed run must not evaluate or save again where
        it resumed.
        """
        return self.step > self.start

    @property
    def last(self) -> bool:
        return self.step == self.trainer.steps

    @property
    def evaluation_due(self) -> bool:
        if self.step == 0:  # it begins here, since nothing is saved at step 0
            return self.arm.config.start is not None
        return self.fresh and (self.last or self.step % self.arm.config.eval_every == 0)

    @property
    def save_due(self) -> bool:
        if not self.fresh:
            return False
        round_of = self.arm.follower.round
        entered = round_of(self.step) != round_of(self.step - 1)
        return self.last or entered or self.step % self.arm.config.checkpoint_every == 0

    def save(self) -> None:
        """Save a checkpoint unless this step has one, then release the rows before the oldest."""
        if self.group.rank == 0 and self.saved != self.step:
            folder = self.arm.folder / run.CHECKPOINTS
            metrics = self._metrics.sync()
            moment = Checkpoint(
                step=self.step,
                metrics_bytes=metrics.bytes,
                settings=self._settings,
                tensors=self.trainer.state.tensors(),
                metrics_digest=metrics.xxh3_128,
                timings=self._timings.sync(),
            )
            checkpoint.save(folder, moment)
            self.arm.follower.release(checkpoint.oldest(folder))
        self.saved = self.step

    def note(self, record: dict[str, Any], speed: float | None = None) -> None:
        """Write a record to the metrics, and its step's speed in tokens/s beside them."""
        if self.group.rank == 0:
            self._metrics.write(record)
            self._trackers.note(record)
            if not self._is_warned:
                warmup = warmup_steps(self.trainer.optim, self.trainer.steps)
                warning = recipe.negative_warning([record], warmup)
                self._is_warned = warning is not None
                self._warn(warning)
            if speed is not None:
                self._timings.write({"step": self.step, "tokens_per_s": round(speed)})

    def note_evaluation(self, record: dict[str, Any]) -> None:
        """Write a held-out record to the metrics; tell of that of a start."""
        self.note(record)
        if record["step"] == 0:
            as_is, now = record["variance_explained_as_is"], record["variance_explained"]
            nothing = ": it explains nothing of these rows" if now <= 0 else ""
            tell(
                f"{self.arm.folder}: before training, held-out variance explained {now:.4f}; of "
                f"the start as it is {as_is:.4f}, with {record['l0_as_is']:.1f} latents a "
                f"row{nothing}"
            )

    def finish(self) -> None:
        """Write the final file, then the record that vouches for all of the run's.

        Raises:
            StoreError: the run was finished before, with another SAE.
        """
        final: dict[str, Any] = {}
        if self.group.rank == 0:
            folder, state = self.arm.folder, self.trainer.state
            path = folder / sae_file.FILE
            earlier = None
            if run.record(folder) is None and path.is_file():
                earlier = durable.digest_file(path)
            scales = self.trainer.columns.folding()
            written = sae_file.write_final(state.sae, scales, folder, state.basis)
            files = {sae_file.FILE: written, run.METRICS: self._metrics.sync()}
            run.seal(folder, {**files, run.TIMINGS: self._timings.sync()})
            if earlier not in (None, written):
                tell(f"{path} was not what the last checkpoint gives, and is now")
            self.arm.follower.finish()
            final = run.metrics_of(folder)[-1]
            stream = self.arm.stream
            explained = final["variance_explained"]
            explained = math.nan if explained is None else explained  # rows that are all the same
            tell(
                f"wrote {path}: held-out variance explained {explained:.4f}, "
                f"dead {final['dead_share']:.1%} of {self.arm.config.sae.d_sae:,} latents; "
                f"left out: {statistics.told(stream.policy, stream.left_out)}"
            )
        self.outcome = final
        self.close()

    def fail(self, error: PipelineError) -> None:
        """Leave the run at its last checkpoint, and its memory to the others.

        In a ring its rows stay, for the same command goes on; one that diverged would only diverge
        again, and gives them up.
        """
        self.outcome = error
        del self.trainer
        self.leave()
        if self.group.rank == 0 and isinstance(error, NonFiniteError):
            with suppress(PipelineError, OSError):
                self.arm.follower.finish()

    def leave(self) -> None:
        """Close the run's files; after a failure, or a checkpoint, nothing in them matters."""
        with suppress(PipelineError, OSError):
            self.close()

    def close(self) -> None:
        """Close the run's files."""
        self._closing.close()


def is_done(folder: Path, can_rewrite: bool) -> bool:
    """Whether the final SAE is there, and its record vouches for it.

    If not, training goes on from the last checkpoint, and at its end writes the file again.

    Args:
        can_rewrite: whether the checkpoint of the last step is there.

    Raises:
        StoreError: the record is damaged.
    """
    kept = run.record(folder)
    path = folder / sae_file.FILE
    if kept is None:
        if path.is_file() and can_rewrite:
            tell(f"{folder} is of an earlier version: its last checkpoint gives {path.name} again")
        return path.is_file() and not can_rewrite and _is_recorded(folder)
    if sae_file.FILE not in kept.files:
        return False
    if wrong := kept.fault(sae_file.FILE):
        tell(f"{path} {wrong}: it is written again from the last checkpoint")
        return False
    run.drop_damaged_timings(kept)
    return True


def _is_recorded(folder: Path) -> bool:
    """Record a finished run of an earlier version as it is; False if its SAE cannot be read."""
    try:
        sae_file.load(folder / sae_file.FILE)
    except TemporaryError:
        raise
    except StoreError as error:
        tell(str(error))
        return False
    names = [name for name in run.FILES if (folder / name).is_file()]
    digests.write(folder, names)
    tell(
        f"{folder} is of an earlier version and has no checkpoint of its last step: its files "
        "count as they are from now on"
    )
    return True


def _timings(path: Path, saved: Checkpoint | None) -> Metrics:
    """timings.jsonl as the checkpoint saw it; a damaged one is begun anew."""
    if saved is None:
        return Metrics(path)
    if saved.timings is None:
        return Metrics.continued(path)
    try:
        return Metrics(path, *saved.timings)
    except TemporaryError:
        raise
    except StoreError as error:
        tell(f"{error}: it is begun anew, for it holds speeds alone")
        return Metrics(path)


def resume(folder: Path, settings: str) -> Checkpoint | None:
    """The checkpoint from which a run goes on, if any.

    Args:
        settings: digest of the run's settings.

    Raises:
        StoreError: the checkpoints are another run's.
    """
    saved, passed_over = checkpoint.latest(folder / run.CHECKPOINTS)
    for name in passed_over:
        tell(f"{folder}: checkpoint {name} is damaged and passed over")
    if saved and saved.settings != settings:
        raise StoreError(
            f"{folder / run.CHECKPOINTS} holds checkpoints of another run; choose another run="
        )
    return saved
