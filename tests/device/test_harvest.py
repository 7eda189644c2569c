"""Harvests on a card that is not there: the CPU's rows, and no wait that is not told."""

import numpy as np
import pytest
import torch

from residual_saes.data import device as devices
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import MLP_OUT, RESID_POST, HookPoint
from residual_saes.data.text.sources import TinyText
from residual_saes.harvest import plan
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.forward import batch_residuals
from residual_saes.harvest.isolation import forward_inputs
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import ModelConfig, load
from tests.conftest import make_spine
from tests.device.card import FROM_HOST, Card
from tests.harvest.models import save_model

SETTINGS = {"context": 64, "unit": 256, "chunk": 64}


def harvested(folder, device):
    lm = load(ModelConfig(EMBEDDED, dtype="float32", device=device))
    sites = (RESID_POST, MLP_OUT)
    return harvest(HarvestConfig(folder, (2,), 512, sites=sites, **SETTINGS), lm, TinyText())


def test_a_store_has_the_cpus_rows(tmp_path):
    here = harvested(tmp_path / "cpu", "cpu")
    with Card() as card:
        there = harvested(tmp_path / "card", str(devices.torch_device("cuda:1")))
    for point in here.points:
        for unit in range(here.units):
            assert np.array_equal(here.residuals(point, unit), there.residuals(point, unit))
    assert card.hidden == []


@pytest.mark.parametrize("family", ["embedded", "llama"])
def test_passes_have_the_cpus_rows(family, tmp_path):
    folder = EMBEDDED if family == "embedded" else str(save_model(tmp_path / "model", family))
    tokens, document = make_spine(4, 32, np.random.default_rng(0))
    starts = np.diff(document, axis=1, prepend=-1) > 0
    with Card() as card:
        on_card = load(
            ModelConfig(folder, dtype="float32", device=str(devices.torch_device("cuda:1")))
        )
        lm, point = load(ModelConfig(folder, dtype="float32")), HookPoint(1)
        for isolation in ("packed", "padded", "alone"):
            passes = forward_inputs(tokens, starts, isolation)
            lm.isolation = on_card.isolation = isolation
            expected = batch_residuals(lm, passes, [point])[point]
            card.waits.clear()
            found = batch_residuals(on_card, passes, [point])[point]
            waits = [wait for wait in card.waits if wait.what != FROM_HOST]
            assert torch.equal(found.cpu(), expected)
            assert all(wait.told for wait in waits)
            assert waits == [] or isolation != "packed"


def test_a_plan_looks_at_its_own_card():
    with Card() as card:
        device = devices.own_device("cuda:1")
        assert devices.free_bytes(device) == 60 << 30
        lm = load(ModelConfig(EMBEDDED, dtype="float32", device="cuda:1"))
        config = HarvestConfig("s", (2,), 512, **SETTINGS)
        assert plan.probe(lm, config) > 0
    assert card.hidden == []


def test_each_rank_of_a_node_has_its_own_card(monkeypatch):
    """And opens no context on card 0: the card that is not there finds that."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with Card():
        assert devices.own_device(None) == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 1
        torch.zeros(2, device="cuda")
        torch.cuda.Event().record()
