"""The logistic probe is at the minimum of its loss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from residual_saes.analyze import probe, stats


def test_the_probe_is_at_its_losss_minimum() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 4)) * [1, 5, 0.1, 2] + 3
    label = x[:, 0] + 0.3 * rng.normal(size=60) > 3
    found = probe.fit(x, label, 0.1)
    z = (x - x.mean(0)) / x.std(0)

    def loss(parameters: np.ndarray) -> float:
        odds = z @ parameters[:4] + parameters[4]
        return float(
            np.mean(np.log(1 + np.exp(-np.where(label, odds, -odds))))
            + 0.05 * np.sum(parameters[:4] ** 2)
        )

    independent = optimize.minimize(
        loss, np.zeros(5), method="Nelder-Mead", options={"xatol": 1e-6, "maxiter": 20_000}
    )
    np.testing.assert_allclose([*found.w, found.b], independent.x, atol=1e-3)
    np.testing.assert_allclose(found(x), z @ found.w + found.b)
    constant = probe.fit(np.c_[x, np.full(60, 7.0)], label, 0.1)
    assert abs(constant.w[4]) < 1e-12 and np.isfinite(constant(np.c_[x, np.full(60, 8.0)])).all()


@pytest.mark.parametrize(("n", "d"), [(30, 100), (100, 30), (40, 40)])
@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_the_probes_gradient_is_0_with_few_cases_and_with_many(
    n: int, d: int, penalty: float
) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d))
    label = x[:, 0] > 0.2  # separable
    found = probe.fit(x, label, penalty)
    z = (x - found.mean) / found.scale
    rest = 1 / (1 + np.exp(-found(x))) - label
    np.testing.assert_allclose(z.T @ rest / n + penalty * found.w, 0, atol=1e-7)
    assert abs(rest.mean()) < 1e-7


def test_cross_validation_penalises_noise_more_than_signal() -> None:
    rng = np.random.default_rng(6)
    x, label = rng.normal(size=(90, 12)), rng.random(90) < 0.5
    noise = probe.cross_validated(x, label, np.arange(90))
    signal = probe.cross_validated(x, x[:, 0] > 0, np.arange(90))
    assert noise.penalty > signal.penalty
    assert stats.auroc(signal(rng_x := rng.normal(size=(300, 12))), rng_x[:, 0] > 0) > 0.9
