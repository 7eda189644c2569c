"""SAEs of other libraries measured as runs of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from analyze.command import command
from analyze.peers import imported
from analyze.studies.quality import quality
from analyze.subject import Subject
from data.errors import PipelineError
from tests.analyze.conftest import LAYER, Made
from train.export.formats import FORMATS, About

ABOUT = About("nobody/none", LAYER, 32, "made up")


@pytest.fixture
def exported(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names of the made run's SAE in every format."""
    monkeypatch.chdir(tmp_path)
    names = {"reference": f"reference:{made.run}"}
    for name, each in FORMATS.items():
        for file, content in each.write(made.sae, ABOUT).items():
            (path := tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        names[name] = f"{name}:{path.parent}"
    return names


def test_a_foreign_sae_has_the_figures_of_the_same_one_as_a_run(
    exported: dict[str, str], made: Made, subject: Subject
) -> None:
    expected = quality(subject, 10**6)
    assert set(exported) == set(imported.READERS)
    for named in exported.values():
        assert imported.is_foreign(named)
        run = imported.run_of(named, made.store.name, None)
        found = quality(Subject.open(run, None, torch.device("cpu")), 10**6)
        assert found["variance_explained"]["as trained"]["centred"] == pytest.approx(
            expected["variance_explained"]["as trained"]["centred"], abs=1e-6
        )
        assert found["l0"] == pytest.approx(expected["l0"])
        before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
        assert imported.run_of(named, made.store.name, LAYER) == run
        assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before


def analyze(*overrides: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        command(OmegaConf.to_container(compose("analyze", list(overrides)), resolve=True))


def test_the_command_and_its_refusals(
    exported: dict[str, str], made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = exported["saelens"]
    analyze("study=quality", f"run='{named}'", f"store={made.store.name}")
    assert "variance explained, centred" in capsys.readouterr().out
    assert not imported.is_foreign("runs/saelens:x")
    for overrides, said in [
        ((f"run='{named}'",), "is measured on a store: give store="),
        (
            (f"run='{named}'", f"store={made.store.name}", "layer=4"),
            f"layer=4 is not in {made.store.name}; it has {LAYER}",
        ),
        (("run=saelens:/nowhere", f"store={made.store.name}"), "/nowhere/cfg.json cannot be read"),
        ((f"run={made.run}", "layer=3"), "layer=3 is for SAEs of other libraries"),
        (
            (f"run='{named}'", f"store={made.store.name}", "study=report"),
            "was not trained here and has no curves",
        ),
        (("run=saelenz:x", f"store={made.store.name}"), "saelenz: is none of saelens, "),
    ]:
        with pytest.raises(PipelineError, match=re.escape(said)):
            analyze(*overrides)
