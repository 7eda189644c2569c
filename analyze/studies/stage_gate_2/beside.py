"""Processes that do a share of the arms beside the command's own.

A small model on a CPU keeps one core busy: two threads are slower than one. So `study.processes=2`
has two policies trained at a time. Such a process is `python -m` of worker.py. It reads one line
of JSON, does its arms as the command would, and leaves them where the command finds them. It says
nothing: an arm that it could not do is done again by the command, which says why. It ends with the
command at the latest, when its input ends.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import child
from residual_saes.data.errors import StopRequest
from residual_saes.data.journal import Progress
from residual_saes.harvest.model import ModelConfig

_WORKER = "residual_saes.analyze.studies.stage_gate_2.worker"
_POLL_S = 0.2


@contextmanager
def others(study: Study, processes: int) -> Iterator[list[subprocess.Popen[str]]]:
    """While open, `processes - 1` others do their shares of the arms. Each has one thread."""
    running: list[subprocess.Popen[str]] = []
    threads = torch.get_num_threads()
    try:
        if processes > 1:
            torch.set_num_threads(1)  # as the others: another number rounds otherwise
        for number in range(1, processes):
            running.append(_started({**_named(study), "share": number}))
        yield running
    finally:
        torch.set_num_threads(threads)
        for process in running:
            process.kill()
            process.communicate()  # its input closes


def wait(running: list[subprocess.Popen[str]], stop: StopRequest) -> None:
    """Until all have ended."""
    progress = Progress()
    for process in running:
        while process.poll() is None:
            stop.check()
            progress.show("waiting for the arms of the other processes")
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                continue
    progress.close()


def _started(asked: Mapping[str, Any]) -> subprocess.Popen[str]:
    """A process that was told what to do, and whose input stays open."""
    process = subprocess.Popen(
        child.command(_WORKER),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**child.environment(), "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # the terminal's Ctrl-C is for the command, which ends it
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    return process


def _named(study: Study) -> dict[str, Any]:
    """A study as one line can say it."""
    return {
        "run": str(study.subject.run.absolute()),
        "stores": [store.name for store in study.subject.stores],
        "name": study.name,
        "options": dict(study.options),
        "model": asdict(study.model),
        "problems": study.problems,
        "answers": dict(study.answers),
    }


def study_named(asked: Mapping[str, Any]) -> Study:
    """The study that a line names, as a worker reads it."""
    model = ModelConfig(**asked["model"])
    subject = Subject.open(Path(asked["run"]), asked["stores"], torch.device(model.device))
    names = ("name", "options", "problems", "answers")
    return Study(subject=subject, model=model, **{name: asked[name] for name in names})
