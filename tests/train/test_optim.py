"""The schedule's values, and Adam against its formula."""

import pytest
import torch

from data.errors import SettingError
from train.optim import Adam, OptimConfig, learning_rate


def test_schedule_values():
    config = OptimConfig(lr=2e-4, lr_floor=6e-5, warmup_steps=10)
    rates = [learning_rate(step, 111, config) for step in range(111)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[9] == pytest.approx(2e-4)
    assert rates[10] == pytest.approx(2e-4)
    assert rates[60] == pytest.approx(1.3e-4)  # half way down the cosine
    assert rates[110] == pytest.approx(6e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 5), (244_140, 5_000), (10, 0)])
def test_default_warmup_is_a_twentieth_and_at_most_5000(steps, warmup):
    config = OptimConfig()
    assert learning_rate(warmup, steps, config) == pytest.approx(config.lr)
    if warmup:
        assert learning_rate(warmup - 2, steps, config) < config.lr


def test_one_step_run_has_a_rate():
    assert learning_rate(0, 1, OptimConfig()) == 2e-4


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"lr": 1e-5}, "optim.lr_floor=6e-05"),
        ({"lr_floor": -1.0}, "optim.lr_floor=-1.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1"),
        ({"project_every": 0}, "optim.project_every=0"),
    ],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(SettingError, match=named):
        OptimConfig(**wrong)


def test_adam_follows_its_formula_whatever_the_memory_layout():
    draw = torch.Generator().manual_seed(0)
    parameters = {"a": torch.randn(6, 5, generator=draw).T, "b": torch.randn(7, generator=draw)}
    wanted = {name: tensor.double().clone() for name, tensor in parameters.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    adam = Adam(parameters, OptimConfig())
    for step in range(1, 6):
        gradients = {"a": torch.randn(6, 5, generator=draw).T * 1e-6, "b": torch.randn(7, generator=draw)}
        adam.step_(gradients, lr=0.01)
        for name, g in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * g.double()
            second[name] = 0.999 * second[name] + 0.001 * g.double() ** 2
            corrected = (second[name] / (1 - 0.999**step)).sqrt() + 6.25e-10
            wanted[name] -= 0.01 * first[name] / (1 - 0.9**step) / corrected
    for name, tensor in parameters.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
