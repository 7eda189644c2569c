"""Whether two versions leave the same bytes.

`python -m tests.bench.same_bytes OLD NEW [--work DIR] [--only NAME,...]` runs the same commands
with two checkouts, in DIR/old and DIR/new, on the embedded model. Each comparison of what they
leave is one line: `same`, or `DIFFERS` with the first difference. The exit code is 1 if anything
differs. DIR/old is used again, unless OLD's code or the steps have changed. DIR/new is made anew.
NAME is a step, such as `train.rows`, or a group of steps. What a step needs is not compared.

    harvest   All files of a store but its claims and temporaries. A ring's watermark and readers
              are left out, and its shards are compared where both sides still have them.
    train     sae_final.pt, metrics.jsonl, config.yaml and the tensors of the last two checkpoints.
    handed    OLD's stores, its finished run and one that it stopped go to both sides. They add a
              layer, ask for the status, measure the finished run and finish the other one.
    study     The figures in NAME.json, wherever it lies below the run, but for what is VOLATILE.
              A study's other files by their names, but for Markdown, pictures, and caches, which
              have a digest in their names. What NEW alone has is no difference. All of exports.
    extra     The same of studies that make other projects' files. They run if they are named.

Not compared are: what is printed, reports and cards, several processes, object stores, GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.harvest.models import save_model

PACKAGES = ("data", "harvest", "train", "analyze", "conf", "hydra_plugins")
TIMEOUT_S, POLL_S = 600, 0.002  # of one command; while one is awaited
HARVEST = "harvest device=cpu text=tiny model=tiny chunk=64"
SMALL = f"{HARVEST} context=64 unit=512 batch=8"
MAIN = f"{HARVEST} context=128 unit=1024 batch=16 tokens=32768 codec=blosc"
INT8 = f"{SMALL} tokens=4096 codec=int8"
LINEAR = "model.path=../models/linear model.dtype=float32 layer=[1,2]"
RING = f"{SMALL} tokens=6e3 layer=3 max_bytes=480000 store=stores/ring.zarr"
RHYTHM = "log_every=7 eval_every=100 eval_rows=500 checkpoint_every=90"
RECIPE = f"device=cpu sae.d_sae=96 sae.k=6 sae.k_aux=16 {RHYTHM}"
TINY = f"{RECIPE} sae=tiny optim=tiny sae.dead_after=500"
FOLLOW = f"train {TINY} batch=64 store=stores/ring.zarr run=runs/ring"
ARMS = "sae.activation=batchtopk,matryoshka optim.lr=1e-2,3e-3 sae.nested=3"
SWEEP = "runs/blosc_tiny_L5"  # where training puts a sweep
CUT = f"train {TINY} layer=5 batch=64 tokens=64000 store=handed/blosc.zarr run=handed/cut"
LAYER = f"{INT8} layer=8 store=handed/int8.zarr"
LOOK = "harvest text=tiny model=tiny store=handed/blosc.zarr action=status"
MEASURE = "analyze device=cpu study=quality run=handed/topk store=handed/blosc.zarr"
ANSWERS = "answers.questions=60 answers.new_tokens=64 answers.batch=60"
STEER = "study.scales=[5] study.n_random=1 study.n_shuffled=1 study.train=0.5 study.dev=0.3"
COMPARE = f"analyze device=cpu study=sweep runs={SWEEP}"
TO_ALL = "train.export run=runs/topk to=all"
TO_SOME = "train.export run=runs/jumprelu to=[saelens,dictionary_learning,safetensors]"
SHOWN = "study.catalogue study.contrast study.reason_score study.stability"  # in the browser


class Step(NamedTuple):
    """Commands that belong together, and what is compared of what they leave."""

    name: str
    commands: tuple[str, ...]  # of `python -m`
    same: str = ""  # what is compared, as KIND:PATH or figures:RUN:STUDY
    needs: str = ""  # steps before it
    way: str = "plain"  # of WAYS


def harvest(name: str, *commands: str, way: str = "plain") -> Step:
    """A store of its own."""
    store = f"stores/{name}.zarr"
    asked = tuple(f"{command} store={store}" for command in commands)
    return Step(f"harvest.{name}", asked, f"store:{store}", way=way)


def train(name: str, settings: str, sweep: str = "") -> Step:
    """A run on the blosc store, or a sweep."""
    run, last = sweep or f"runs/{name}", "-m" if sweep else f"run=runs/{name}"
    command = f"train {settings} layer=5 batch=128 store=stores/blosc.zarr {last}"
    return Step(f"train.{name}", (command,), f"runs:{run}", "harvest.blosc")


def study(name: str, settings: str = "", needs: str = "", group: str = "study") -> Step:
    """A study of the TopK run."""
    command = f"analyze device=cpu run=runs/topk study={name} {settings}"
    same = f"figures:runs/topk:{name} files:runs/topk/studies/{name}"
    return Step(f"{group}.{name}", (command,), same, f"train.topk {needs}")


STEPS = [
    harvest("none", f"{SMALL} tokens=4096 codec=none layer=[5,8]"),
    harvest("blosc", f"{MAIN} layer=5", f"{MAIN} layer=8"),
    harvest("int8", f"{INT8} layer=5"),
    harvest("padded", f"{SMALL} tokens=2048 {LINEAR}", way="padded"),
    Step("harvest.ring", (RING, FOLLOW), "ring:stores/ring.zarr runs:runs/ring", way="ring"),
    train("topk", TINY),
    train("reference", f"{RECIPE} sae=topk_32k"),
    train("jumprelu", f"{TINY} sae.activation=jumprelu"),
    train("rows", f"{RECIPE} sae=rows_32k optim=rows sae.dead_after=100"),
    train("bf16", f"{TINY} train.matmul=bf16 sae.aux_norm=raw optim.decay=linear"),
    train("sweep", f"{ARMS} {TINY}", SWEEP),
    Step("handed.made", (CUT,), "", "harvest.blosc harvest.int8 train.topk", "handed"),
    Step("handed.resumed", (CUT,), "runs:handed/cut", "handed.made"),
    Step("handed.layer", (LAYER,), "store:handed/int8.zarr", "handed.made"),
    Step("handed.opened", (LOOK, MEASURE), "figures:handed/topk:quality", "handed.made"),
    study("quality"),
    study("splice", "study.tokens=1000"),
    study("gsm8k", ANSWERS),
    study("contrast", f"{ANSWERS} study.permutations=50 study.min_firing=2", "study.gsm8k"),
    study("steering", f"{ANSWERS} {STEER}", "study.gsm8k"),
    study("stage_gate", f"{ANSWERS} study.draws=50 study.min_firing=2", "study.gsm8k"),
    study("logit_lens", "study.prompts=20 study.tokens=48 study.target=digit"),
    study("reason_score", "study.words=[more,left] study.draws=500"),
    study("catalogue", "study.top=5 study.quantiles=4 study.each=2"),
    study("stability", "study.other=runs/jumprelu", "train.jumprelu"),
    study("saebench", needs="study.splice"),
    Step("study.sweep", (COMPARE,), f"figures:{SWEEP}:sweep", "train.sweep"),
    Step("study.export", (TO_ALL,), "tree:runs/topk/export", "train.topk"),
    Step("study.export_some", (TO_SOME,), "tree:runs/jumprelu/export", "train.jumprelu"),
    *(study(name, "", SHOWN, "extra") for name in ("browser", "delphi", "neuronpedia")),
]


class Failed(SystemExit):
    """A command did not end as it should."""


class Side:
    """A checkout, and the folder in which its commands run."""

    def __init__(self, name: str, checkout: Path, work: Path) -> None:
        self.name, self.checkout, self.work, self.spent = name, checkout.resolve(), work, 0.0
        self.folder, self.log = work / name, work / name / "log.txt"
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.checkout)}
        self._how: Any = {"cwd": self.folder, "env": os.environ | fixed}
        key, parts = self.folder / "key", map(version, ("torch", "numpy", "transformers"))
        now = hashlib.sha256("".join([*parts, repr(STEPS)]).encode())
        for path in sorted(path for name in PACKAGES for path in (checkout / name).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                now.update(f"{path.relative_to(checkout)}\n".encode() + path.read_bytes())
        if name == "new" or not key.exists() or key.read_text() != now.hexdigest():
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / "done").mkdir(parents=True)
            key.write_text(now.hexdigest())
        self._require_own_code()

    def _require_own_code(self) -> None:
        """Stop if Python would import a package from elsewhere."""
        places = "[next(iter(find_spec(name).submodule_search_locations)) for name in names]"
        code = f"from importlib.util import find_spec; names = {PACKAGES}; print(*{places})"
        found = subprocess.check_output([sys.executable, "-c", code], text=True, **self._how)
        if found.split() != [str(self.checkout / name) for name in PACKAGES]:
            raise Failed(f"with {self.checkout} Python would import {found}")

    def do(self, step: Step) -> None:
        """Do a step, unless it was done."""
        marker, began = self.folder / "done" / step.name, time.monotonic()
        if not marker.exists():
            WAYS[step.way](self, step)
            marker.touch()
        self.spent += time.monotonic() - began

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """Begin `python -m COMMAND`. What it says goes to the side's log."""
        asked = [sys.executable, "-m", *shlex.split(command)]
        with self.log.open("a") as log:
            print("\n$", *asked[1:], file=log, flush=True)
            return subprocess.Popen(asked, stdout=log, stderr=log, **self._how)

    def finish(self, process: subprocess.Popen[bytes], code: int = 0) -> None:
        """Wait for the end of a command, which must be `code`."""
        try:
            found = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            found = process.wait()
        if found != code:
            last = self.log.read_text().strip().rpartition("\n")[2]
            raise Failed(f"a command of {self.name} ended with {found}: {last}")

    def wait_for(self, pattern: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process has made a file."""
        while not any(self.folder.glob(pattern)):
            if process.poll() is not None:
                raise Failed(f"a command of {self.name} ended before it made {pattern}")
            time.sleep(POLL_S)


def plain(side: Side, step: Step) -> None:
    """One command after the other."""
    for command in step.commands:
        side.finish(side.start(command))


def padded(side: Side, step: Step) -> None:
    """The same, with a model with linear attention, which is made once."""
    if not (side.work / "models").exists():
        fresh = Path(tempfile.mkdtemp(dir=side.work))
        save_model(fresh / "linear", "qwen3_5")
        fresh.rename(side.work / "models")
    plain(side, step)


def ring(side: Side, step: Step) -> None:
    """Harvest round a ring, and train behind it."""
    harvesting = side.start(step.commands[0])
    try:
        side.wait_for("stores/ring.zarr/commits/ring.json", harvesting)
        side.finish(side.start(step.commands[1]))
        side.finish(harvesting)
    finally:
        harvesting.kill()
        harvesting.wait()


def handed(side: Side, step: Step) -> None:
    """Give a side what OLD has made: stores, a finished run, and one that is stopped here."""
    given, here = side.work / "handed", side.folder / "handed"
    shutil.rmtree(here, ignore_errors=True)
    if side.name == "old":
        shutil.rmtree(given, ignore_errors=True)
        for path in ("stores/blosc.zarr", "stores/int8.zarr", "runs/topk"):
            studies = shutil.ignore_patterns("studies", "export", "quality.*")
            shutil.copytree(side.folder / path, here / Path(path).name, ignore=studies)
        training = side.start(step.commands[0])
        side.wait_for("handed/cut/checkpoint/*.json", training)
        training.send_signal(signal.SIGTERM)
        side.finish(training, 128 + signal.SIGTERM)
        here.rename(given)
    shutil.copytree(given, here)


WAYS = {way.__name__: way for way in (plain, padded, ring, handed)}

# By kind of folder, which files are not compared, and which ones may be on one side alone.
PASSING = r"commits/claims|(.*/)?\.[^/]*\.tmp"
TIMED = rf"{PASSING}|commits/ring\.json|commits/readers/.*"
# The records of a run have the digest of its timings.jsonl.
RECORDS = r"digests\.json|checkpoint/step_\d+\.json"
FOUND = r"(studies|export)/.*|quality\..*|(timings|metrics)\.jsonl|sae_final\.pt"
BESIDE = rf"{PASSING}|{RECORDS}|{FOUND}"
TREES = {"store": (PASSING, ""), "ring": (TIMED, r"layer_\d+/c\..*"), "tree": ("", "")}
SEEN = (
    r".*\.(md|svg)|digests\.json|.*-[0-9a-f]{12}\.\w+"  # of a study: what is looked at, and caches
)
# By the clock, the place, or the bytes of another study's JSON. Of absolute paths names count.
VOLATILE = {"seconds", "tokens_per_s", "folder", "eval_id", "datetime_epoch_millis"}


def in_bytes(old: Path, new: Path) -> str | None:
    """The first byte that differs in two files."""
    if not (old.is_file() and new.is_file()):
        return f"is not there in {'old' if new.is_file() else 'new'}"
    a, b = old.read_bytes(), new.read_bytes()
    if a == b:
        return None
    differ = (at for at, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
    at = next(differ, min(len(a), len(b)))
    near = slice(max(0, at - 20), at + 20)
    return f"byte {at} of {len(a)} and {len(b)}: {a[near]!r} and {b[near]!r}"


def in_tree(old: Path, new: Path, left_out: str, either: str) -> str | None:
    """The first file that differs in two folders."""
    sides = [{f"{p.relative_to(top)}" for p in top.rglob("*") if p.is_file()} for top in (old, new)]
    names = sorted(name for name in set.union(*sides) if not re.fullmatch(left_out, name))
    for name in names:
        alone = name not in sides[0] & sides[1] and re.fullmatch(either, name)
        if not alone and (said := in_bytes(old / name, new / name)):
            return f"{name}: {said}"
    return None if names else "there are no files"


def in_sae(old: Path, new: Path) -> str | None:
    """The first tensor that differs in two SAEs. The first byte, if none does."""
    if (said := in_bytes(old, new)) and old.is_file() and new.is_file():
        ours, theirs = (torch.load(path, weights_only=True) for path in (old, new))
        for name in {**ours, **theirs}:
            a, b = (torch.as_tensor(side.get(name, ())) for side in (ours, theirs))
            if a.shape != b.shape:
                return f"{name} has shape {[*a.shape]} and {[*b.shape]}"
            if a.numpy().tobytes() != b.numpy().tobytes():
                return f"{name} differs, by {(a - b).abs().max().item():.2g} at most"
    return said


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """The plain values in a JSON value that are not volatile, with their places."""
    if not value or not isinstance(value, dict | list):
        yield where, repr(re.sub("^/.*/", "/", value) if isinstance(value, str) else value)
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        if key not in VOLATILE:
            yield from leaves(one, f"{where}/{key}")


def in_values(old: Any, new: Any) -> str | None:
    """The first difference of two JSON values."""
    a, b = dict(leaves(old)), dict(leaves(new))
    at = next((at for at in a | b if a.get(at) != b.get(at)), None)
    return None if at is None else f"{at} is {a.get(at)!s:.80} and {b.get(at)!s:.80}"


def figures(run: Path, name: str) -> Any:
    """A study's figures, from its newest NAME.json."""
    found = max(run.rglob(f"{name}.json"), key=lambda path: path.stat().st_mtime, default=None)
    value = json.loads(found.read_bytes()) if found else {}
    return value.get("figures", {key: one for key, one in value.items() if key != "sae"})


def in_others(files: list[Path], new: Path) -> str | None:
    """The first file that differs from all of its name in a study's folder."""
    for old in files:
        said = ["is not there in new"]
        for there in sorted(new.rglob(old.name), key=lambda p: p.parent.name == old.parent.name):
            values = (json.loads(path.read_bytes()) for path in (old, there))
            said.append(in_values(*values) if old.suffix == ".json" else in_bytes(old, there))
        if None not in said:
            return f"{old.name}: {said[-1]}"
    return None


def comparisons(asked: str, old: Path, new: Path) -> Iterator[tuple[str, str | None]]:
    """What is compared as KIND:PATH, each with its first difference."""
    kind, path, *study = asked.split(":")
    a, b = old / path, new / path
    if kind in TREES:
        yield path, in_tree(a, b, *TREES[kind])
    elif kind == "figures":
        found = figures(a, *study)
        yield "figures", in_values(found, figures(b, *study)) if found else "there are none in old"
    elif kind == "files":
        files = [file for file in sorted(a.rglob("*")) if file.is_file() and file.stem != a.name]
        if files := [file for file in files if not re.fullmatch(SEEN, file.name)]:
            yield f"{len(files)} other files", in_others(files, b)
    elif kind == "runs":
        runs = [file.parent for file in (*a.glob("config.yaml"), *sorted(a.glob("*/config.yaml")))]
        for run in runs or [a]:
            there, name = new / run.relative_to(old), ",".join(run.name.split(",")[:2])
            yield f"{name}/sae_final.pt", in_sae(run / "sae_final.pt", there / "sae_final.pt")
            yield f"{name}/metrics.jsonl", in_bytes(run / "metrics.jsonl", there / "metrics.jsonl")
            yield f"{name}/config.yaml, checkpoint", in_tree(run, there, BESIDE, "")


def chosen(only: str | None) -> list[str]:
    """The names of the steps that are compared."""
    groups = {step.name: step.name.partition(".")[0] for step in STEPS}
    asked = set(only.split(",")) if only else {*groups.values()} - {"extra"}
    if unknown := asked - {*groups, *groups.values()}:
        raise SystemExit(f"no such step: {', '.join(unknown)}; there are {', '.join(groups)}")
    return [name for name, group in groups.items() if {name, group} & asked]


def compare(old: Side, new: Side, names: list[str]) -> Iterator[tuple[str, str | None]]:
    """Do the steps and what they need on both sides. Each comparison, with its difference."""
    wanted, failed = set(names), set[str]()
    for step in reversed(STEPS):
        wanted.update(step.needs.split() if step.name in wanted else ())
    for step in (step for step in STEPS if step.name in wanted):
        old.do(step)
        try:
            if lacking := failed & {*step.needs.split()}:
                raise Failed(f"it needs {', '.join(lacking)}")
            new.do(step)
        except Failed as error:
            failed.add(step.name)
            yield f"{step.name}: not done in new", str(error)
            continue
        for asked in step.same.split() if step.name in names else ():
            for what, said in comparisons(asked, old.folder, new.folder):
                yield f"{step.name}: {what}", said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.same_bytes")
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="another checkout")
    parser.add_argument("--work", type=Path, help="folder for the results; by default none is kept")
    parser.add_argument("--only", help="steps or groups of steps, by commas")
    given = parser.parse_args()
    names, count, differ = chosen(given.only), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).resolve()
        old, new = Side("old", given.old, work), Side("new", given.new, work)
        for what, said in compare(old, new, names):
            print(f"DIFFERS  {what}: {said}" if said else f"same     {what}", flush=True)
            count, differ = count + 1, differ + bool(said)
    spent = f"old {old.spent:.0f} s, new {new.spent:.0f} s"
    print(f"{count} comparisons: {count - differ} same, {differ} differ ({spent})")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
