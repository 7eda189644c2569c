"""Training SAEs, one or many on one read of their rows.

All that changes in a run is in its State. A run that was killed and started again ends with the
same bits, metrics included, as one that was not, within one recorded environment; and so does one
that was trained beside others. For runs that share a stream are shown the same batches in turn,
each takes those that it has not had, and nothing else is between them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from data.errors import Interrupted, PipelineError, StopRequest
from data.journal import Progress, duration, tell
from data.rows.copy import to_device
from train.arm import Arm, Outcome, Run
from train.evaluate import evaluate
from train.parallel import Group
from train.stream import Stream


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


def train_together(
    arms: Sequence[Arm], device: torch.device, group: Group | None = None
) -> list[Outcome]:
    """Train arms whose streams have the same rhythm on one read; an arm that fails leaves the
    others alone.

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


def _opened(
    arm: Arm, device: torch.device, group: Group, stop: StopRequest, stack: ExitStack
) -> Run | PipelineError:
    try:
        one = Run(arm, device, group, stop)
    except PipelineError as error:
        return error
    stack.callback(one.close)
    return one


def _pass(runs: list[Run], stop: StopRequest, group: Group) -> None:
    """Steps N + 1 times, so that the last boundary, where there is no batch any more, is like the
    others.
    """
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
                one.arm.following.wait(
                    at, stop
                )  # behind the checkpoint, on which what is waited for may depend
            if group.any(stop.signum is not None):
                for one in runs:
                    one.save()
                raise Interrupted(stop.signum or signal.SIGTERM)
            batches = {
                stream: next(feeds[stream])
                for stream in dict.fromkeys(one.arm.stream for one in runs)
            }
            for one in here:
                _step(one, batches[one.arm.stream], shown)
            at += 1
            if group.rank == 0:
                shown.line()


def _feed(stream: Stream, runs: Sequence[Run], at: int) -> Iterator[Tensor]:
    """The stream's batches from number `at` on, on the device on which its runs are trained."""
    first = next(one for one in runs if one.arm.stream is stream)
    following = first.arm.following
    return to_device(
        stream.reader.batches(at), first.trainer.device, lambda ahead: following.has(at + ahead)
    )


def _at_boundary(runs: Sequence[Run], group: Group) -> None:
    """Evaluate, save and finish what is due; runs that share their rows share the reading of the
    held-out ones.
    """
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
            figures = (
                f"{len(records)} arms  variance explained {explained[0]:.4f} to {explained[-1]:.4f}"
            )
            figures += f"  dead up to {max(one['dead_share'] for one in records):.1%}"
        left = (steps - record["step"]) / self.speed(record["step"])
        self._progress.show(
            f"step {record['step']:,}/{steps:,}  {record['tokens']:,} tokens  {figures}  "
            f"{tokens_per_s:,.0f} tokens/s  {duration(left)} left",
            last=record["step"] == steps,
        )
        self._new.clear()
