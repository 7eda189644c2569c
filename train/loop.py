"""Training SAEs, one or many on one read of their rows.

All that changes in a run is in its State. A run that was killed and started again ends with the same bits, metrics
included, as one that was not, within one recorded environment; and so does one that was trained beside others. For
runs that share a stream are shown the same batches in turn, each takes those that it has not had, and nothing else is
between them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import durable, records
from data.errors import Interrupted, PipelineError, StopRequest, StoreError
from data.journal import Metrics, Progress, duration, read_metrics, tell
from data.windows import to_device
from train import checkpoint, export, run, sae
from train.checkpoint import Checkpoint
from train.evaluate import evaluate
from train.parallel import Group
from train.stream import Following, Stream, Whole
from train.trainer import TrainConfig, Trainer

Outcome = dict[str, Any] | PipelineError  # the final held-out record, or why there is none


@dataclass(frozen=True)
class Arm:
    """A run to be trained: what decides its bits, and where it lives."""

    config: TrainConfig
    stream: Stream
    folder: Path
    following: Following = field(default_factory=Whole)
    facts: Mapping[str, Any] = field(default_factory=dict)  # written to config.yaml beside the settings


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
        settings = {"store": {"identity": arm.stream.identity, **order}, **asdict(arm.config), "tokens": tokens}
        del settings["checkpoint_every"]
        found = {"lr": trainer.optim.lr, "dead_after": trainer.dead_after}
        shown = {**arm.facts, "scale": trainer.scale, "steps": trainer.steps, **found}
        if arm.config.optim.lr == "auto":
            tell(
                f"{arm.folder}: optim.lr=auto is {trainer.optim.lr:.3g} for {arm.config.sae.d_sae:,} latents and "
                f"{trainer.steps:,} steps (docs/method.md)"
            )
        for line in run.agree(arm.folder, settings, shown, run.environment(device, self.group.world)):
            tell(line)
        return records.digest(settings)

    def _open(self, stack: ExitStack, stop: StopRequest) -> None:
        folder, following = self.arm.folder, self.arm.following
        saved = _resume(folder, self._settings)
        if _is_finished(folder):
            following.finish()
            tell(f"{folder} is finished: {folder / export.FILE} is there, nothing to do")
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
        """Whether it took a step here: what was due at the boundary where it goes on has been done there."""
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
        return self.fresh and (self.last or entered or self.step % self.arm.config.checkpoint_every == 0)

    def save(self) -> None:
        """Save a checkpoint unless this step's is there; what no kept one needs is free from then on."""
        if self.group.rank == 0 and self.saved != self.step:
            folder = self.arm.folder / run.CHECKPOINTS
            moment = Checkpoint(self.step, self._metrics.sync(), self._settings, self.trainer.state.tensors())
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
            path = export.write_final(state.sae, self.trainer.scale, self.arm.folder, state.basis)
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
        tell(f"{folder}: checkpoint {name} is damaged and passed over")
    if saved and saved.settings != settings:
        raise StoreError(f"{folder / run.CHECKPOINTS} holds checkpoints of another run; choose another run=")
    return saved


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


def train(arm: Arm, device: torch.device, group: Group | None = None) -> dict[str, Any]:
    """Train one arm, or go on training it; the final held-out record.

    Raises:
        Interrupted: a signal came; a checkpoint is saved.
        MismatchError: its directory holds a run with other settings or another store.
        NonFiniteError: a loss was not finite.
    """
    (outcome,) = train_together([arm], device, group)
    if isinstance(outcome, PipelineError):
        raise outcome
    return outcome


def train_together(arms: Sequence[Arm], device: torch.device, group: Group | None = None) -> list[Outcome]:
    """Train arms whose streams have the same rhythm on one read; an arm that fails leaves the others alone.

    Raises:
        Interrupted: a signal came; checkpoints are saved.
    """
    group = group or Group()
    with _deterministic(), torch.no_grad(), StopRequest() as stop, ExitStack() as stack:
        opened = [_opened(arm, device, group, stop, stack) for arm in arms]
        live = [one for one in opened if isinstance(one, Run) and one.outcome is None]
        if live:
            _pass(live, stop, group)
    return [one.outcome or {} if isinstance(one, Run) else one for one in opened]


def _opened(arm: Arm, device: torch.device, group: Group, stop: StopRequest, stack: ExitStack) -> Run | PipelineError:
    try:
        one = Run(arm, device, group, stop)
    except PipelineError as error:
        return error
    stack.callback(one.close)
    return one


def _pass(runs: list[Run], stop: StopRequest, group: Group) -> None:
    """Steps N + 1 times, so that the last boundary, where there is no batch any more, is like the others."""
    at = min(one.step for one in runs)
    shown = _Shown(at, len(runs))
    with ExitStack() as stack:
        feeds = {
            stream: stack.enter_context(closing(_feed(stream, runs, at)))  # type: ignore[type-var]
            for stream in dict.fromkeys(one.arm.stream for one in runs)
        }
        while True:
            _at_boundary([one for one in runs if one.step == at], group)
            runs = [one for one in runs if one.outcome is None]
            if not runs:
                return
            here = [one for one in runs if one.step == at]
            for one in here:
                one.arm.following.wait(at, stop)  # behind the checkpoint, on which what is waited for may depend
            if group.any(stop.signum is not None):
                for one in runs:
                    one.save()
                raise Interrupted(stop.signum or signal.SIGTERM)
            batches = {stream: next(feeds[stream]) for stream in dict.fromkeys(one.arm.stream for one in runs)}
            for one in here:
                _step(one, batches[one.arm.stream], shown)
            at += 1
            if group.rank == 0:
                shown.line()


def _feed(stream: Stream, runs: Sequence[Run], at: int) -> Iterator[Tensor]:
    """The stream's batches from number `at` on, on the device on which its runs are trained."""
    first = next(one for one in runs if one.arm.stream is stream)
    following = first.arm.following
    return to_device(stream.reader.batches(at), first.trainer.device, lambda ahead: following.has(at + ahead))


def _at_boundary(runs: Sequence[Run], group: Group) -> None:
    """Evaluate, save and finish what is due; runs that share their rows share the reading of the held-out ones."""
    due: dict[Stream, list[Run]] = {}
    for one in runs if group.rank == 0 else ():
        if one.evaluation_due:
            due.setdefault(one.arm.stream, []).append(one)
    for stream, evaluated in due.items():
        evaluations = [one.trainer.evaluation() for one in evaluated]
        evaluate(evaluations, stream.held_out())
        for one, evaluation in zip(evaluated, evaluations, strict=True):
            one.note(one.trainer.held_out_record(evaluation))
    for one in runs:
        if one.save_due:
            one.save()
        if one.last:
            one.finish()


def _step(one: Run, batch: Tensor, shown: _Shown) -> None:
    try:
        record = one.trainer.step_(batch)
    except PipelineError as error:
        one.fail(error)
        if shown.arms > 1:  # alone, it is the caller's to say
            tell(f"{one.arm.folder}: {error}")
        return
    if record:
        speed = shown.speed(one.step) * one.arm.config.batch
        one.note(record, speed)
        shown.add(record, one.trainer.steps, speed)


class _Shown:
    """The progress line of one pass."""

    def __init__(self, start: int, arms: int) -> None:
        self.arms = arms
        self._start, self._began, self._progress = start, time.monotonic(), Progress()
        self._new: list[tuple[dict[str, Any], int, float]] = []

    def speed(self, step: int) -> float:
        """Steps per second since the pass began."""
        return (step - self._start) / (time.monotonic() - self._began)

    def add(self, record: dict[str, Any], steps: int, tokens_per_s: float) -> None:
        self._new.append((record, steps, tokens_per_s))

    def line(self) -> None:
        """Show what the last step gave, if anything."""
        if not self._new:
            return
        records = [record for record, _, _ in self._new]
        record, steps, tokens_per_s = max(self._new, key=lambda new: new[1])
        explained = sorted(one["variance_explained"] for one in records)
        if len(records) == 1:
            figures = f"variance explained {explained[0]:.4f}  mse {record['mse']:.4g}  l0 {record['l0']:.1f}"
            figures += f"  dead {record['dead_share']:.1%}  lr {record['lr']:.2g}"
        else:
            figures = f"{len(records)} arms  variance explained {explained[0]:.4f} to {explained[-1]:.4f}"
            figures += f"  dead up to {max(one['dead_share'] for one in records):.1%}"
        left = (steps - record["step"]) / self.speed(record["step"])
        self._progress.show(
            f"step {record['step']:,}/{steps:,}  {record['tokens']:,} tokens  {figures}  "
            f"{tokens_per_s:,.0f} tokens/s  {duration(left)} left",
            last=record["step"] == steps,
        )
        self._new.clear()
