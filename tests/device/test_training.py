"""Trainings on a card that is not there end in the CPU's bits, and say each time they wait."""

import pytest
import torch

from residual_saes.data import device as devices
from residual_saes.train import objective
from residual_saes.train.arm import Arm
from residual_saes.train.loop import train
from residual_saes.train.trainer import Trainer
from tests.device.card import FROM_HOST, Card
from tests.train import killing
from tests.train.planted import PlantedLayers, PlantedMLP, planted_stream

AUX = {"d_sae": 48, "k": 2, "k_aux": 8, "dead_after": 2 * killing.BATCH, "aux_norm": "variance"}
MORE = {"resample": True, "rotate": True}
MLP, LAYERS = {"site": "mlp_in"}, {"layer": (21, 27)}
EVERY = {
    "topk": ({"activation": "topk", "init": "kaiming"}, {}),
    "hierarchical": ({"activation": "hierarchical", "nested": 2, **MORE}, {}),
    "batchtopk": ({"activation": "batchtopk", "init": "rows", **MORE}, {}),
    "jumprelu": ({"activation": "jumprelu", **MORE}, {}),
    "matryoshka": ({"activation": "matryoshka", "nested": 3}, {}),
    "gated": ({"activation": "gated", "l1_coef": 0.7, "aux_coef": 0.0, "resample": True}, {}),
    "skip": ({"kind": "transcoder", "skip": True, "init": "map", "resample": True}, MLP),
    "crosscoder": ({"kind": "crosscoder", "activation": "batchtopk", **MORE}, LAYERS),
}
# What a step may wait for: the number of dead latents, the loss; how many pairs it keeps, how many
# latents it restarts.
STEP_WAITS = {"topk": 2, "matryoshka": 3, "hierarchical": 3, "skip": 3}


def config(name, tokens=9 * killing.BATCH):
    settings, more = EVERY[name]
    activation = settings.get("activation", "topk")
    aux = {"aux_coef": 0.5, **AUX, "activation": activation, **settings}
    made = objective.find(activation).settings(**aux)
    return killing.config(sae=made, tokens=tokens, eval_every=4, checkpoint_every=3, **more)


def reader(name, **changes):
    sizes = {"rows": 1000, "batch": killing.BATCH, "d": 8, **changes}
    if name == "skip":
        return PlantedMLP(d_out=6, neurons=10, linear=0.3, **sizes)
    return (PlantedLayers if name == "crosscoder" else killing.Planted)(latents=12, **sizes)


def trained(name, folder, device, **changes):
    return train(Arm(config(name), planted_stream(reader(name, **changes)), folder), device)


def stop_at(number):
    def spoil(at, rows):
        if at == number:
            raise KeyboardInterrupt

    return spoil


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_was_stopped_ends_in_the_cpus_bits(name, tmp_path):
    trained(name, tmp_path / "cpu", torch.device("cpu"))
    with Card() as card:
        device = devices.torch_device("cuda:1")
        with pytest.raises(KeyboardInterrupt):
            trained(name, tmp_path / "card", device, spoil=stop_at(5))
        trained(name, tmp_path / "card", device)
    assert killing.bits(tmp_path / "card") == killing.bits(tmp_path / "cpu")
    assert card.hidden == []
    assert {"decode", "weight_gradient", "values_gradient"} <= set(card.kernels)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_waits_no_more_than_it_says(name):
    drawn = reader(name)
    with Card() as card:
        device = devices.torch_device("cuda:1")
        trainer = Trainer(config(name, 50 * killing.BATCH), drawn, device)
        with torch.no_grad():
            for number in range(8):
                batch = drawn.draw(number, killing.BATCH).pin_memory().to(device, non_blocking=True)
                card.waits.clear()
                trainer.step_(batch)
    assert trainer.state.step == 8 and trainer.config.log_every == 3
    restarts = [wait for wait in card.waits if wait.what == FROM_HOST]  # their draw is copied
    assert all(wait.told for wait in card.waits) and len(restarts) <= 1
    assert len(card.waits) - len(restarts) == STEP_WAITS.get(name, 4), card.waits
