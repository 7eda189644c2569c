"""A run on the embedded model that everything was done with: each kind of file is there."""

from __future__ import annotations

from pathlib import Path

from tests.forked import run_forked

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


def do(root: Path, *commands: tuple[str, ...]) -> None:
    """Do commands in `root`, each in a child."""
    for command in commands:
        done = run_forked(*command, cwd=root)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
