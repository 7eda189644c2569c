"""The training loop: SAEs, one or many, on one read of their rows.

All that changes in a run is in its State. A run that was killed and started again ends with the
same bits, metrics included, as one that was not, within one recorded environment. So does a run
that was trained beside others: runs share the batches and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from residual_saes.data import machine, stopping
from residual_saes.data.allocator import kept_when_freed
from residual_saes.data.errors import Interrupted, PipelineError, StopRequest, TemporaryError
from residual_saes.data.journal import Progress, duration, figure, tell
from residual_saes.data.rows import statistics
from residual_saes.data.rows.copy import to_device
from residual_saes.train import header, memory, ways
from residual_saes.train.arm import Arm, Outcome, Run
from residual_saes.train.evaluate import evaluate
from residual_saes.train.parallel import Group
from residual_saes.train.stream import Stream
from residual_saes.train.trainer import Trainer
from residual_saes.train.view import Shared


def _train(runs: list[Run], failures: _Failures, stop: StopRequest, group: Group) -> None:
    """Train all runs to their end; each keeps its outcome. One that fails ends alone."""
    step = min(run.step for run in runs)
    shown = _Shown(step, len(runs))
    if group.rank == 0:
        _tell_left_out(runs)
    with ExitStack() as stack:
        feeds = {}
        for stream in _streams(runs):
            feeds[stream] = stack.enter_context(closing(_feed(stream, runs, step)))  # type: ignore[type-var]
        while True:
            # A run that went on from a later step waits until the others are there.
            here = [run for run in _going_on(runs) if run.step == step]

            # Once in a while, and at the end: evaluate on held-out rows.
            if group.rank == 0:
                _evaluate([run for run in here if run.evaluation_due], failures)

            # Once in a while, and at the end: save a checkpoint. At the end: write the final SAE.
            for run in _going_on(here):
                with failures.ending(run):
                    if run.save_due:
                        run.save()
                    if run.last:
                        run.finish()

            # Wait for a harvest that is still writing. It may need the checkpoint saved above.
            for run in _going_on(here):
                with failures.ending(run):
                    _require_room(run, failures.arms)
                    run.arm.follower.wait(step, stop)
            runs = _going_on(runs)
            if not runs:
                return

            # After a signal: save and stop, all processes at the same step.
            if signum := group.largest(stop.signum or 0):
                for run in runs:
                    with failures.ending(run):
                        run.save()
                if step and (saved := _going_on(runs)):
                    stopping.left.saved = _saved(saved)
                raise Interrupted(signum)

            # One batch of each stream.
            batches = {}
            for stream in _streams(runs):
                with failures.ending(*_of(stream, runs)):
                    batches[stream] = next(feeds[stream])

            # One optimizer step of each run. Those that see a batch alike scale and turn it once.
            seen: dict[Stream, Shared] = {stream: {} for stream in batches}
            for run in _going_on(here):
                with failures.ending(run):
                    _step(run, batches[run.arm.stream], seen[run.arm.stream], shown)
            seen.clear()
            step += 1
            if group.rank == 0:
                shown.line()


def _tell_left_out(runs: list[Run]) -> None:
    """Say once for each stream which rows are not served."""
    span = runs[0].arm.follower.span
    of_what = "training" if span is None else f"the first {span} training units"
    streams = _streams(runs)
    for stream in streams:
        rows = ""
        if len(streams) > 1:
            read = _of(stream, runs)[0].arm.config.ports.every
            rows = f" ({', '.join(map(str, read))})"
        if stream.left_out:
            tell(f"left out of {of_what}{rows}: {statistics.told(stream.policy, stream.left_out)}")


def _saved(runs: Sequence[Run]) -> str:
    """What a stop leaves."""
    if len(runs) > 1:
        return f"{len(runs)} arms are saved, the first at step {runs[0].step:,}"
    (run,) = runs
    return f"step {run.step:,} of {run.trainer.steps:,} is saved in {run.arm.folder}"


def _going_on(runs: Sequence[Run]) -> list[Run]:
    """The runs that have no outcome yet."""
    return [run for run in runs if run.outcome is None]


class _Failures:
    """Failed arms. What fails ends the runs that need it, and no other."""

    def __init__(self, several: bool) -> None:
        self.arms: list[Arm] = []
        self._several = several

    @contextmanager
    def ending(self, *runs: Run) -> Iterator[None]:
        """End these runs, each at its last checkpoint, if the block fails."""
        try:
            yield
        except Exception as error:
            reason = machine.answer(error, memory.smaller(runs[0].arm))
            if reason is None:
                raise
            for run in _going_on(runs):
                run.fail(reason)
                self.note(run.arm, reason)

    def note(self, arm: Arm, reason: PipelineError) -> None:
        """Take in an arm that failed."""
        self.arms.append(arm)
        if self._several:  # alone, the caller says it
            tell(f"{arm.folder}: {reason}")


def _require_room(run: Run, failed: Sequence[Arm]) -> None:
    """Save the run, then raise TemporaryError, if its ring is full of the rows of a failed arm.

    Those rows stay for the arm to go on, so the harvest that the run waits for would wait for ever.
    """
    for arm in failed:
        way_out = run.arm.follower.held_up_by(arm.follower, run.step)
        if way_out is not None:
            run.save()
            raise TemporaryError(
                f"stopped at step {run.step:,} for want of rows, which the harvest has no room for "
                f"while {arm.folder} has failed; mend that, and the same command goes on with all "
                f"arms, or give that one up: {way_out}"
            )


def _step(run: Run, batch: Tensor, seen: Shared, shown: _Shown) -> None:
    """One optimizer step: train/trainer.py."""
    record = run.trainer.step_(batch, seen)
    if record:
        speed = shown.speed(run.step) * run.arm.config.batch
        run.note(record, speed)
        shown.add(record, run.trainer.steps, speed)


def _evaluate(runs: Sequence[Run], failures: _Failures) -> None:
    """Evaluate runs; those of one stream share the reading of its held-out rows."""
    for stream in _streams(runs):
        due = _of(stream, runs)
        with failures.ending(*due):
            evaluations = [run.trainer.evaluation() for run in due]
            as_is = [run.trainer.evaluation_as_is() for run in due]
            evaluate([*evaluations, *filter(None, as_is)], stream.held_out())
        if due != _going_on(due):
            continue
        for run, evaluation, start in zip(due, evaluations, as_is, strict=True):
            with failures.ending(run):
                run.note_evaluation(run.trainer.held_out_record(evaluation, start))


def _of(stream: Stream, runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that read a stream."""
    return [run for run in runs if run.arm.stream is stream]


def _streams(runs: Sequence[Run]) -> list[Stream]:
    """The streams of runs, each once, in the order of the runs."""
    return list(dict.fromkeys(run.arm.stream for run in runs))


def _feed(stream: Stream, runs: Sequence[Run], first: int) -> Iterator[Tensor]:
    """The stream's batches from number `first` on, on the device of its runs."""
    run = next(run for run in runs if run.arm.stream is stream)
    follower = run.arm.follower
    return to_device(
        stream.reader.batches(first),
        run.trainer.device,
        lambda ahead: follower.has(first + ahead),
    )


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
    """Train arms that take the same batches on one read; an arm that fails leaves the others alone.

    Raises:
        Interrupted: a signal came; checkpoints are saved.
    """
    group = group or Group()
    with _deterministic(), torch.no_grad(), StopRequest() as stop, ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(kept_when_freed())
        stack.callback(ways.forget)
        failures = _Failures(len(arms) > 1)
        tell_begin = header.tell_run if len(arms) == 1 else header.tell_arm
        opened = [_opened(arm, device, group, stop, stack, tell_begin) for arm in arms]
        for arm, found in zip(arms, opened, strict=True):
            if isinstance(found, PipelineError):
                failures.note(arm, found)
        live = _going_on([run for run in opened if isinstance(run, Run)])
        if live:
            with stopping.holding():  # it saves at the next step, then ends by itself
                _train(live, failures, stop, group)
    return [run.outcome or {} if isinstance(run, Run) else run for run in opened]


def _opened(
    arm: Arm,
    device: torch.device,
    group: Group,
    stop: StopRequest,
    stack: ExitStack,
    tell_begin: Callable[[Arm, Trainer, int], None],
) -> Run | PipelineError:
    """The arm's run, or why it cannot be trained."""
    try:
        memory.require_fit(arm, device)
        run = Run(arm, device, group, stop, tell_begin)
    except Exception as error:
        reason = machine.answer(error, memory.smaller(arm))
        if reason is None:
            raise
        return reason
    stack.callback(run.leave)
    return run


@contextmanager
def _deterministic() -> Iterator[None]:
    """Only deterministic algorithms; the former setting comes back."""
    # cuBLAS reads this when it starts. The commands set it earlier, for other products before.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    debug = torch.utils.deterministic
    mode = torch.get_deterministic_debug_mode()
    fill = debug.fill_uninitialized_memory  # type: ignore[attr-defined]
    # The flag that torch's kernels ask. `use_deterministic_algorithms` sets the compiler's too,
    # which compiles nothing here, and loads it for that: 2.3 s of a core before the first step.
    torch.set_deterministic_debug_mode("error")
    debug.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every torch.empty here is written first
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        debug.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class _Shown:
    """The progress line of all runs."""

    def __init__(self, start: int, arms: int) -> None:
        self.arms = arms
        self._start = start
        self._began = time.monotonic()
        self._progress = Progress()
        self._new: list[tuple[dict[str, Any], int, float]] = []

    def speed(self, step: int) -> float:
        """Steps per second since the loop began."""
        return (step - self._start) / (time.monotonic() - self._began)

    def add(self, record: dict[str, Any], steps: int, tokens_per_s: float) -> None:
        """Keep a run's record for the next line.

        Args:
            steps: optimizer steps of the whole run.
        """
        self._new.append((record, steps, tokens_per_s))

    def line(self) -> None:
        """Show the records since the last line, if any."""
        if not self._new:
            return
        records = [record for record, _, _ in self._new]
        record, steps, tokens_per_s = max(self._new, key=lambda new: new[1])
        if len(records) == 1:
            explained = f"variance explained {figure(record['variance_explained'], 6)}"
        else:
            some = [record["variance_explained"] for record in records]
            explained = (
                f"{len(records)} arms, variance explained {figure(min(some), 6)} to "
                f"{figure(max(some), 6)}"
            )
        done = f"{record['step']:,}".rjust(len(f"{steps:,}"))
        left = (steps - record["step"]) / self.speed(record["step"])
        most_dead = max(record["dead_share"] for record in records)
        self._progress.show(
            f"step {done}/{steps:,}   {explained}   {duration(left):>6} left   "
            f"{tokens_per_s:>9,.0f} tokens/s   loss {figure(record['loss'], 9)}   "
            f"L0 {figure(record['l0'], 6)}   dead {most_dead:>5.1%}   lr {record['lr']:.2e}",
            share=record["step"] / steps,
            last=record["step"] == steps,
        )
        self._new.clear()
