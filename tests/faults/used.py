"""A run on the embedded model that everything was done with: each kind of file is there."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.faults.child import ask
from tests.forked import run_here

STORE, RUN = "activations/s.zarr", "runs/a"
_TRAIN = (
    *("-m", "train", f"store={STORE}", "layer=5", "sae=tiny", "optim=tiny", "sae.d_sae=64"),
    *("sae.k=4", "sae.k_aux=8", "batch=256", "eval_every=20", "checkpoint_every=10", "device=cpu"),
)
_STUDY = ("-m", "analyze", f"run={RUN}", "device=cpu")
_ANSWERS = ("problems=tiny", "answers.questions=48", "answers.new_tokens=24")
_SMALL = (
    *("~study.gsm8k", "study.quality.rows=1024", "study.contrast.permutations=19"),
    *("study.contrast.min_firing=1", "study.steering.scales=[2]", "study.steering.n_random=1"),
    *("study.steering.n_shuffled=1", "study.stage_gate.min_firing=1", "study.stage_gate.draws=20"),
    *("study.logit_lens.prompts=2", "study.logit_lens.target=digit", "study.splice.tokens=100"),
    *("study.reason_score.words=[more,left]", "study.catalogue.rows=2048"),
)
TRAINING: tuple[tuple[str, ...], ...] = (
    (
        *("-m", "harvest", "model=tiny", "text=tiny", "tokens=16384", "context=128", "unit=2048"),
        *("layer=5", f"store={STORE}", "device=cpu"),
    ),
    (*_TRAIN, f"run={RUN}"),
    (*_TRAIN, "run=runs/b", "seed=1"),
)
STUDIES: tuple[tuple[str, ...], ...] = (
    (*_STUDY, "study=all", *_ANSWERS, *_SMALL),
    (*_STUDY, "study=gsm8k", *_ANSWERS),
    (*_STUDY, "study=catalogue", "study.rows=1024"),  # the other result is set aside
    (*_STUDY, "study=stability", "study.other=runs/b"),
    (*_STUDY, "study=browser"),
    (*_STUDY, "study=delphi"),
    (*_STUDY, "study=neuronpedia"),
    (*_STUDY, "study=report"),
    ("-m", "analyze", "study=sweep", "runs=runs/*"),
)
EXPORTS: tuple[tuple[str, ...], ...] = (
    ("-m", "train.export", f"run={RUN}"),
    ("-m", "train.publish", f"run={RUN}", "repo=someone/some-sae"),
    (  # a run that is made of another library's files
        *("-m", "analyze", "study=quality", f"run=saelens:{RUN}/export/saelens"),
        *(f"store={STORE}", "study.rows=1024", "device=cpu"),
    ),
)


class Done(NamedTuple):
    """How a command ended."""

    code: int
    said: str


def done(root: Path, *command: str, limit_s: int = 120) -> Done:
    """Do a command in `root`, in a child. What it imports is there in the children after it."""
    answer = ask(lambda: (run_here(*command, cwd=root), sorted(sys.modules)), limit_s)
    if answer.value is None:
        return Done(99, answer.broken or answer.said)
    code, modules = answer.value
    for name in modules:
        if name not in sys.modules:
            with suppress(Exception):  # one that a command has made itself
                importlib.import_module(name)
    return Done(code, answer.said)


def do(root: Path, *commands: tuple[str, ...]) -> None:
    """Do commands in `root`, none of which may fail."""
    for command in commands:
        code, said = done(root, *command)
        assert code == 0, f"{' '.join(command)}\n{said[-4000:]}"
