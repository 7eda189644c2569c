"""The figures against their definitions, on raw rows in float64."""

import pytest
import torch

from residual_saes.train.columns import Columns
from residual_saes.train.evaluate import Evaluation
from residual_saes.train.evaluate import evaluate as evaluate_together
from residual_saes.train.ports import ports_of
from residual_saes.train.view import View
from tests.train.reference import dense_activations, random_sae


def case(n=300, d=12, d_sae=64):
    draw = torch.Generator().manual_seed(5)
    sae = random_sae(d, d_sae, 4, dtype=torch.float32)
    sae.b_enc.sub_(5.0)  # so that some rows have fewer than k active latents
    return (
        sae,
        torch.randn(n, d, generator=draw) * 3 + 5,
        torch.randn(d, generator=draw).double() + 5,
    )


def columns(mean, scale=1.0):
    """Of one hook point, whose scaled rows have this mean."""
    ports = ports_of("sae", [0], ["resid_post"], None)
    (port,) = ports.every
    return Columns(ports, {port: len(mean)}, {port: scale}, mean)


def evaluate(sae, rows, mean, scale, limit):
    alone = Evaluation(sae, View(columns(mean, scale)), limit)
    evaluate_together([alone], rows)
    return alone.figures()


@pytest.mark.parametrize("batch", [7, 300])
def test_figures_follow_their_definitions(batch):
    sae, x, mean = case()
    scale = 0.2
    found = evaluate(sae, x.split(batch), mean * scale, scale, None)
    activations = dense_activations(sae.tensors(), x * scale, 4)
    raw = x.double()
    error = raw - (activations @ sae.W_dec + sae.b_dec).double() / scale
    mse = error.square().mean()
    wanted = {
        "rows": 300,
        "mse": float(mse),
        "variance_explained": float(1 - error.square().sum() / (raw - mean).square().sum()),
        "variance_explained_scalar": float(1 - mse / raw.var()),
        "l0": float((activations > 0).sum() / 300),
        "coverage": float((activations > 0).any(0).double().mean()),
    }
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in wanted.items()}
    assert found["l0"] < 4


def test_limit_stops_at_the_batch_that_reaches_it():
    sae, x, mean = case()
    assert evaluate(sae, x.split(50), mean, 1.0, 101)["rows"] == 150


def test_perfect_and_mean_predictions_score_one_and_zero():
    sae, x, mean = case()
    sae.W_dec.zero_()
    sae.b_dec.copy_(mean)
    assert evaluate(sae, [x], mean, 1.0, None)["variance_explained"] == pytest.approx(0, abs=1e-6)
    sae.b_dec.copy_(x[0])
    assert evaluate(sae, [x[:1]], mean, 1.0, None)["variance_explained"] == 1


def test_several_read_once_and_each_as_much_as_it_wants():
    sae, x, mean = case()
    read = []
    rows = (read.append(number) or part for number, part in enumerate(x.split(50)))
    few, many = (
        Evaluation(sae, View(columns(mean)), 60),
        Evaluation(random_sae(12, 64, 3, dtype=torch.float32), View(columns(mean)), 200),
    )
    evaluate_together([few, many], rows)
    assert read == [0, 1, 2, 3, 4]
    assert few.figures() == evaluate(sae, x.split(50), mean, 1.0, 60)
    assert many.figures()["rows"] == 200


def test_rows_that_are_all_the_same_have_no_variance_to_explain():
    sae, _, mean = case()
    found = evaluate(sae, [mean.float().expand(9, 12)], mean.float().double(), 1.0, None)
    assert found["variance_explained"] != found["variance_explained"]
    assert found["mse"] > 0
