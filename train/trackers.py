"""A run's curves in other programs too: log=wandb, tensorboard or trackio.

They get the records of metrics.jsonl, from which a run that goes on is cut back to its checkpoint.
RUN/trackers.json says how many of them each program has. A repeated record is the same one, so it
is not sent again; what a program missed is sent at the next start. A program that fails costs a
line: training and metrics.jsonl go on. Nothing here decides a byte of the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from residual_saes.data import durable
from residual_saes.data.errors import SettingError, first_line
from residual_saes.data.journal import Record, tell
from residual_saes.train.run import read_config

FILE = "trackers.json"
PROJECT = "residual-saes"  # where the program's own variable names no other


class Tracker(Protocol):
    """A program that keeps curves of one run."""

    def send(self, number: int, record: Record) -> None:
        """Take record `number` of metrics.jsonl; one that it has changes nothing."""

    def close(self) -> None:
        """Take no more."""


class _TensorBoard:
    """Event files in RUN/tensorboard. A start purges the steps that are written again."""

    def __init__(self, run: Path, records: Sequence[Record], kept: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        have = min(kept["records"], len(records))
        first = records[have - 1]["step"] if have else 0
        kept["records"] = sum(record["step"] < first for record in records)
        make: Callable[..., Any] = SummaryWriter
        self._writer = make(str(run / "tensorboard"), purge_step=first)

    def send(self, number: int, record: Record) -> None:
        for name, value in _figures(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases, by an id that RUN/trackers.json keeps; its step is the record."""

    def __init__(self, run: Path, records: Sequence[Record], kept: dict[str, Any]) -> None:
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=kept["id"],
            name=run.name,
            group=run.parent.name or None,
            config=read_config(run)["settings"],
            dir=str(run),
            resume="allow",
            reinit="create_new",  # arms of a sweep are trained side by side
            settings=wandb.Settings(console="off", silent=True),
        )
        if not self._run.settings._offline:  # what arrived before a kill
            kept["records"] = self._run.step
        self._run.define_metric("*", step_metric="step")

    def send(self, number: int, record: Record) -> None:
        self._run.log({**_figures(record), "step": record["step"]}, step=number, commit=True)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of trackio, by its name; its step is the record."""

    def __init__(self, run: Path, records: Sequence[Record], kept: dict[str, Any]) -> None:
        trackio = import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        named = {"name": f"{run.name}-{kept['id']}", "group": run.parent.name or None}
        settings = read_config(run)["settings"]
        quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        settings = {"config": settings, "resume": "allow", **quiet}
        self._run = trackio.init(project=project, **named, **settings)
        # It writes half a second later, so a killed process may have lost the last records. Its
        # next step is how many it has.
        kept["records"] = min(kept["records"], getattr(self._run, "_next_step", len(records)))

    def send(self, number: int, record: Record) -> None:
        # It keeps `step` for its own counter, which is the record's number.
        self._run.log({**_figures(record), "optimizer_step": record["step"]}, step=number)

    def close(self) -> None:
        self._run.finish()


# The class of each; its name is that of the package that it needs.
_KINDS: dict[str, Callable[..., Tracker]] = {
    "wandb": _WandB,
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
}


def asked(value: Any) -> tuple[str, ...]:
    """The trackers that log= names.

    Raises:
        SettingError: one is not known, or its package is not installed.
    """
    names = list(map(str, value if isinstance(value, list) else [] if value is None else [value]))
    for name in names:
        if name not in _KINDS:
            raise SettingError(f"log={name} must be one of {', '.join(_KINDS)}, or a list of them")
        if find_spec(name) is None:
            raise SettingError(f"log={name}: {name} is not installed; run pip install {name}")
    return tuple(dict.fromkeys(names))


class Trackers:
    """The trackers of one run."""

    def __init__(self, names: Sequence[str], run: Path, records: Sequence[Record]) -> None:
        """Open them, and send what of `records` they lack: those that metrics.jsonl has."""
        self._run = run
        self._number = len(records)
        self._kept = _read(run / FILE) if names else {}
        self._open: dict[str, Tracker] = {}
        for name in names:
            kept = self._kept.setdefault(name, {"id": uuid4().hex[:8], "records": 0})
            with _Failing(self, name):
                self._open[name] = _KINDS[name](run, records, kept)
                for number in range(kept["records"], len(records)):
                    self._send(name, number, records[number])

    def note(self, record: Record) -> None:
        """Send the next record."""
        for name in list(self._open):
            with _Failing(self, name):
                self._send(name, self._number, record)
        self._number += 1

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with _Failing(self, name):
                tracker.close()
        self._open.clear()

    def _send(self, name: str, number: int, record: Record) -> None:
        kept = self._kept[name]
        if number >= kept["records"]:
            self._open[name].send(number, record)
            kept["records"] = number + 1
            durable.write(self._run / FILE, [json.dumps(self._kept).encode()])

    def drop(self, name: str) -> None:
        """Send it no more in this process."""
        self._open.pop(name, None)


class _Failing:
    """While open, whatever a tracker raises becomes one line, and it is dropped."""

    def __init__(self, trackers: Trackers, name: str) -> None:
        self._trackers = trackers
        self._name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        self._trackers.drop(self._name)
        reason = f"{kind.__name__}: {first_line(error)}"
        tell(
            f"warning: log={self._name} failed ({reason}); training goes on, and the next start of "
            "the run sends what is missing"
        )
        return True


def _figures(record: Record) -> dict[str, float]:
    """The numbers of a record by split and name; of several hook points by theirs."""
    figures: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            inner = _figures(value)
            figures |= {f"{record['split']}/{name}/{key}": inner[key] for key in inner}
        elif isinstance(value, int | float) and name != "step":
            figures[f"{record['split']}/{name}" if "split" in record else name] = value
    return figures


def _read(path: Path) -> dict[str, Any]:
    """What the trackers have; nothing if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_bytes())
        return kept if isinstance(kept, dict) else {}
    return {}
