"""The memory that studies say they take, beside what they take; and what is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from residual_saes.analyze import memory
from residual_saes.analyze.memory import Needed, tell_needed
from residual_saes.analyze.study import Study, find
from residual_saes.analyze.subject import Subject
from residual_saes.harvest.model import ModelConfig
from residual_saes.train.sae import SAE, SAEConfig
from tests.analyze.conftest import Made, write_run
from tests.conftest import make_store

D, F, K, UNIT, UNITS = 512, 8192, 64, 8192, 4
OTHER = "other"
STUDIES: dict[str, dict[str, Any]] = {
    "quality": {},
    "catalogue": {"logits": 0},
    "stability": {"other": OTHER},
}
# A process that does one study, and prints the bytes that it counted and those that it took.
_TAKEN = """
import json, re, sys
from pathlib import Path
import torch
from residual_saes.analyze.study import Study, find
from residual_saes.analyze.subject import Subject
from residual_saes.harvest.model import ModelConfig

def status(name):
    found = re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))

torch.set_num_threads(1)
name, options = sys.argv[1], json.loads(sys.argv[2])
definition = find(name)
before = status("VmRSS")
subject = Subject.open(Path("run"), None, torch.device("cpu"))
study = Study(name, subject, options, ModelConfig("nowhere/none"))
counted = definition.memory(study).bytes
study.perform(definition)
print(json.dumps([counted, status("VmHWM") - before]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on rows large enough to tell what they take from what libraries do."""
    root = tmp_path_factory.mktemp("memory")
    rows = torch.randn(UNIT * UNITS, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = rows.view(torch.uint16).numpy()
    store = make_store(root / "s.zarr", bits, context=256, unit=UNIT, chunk=1024)
    for seed, run in enumerate(("run", OTHER)):
        W_dec = torch.randn(F, D, generator=torch.Generator().manual_seed(seed))
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        config = SAEConfig(d_sae=F, k=K, k_aux=K, dead_after=1000)
        made = SAE.of(W_dec.T.clone(), W_dec, torch.zeros(F), torch.zeros(D), K)
        write_run(root / run, store, 3, config, made)
    return root


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_takes_what_it_says(name: str, large: Path) -> None:
    """Blocks of a megabyte on go back to the system at once, as those of true size do anyway."""
    threshold = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", _TAKEN, name, json.dumps(STUDIES[name])],
        cwd=large,
        env={**os.environ, **threshold},
        capture_output=True,
        text=True,
        check=True,
    )
    counted, taken = json.loads(done.stdout.splitlines()[-1])
    assert 0.7 * taken < counted < 1.3 * taken


def told(needed: Needed, capsys: pytest.CaptureFixture[str]) -> str:
    subject: Any = SimpleNamespace(device=torch.device("cpu"))
    tell_needed("shape", subject, needed)
    return capsys.readouterr().err


def test_what_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4e9)
    assert told(Needed(1.9e9, "study.rows"), capsys) == ""
    assert told(Needed(3.1e9, "study.rows"), capsys) == "study=shape needs about 3.1 GB\n"
    (line,) = told(Needed(5e9, "study.rows"), capsys).splitlines()
    assert "5 GB" in line and "4 GB" in line and "study.rows" in line


def test_a_study_says_it_before_it_begins(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "TOLD_BYTES", 0.0)
    subject = Subject.open(made.run, None, torch.device("cpu"))
    study = Study("quality", subject, {"rows": 999}, ModelConfig("nowhere/none"))
    definition = replace(find("quality"), run=lambda _: pytest.fail("begun"))
    with pytest.raises(pytest.fail.Exception):
        study.perform(definition)
    assert "study=quality needs about" in capsys.readouterr().err
