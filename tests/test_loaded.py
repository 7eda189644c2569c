"""Which libraries a command loads: one that it does not need costs seconds at every start."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from numpy.typing import NDArray

from residual_saes.data import child
from residual_saes.data.store.store import Store
from residual_saes.data.text.sources import TinyText
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest.tokens import Tokenizer
from tests.conftest import make_manifest, make_store

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor"}
# Of studies with tests, of tables, of language models.
OF_OTHERS = {"scipy.stats", "sklearn", "pandas", "pyarrow", "transformers", "datasets"}
SAY = "import json; print(json.dumps(sorted(sys.modules)))"
COMMANDS = f"""
import json, sys
from residual_saes.conf.console import run
for name, words in json.load(sys.stdin):
    sys.argv[1:] = words
    run(name)
{SAY}
"""
READER = f"""
import pickle, sys
from residual_saes.harvest.spine_writer import Store, write_spine
name, *work = pickle.load(sys.stdin.buffer)
write_spine(Store.open(name), *work)
{SAY}
"""


def loaded(code: str, told: bytes) -> set[str]:
    """The modules that an interpreter has loaded at the end of `code`."""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=child.environment(),
        input=told,
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_training_and_a_study_load_no_compiler_and_nothing_of_other_studies(
    tmp_path: Path, random_bits: NDArray
) -> None:
    make_store(tmp_path / "s.zarr", random_bits)
    run, device = f"run={tmp_path / 'run'}", "device=cpu"
    sizes = ["sae=tiny", "sae.d_sae=16", "sae.k=2", "batch=64", "tokens=640", "optim.clip_norm=1"]
    train = [f"store={tmp_path / 's.zarr'}", *sizes, run, device]
    commands = [("train", train), ("analyze", ["study=quality", run, device])]
    there = loaded(COMMANDS, json.dumps(commands).encode())
    assert (tmp_path / "run/studies/quality").is_dir()
    # A study's table is written by pyarrow, behind its figures.
    assert "torch" in there and not there & (COMPILER | OF_OTHERS - {"pyarrow"})


def test_the_reader_of_a_text_loads_no_torch(tmp_path: Path) -> None:
    manifest = make_manifest(8, tokens=640, context=16, unit=64, chunk=16)
    store = Store.open_or_create(tmp_path / "s.zarr", manifest)
    work = pickle.dumps((store.name, TinyText(), Tokenizer.load(MODEL_DIR)))
    there = loaded(READER, work)
    assert Store.open(tmp_path / "s.zarr").spine_complete
    assert "numpy" in there and not there & (OF_OTHERS | {"torch", "hydra", "yaml"})


def test_training_leaves_torch_as_deterministic_as_it_was() -> None:
    from residual_saes.train.loop import _deterministic

    former = torch.get_deterministic_debug_mode()
    try:
        for mode in (0, 1, 2):
            torch.set_deterministic_debug_mode(mode)
            with _deterministic():
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(former)
