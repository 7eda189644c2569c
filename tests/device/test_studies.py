"""Studies on a card that is not there: the CPU's figures, and no wait that is not told."""

import importlib
import shutil
from dataclasses import replace

import pytest
import torch

from residual_saes.analyze import results
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import device as devices
from residual_saes.data.model_path import EMBEDDED
from residual_saes.harvest.model import ModelConfig
from tests.analyze.conftest import tiny_run  # noqa: F401 (a fixture)
from tests.device.card import Card

ASKED = {"questions": 36, "new_tokens": 32, "batch": 36}
MODEL = ModelConfig(EMBEDDED, dtype="float32")
long = pytest.mark.long
EVERY = [
    ("quality", "quality", {"rows": 1024}),
    pytest.param("splice", "splice", {"tokens": 100}, marks=long),
    pytest.param("logit_lens.study", "logit_lens", {"prompts": 2, "tokens": 8}, marks=long),
    pytest.param("catalogue.study", "catalogue", {"rows": 1024, "logits": 3}, marks=long),
    pytest.param("contrast.study", "contrast", {"permutations": 19}, marks=long),
]


@pytest.mark.parametrize(("module", "name", "options"), EVERY)
def test_a_study_has_the_cpus_figures(module, name, options, tiny_run, tmp_path):  # noqa: F811
    definition = importlib.import_module(f"residual_saes.analyze.studies.{module}").DEFINITION

    def summary(device):
        run = tmp_path / device / "run"
        shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns(results.FOLDER))
        model = replace(MODEL, device=device)
        subject = Subject.open(run, None, torch.device(device))
        return Study(name, subject, options, model, "tiny", ASKED).perform(definition).summary

    expected = summary("cpu")
    with Card() as card:
        assert summary(str(devices.torch_device("cuda:1"))) == expected
    assert card.hidden == []
