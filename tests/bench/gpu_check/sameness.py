"""The same bits again: of kernels, of training steps, and of a run that was killed and went on."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residual_saes.train import kernels, objective, product
from residual_saes.train.run import CHECKPOINTS, METRICS
from residual_saes.train.sae_file import FILE
from tests.bench.gpu_check.arithmetic import RUN, TOY, Size, Way, kept_of, pinned, ways_on
from tests.bench.gpu_check.notes import Notes
from tests.bench.gpu_check.training import begun, shape_of
from tests.bench.kernel_speed import Problem

OBJECTIVES = Size(2560, 8192, 64, 2048)
_SMALL: Any = {"size": TOY, "objectives": Size(16, 256, 64, 32), "steps": 2}
TINY = {"repeated": _SMALL, "resumed": {"steps": 40}}
_TRIES = 3  # until a kill comes before the run's end
_DAY = 86_400 * 10**6  # tokens, more than any dead_after

# -- kernels and steps -----------------------------------------------------------------------------


@torch.no_grad()
def repeated(
    device: torch.device,
    notes: Notes,
    size: Size = RUN,
    objectives: Size = OBJECTIVES,
    steps: int = 20,
) -> None:
    """Kernels and training steps, twice each."""
    with notes.piece("kernels"):
        notes.check("kernels: the same bits twice", differing(_kernel_results, size, device))
    fp32 = ways_on(device)["fp32"]
    runs: list[tuple[str, Size, Way, str]] = []
    for name, way in ways_on(device).items():
        of_run = size if way.matmul == "fp32" else objectives  # a trainer takes seconds to begin
        runs.append((f"topk_32k, {name}", of_run, way, "topk_32k"))
    for kind in objective.names():
        sae = "rows_32k" if kind == "topk" else f"{kind}_32k"
        runs.append((sae, objectives, fp32, sae))
    for what, of_run, way, sae in runs:
        with notes.piece(what), pinned(way, of_run, device):
            differ = differing(_stepped, of_run, steps, way, sae, device)
            notes.check(f"{steps} steps of {what}: the same bits twice", differ)


def differing(make: Callable[..., Iterator[tuple[str, Tensor]]], *given: Any) -> str | None:
    """The names of those tensors that have other bits the second time; None: there are none."""
    first = [(name, tensor.clone()) for name, tensor in make(*given)]
    names = []
    for (name, one), (_, other) in zip(first, make(*given), strict=True):
        # Not as numbers: -0 is not 0 here, and NaN is itself.
        if not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            names.append(name)
    return ", ".join(names) or None


def _kernel_results(size: Size, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    p = Problem(device, *size)
    kept, bags = kept_of(p), kernels.group_by_latent(p.indices, p.d_sae)
    yield "topk", kernels.topk(p.pre, p.k)[1]
    yield "decode", kernels.decode(kept, p.W_dec)
    yield "values_gradient", kernels.values_gradient(p.upstream, kept, p.W_dec)
    yield "weight_gradient", kernels.weight_gradient(p.x, kept.values, kept.rows, bags)
    yield "latent_sums", kernels.latent_sums(kept.values, kept.indices, p.d_sae, bags)
    for name, way in ways_on(device).items():
        with pinned(way, size, device):
            found = product.encode(p.x, p.W_dec, p.b_enc, p.k, way.matmul)
        yield f"encode, {name}", found.values
        yield f"latents, {name}", found.indices


def _stepped(
    size: Size, steps: int, way: Way, sae: str, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The state after some steps; a quarter of the latents counts as dead at first."""
    trainer, batch = begun(shape_of(size, way, device, sae))
    trainer.state.silent[::4].fill_(_DAY)
    for _ in range(steps):
        trainer.step_(batch())
    yield from trainer.state.tensors().items()


# -- a run that is killed --------------------------------------------------------------------------


def resumed(device: torch.device, notes: Notes, steps: int = 400) -> None:
    """A training run that is killed and started again ends as one that was left alone."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        store = harvested(folder, device)
        train = ["-m", "train", "sae=tiny", "optim=tiny", f"store={store}", f"device={device}"]
        train += [f"tokens={64 * steps}", "batch=64", "checkpoint_every=5", "eval_every=50"]
        whole = folder / "whole"
        undisturbed = start(*train, f"run={whole}", files=said(folder))
        for number in range(_TRIES):
            run = folder / f"killed_{number}"
            child = start(*train, f"run={run}", files=said(folder))
            if killed(child, run / CHECKPOINTS):
                break
        end(undisturbed, folder)
        if (run / FILE).exists():
            notes.check("killed and resumed", f"{_TRIES} runs ended before they were killed")
            return
        at = max(file.stem for file in (run / CHECKPOINTS).glob("*.json"))
        end(start(*train, f"run={run}", files=said(folder)), folder)
        differ = []
        for name in (FILE, METRICS):
            if (whole / name).read_bytes() != (run / name).read_bytes():
                differ.append(name)
        notes.check("killed and resumed: the same files", ", ".join(differ) or None, f"from {at}")


def harvested(folder: Path, device: torch.device) -> Path:
    """A small store of the embedded model's residuals."""
    store = folder / "store.zarr"
    harvest = ["-m", "harvest", "model=tiny", "text=tiny", "tokens=32768", "context=64"]
    end(start(*harvest, f"store={store}", f"device={device}", files=said(folder)), folder)
    return store


def said(folder: Path) -> list[Path]:
    return [folder / "stdout", folder / "stderr"]


def start(*command: str, files: list[Path]) -> int:
    """Start `python COMMAND`, with stdout and stderr to `files`; the process id."""
    actions = []
    for number, file in enumerate(files, 1):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions.append((os.POSIX_SPAWN_OPEN, number, str(file), flags, 0o600))
    given = [sys.executable, *command]
    return os.posix_spawn(sys.executable, given, os.environ, file_actions=actions)


def end(child: int, folder: Path) -> None:
    """Wait for a command's end.

    Raises:
        RuntimeError: it failed; with the last line that was said.
    """
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        lines = said(folder)[1].read_text().strip().splitlines()
        raise RuntimeError(f"a command ended with {code}: {lines[-1] if lines else 'silently'}")


def killed(child: int, checkpoints: Path) -> bool:
    """Kill a run once it has two checkpoints; whether it had not ended by itself."""
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if len([*checkpoints.glob("*.json")]) >= 2:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        time.sleep(0.002)
    return False
