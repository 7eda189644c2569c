"""The schedule's values, and Adam against its formula."""

from dataclasses import replace

import pytest
import torch
import yaml

from residual_saes.data.errors import SettingError
from residual_saes.data.journal import read_metrics
from residual_saes.train.optim import Adam, OptimConfig, learning_rate, resolved
from tests.train import killing


def test_schedule_values():
    config = OptimConfig(lr=2e-4, lr_floor=6e-5, warmup_steps=10)
    rates = [learning_rate(step, 111, config) for step in range(111)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[9] == pytest.approx(2e-4)
    assert rates[10] == pytest.approx(2e-4)
    assert rates[60] == pytest.approx(1.3e-4)  # half way down the cosine
    assert rates[110] == pytest.approx(6e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_linear_schedule_values():
    config = OptimConfig(lr=2e-4, lr_floor=6e-5, warmup_steps=10, decay="linear")
    rates = [learning_rate(step, 111, config) for step in range(111)]
    assert rates[:10] == pytest.approx([2e-5 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([2e-4 - 1.4e-6 * step for step in range(101)])


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
        ({"lr": "best"}, "optim.lr=best"),
        ({"lr": float("inf")}, "optim.lr=inf"),
        ({"decay": "step"}, "optim.decay=step"),
        ({"beta1": 1.0}, "optim.beta1=1.0"),
        ({"beta1": -0.1}, "optim.beta1=-0.1"),
        ({"beta2": 1.5}, "optim.beta2=1.5"),
        ({"beta2": float("nan")}, "optim.beta2=nan"),
        ({"eps": 0.0}, "optim.eps=0.0"),
        ({"clip_norm": -1.0}, "optim.clip_norm=-1.0"),
        ({"first_step": 2}, "optim.first_step=2"),
    ],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(SettingError, match=named):
        OptimConfig(**wrong)


# Anchor, powers, least and most, as docs/method.md has them.
AUTO, BY_STEPS, BY_D_SAE, LEAST, MOST = 1.2e-2, 0.4, 0.25, 1e-4, 1.5e-2


@pytest.mark.parametrize(
    ("d_sae", "steps", "lr"),
    [
        (4096, 146, AUTO),
        (16_384, 146, AUTO * 4**-BY_D_SAE),
        (2048, 292, AUTO * 2 ** (BY_D_SAE - BY_STEPS)),
        (4096, 14_600, AUTO * 100**-BY_STEPS),
        (65_536, 14_600, AUTO * 100**-BY_STEPS * 16**-BY_D_SAE),
        (256, 146, MOST),
        (4096, 10, MOST),
        (1_048_576, 5_000_000, LEAST),
    ],
)
def test_auto_values(d_sae, steps, lr):
    config = OptimConfig(lr="auto", beta1=0.5)
    found = resolved(config, d_sae, steps)
    assert found.lr == pytest.approx(lr, rel=1e-12)
    assert replace(found, lr="auto") == config


def test_auto_falls_with_steps_and_latents():
    rates = [
        [resolved(OptimConfig(lr="auto"), 2**f, 4**s).lr for s in range(1, 12)]
        for f in range(4, 20)
    ]
    for row in [*rates, *zip(*rates, strict=True)]:
        assert list(row) == sorted(row, reverse=True)
    assert rates[0][0] == MOST and rates[-1][-1] == LEAST


def test_a_rate_that_is_given_is_taken():
    config = OptimConfig(lr=0.7)
    assert resolved(config, 10**6, 10**6) == config


def test_auto_below_the_floor_is_refused_with_both():
    with pytest.raises(SettingError, match=rf"optim\.lr_floor=0\.5 .*optim\.lr={AUTO}"):
        resolved(OptimConfig(lr="auto", lr_floor=0.5), 4096, 146)


def test_auto_is_told_once_and_recorded(tmp_path, capsys):
    killing.run(tmp_path, optim=OptimConfig(lr="auto", lr_floor=0.002, warmup_steps=0))
    assert (
        capsys.readouterr().err.count(f"lr      {MOST}: optim.lr=auto for 48 latents and 20 steps")
        == 1
    )
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert recorded["settings"]["optim"]["lr"] == "auto"
    assert recorded["lr"] == MOST
    rates = [
        line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["split"] == "train"
    ]
    assert (rates[0], rates[-1]) == pytest.approx((MOST, 0.002))


def test_a_rate_that_is_given_is_recorded_and_not_told(tmp_path, capsys):
    killing.run(tmp_path)
    assert "optim.lr" not in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.02


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.999), (0.5, 0.99), (0.0, 0.0)])
def test_adam_follows_its_formula_whatever_the_memory_layout(beta1, beta2):
    draw = torch.Generator().manual_seed(0)
    parameters = {"a": torch.randn(6, 5, generator=draw).T, "b": torch.randn(7, generator=draw)}
    wanted = {name: tensor.double().clone() for name, tensor in parameters.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    adam = Adam(parameters, OptimConfig(beta1=beta1, beta2=beta2))
    for step in range(1, 6):
        gradients = {
            "a": torch.randn(6, 5, generator=draw).T * 1e-6,
            "b": torch.randn(7, generator=draw),
        }
        adam.step_(gradients, lr=0.01)
        for name, g in gradients.items():
            first[name] = beta1 * first[name] + (1 - beta1) * g.double()
            second[name] = beta2 * second[name] + (1 - beta2) * g.double() ** 2
            corrected = (second[name] / (1 - beta2**step)).sqrt() + 6.25e-10
            wanted[name] -= 0.01 * first[name] / (1 - beta1**step) / corrected
    for name, tensor in parameters.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
