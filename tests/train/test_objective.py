"""Losses and gradients against float64 autograd, and the defects that other trainers shipped."""

from dataclasses import asdict, replace

import pytest
import torch

from residual_saes.train import objective
from residual_saes.train.objectives.gated import GatedConfig
from residual_saes.train.parallel import Group
from residual_saes.train.sae import SAEConfig, in_files
from tests.train.reference import random_gated, random_sae, reference_losses

D, D_SAE, K, N = 12, 64, 4, 50
CONFIG = SAEConfig(d_sae=D_SAE, k=K, k_aux=8, aux_coef=0.5)


def losses(sae, x, dead, config, mean_variance, y=None):
    """Losses and gradients, these by the names of files."""
    kind, y = objective.find(config.activation), x if y is None else y
    found = objective.losses(kind(config), sae, x, y, dead, mean_variance, Group())
    return found._replace(gradients=in_files(found.gradients))


def rows(seed=9, dtype=torch.float64, d=D):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


def dead_latents(count):
    return torch.randperm(D_SAE, generator=torch.Generator().manual_seed(3))[:count].sort().values


def assert_equal_to_autograd(sae, x, dead, config, rtol, y=None):
    result = losses(sae, x, dead, config, 1.7, y)
    total, aux, gradients = reference_losses(sae, x, x if y is None else y, dead, config, 1.7)
    torch.testing.assert_close(result.loss.double(), total, rtol=rtol, atol=0)
    torch.testing.assert_close(result.aux.double(), aux, rtol=rtol, atol=0)
    for name, wanted in gradients.items():
        largest = float(wanted.abs().max())
        torch.testing.assert_close(
            result.gradients[name].double(), wanted, rtol=0, atol=rtol * largest, msg=name
        )


@pytest.mark.parametrize("aux_norm", ["raw", "variance"])
@pytest.mark.parametrize("dead", [0, 1, 5, 8, 20])  # none, fewer than k_aux, as many, more
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_gradients_equal_autograd(aux_norm, dead, dtype, rtol):
    config = replace(CONFIG, aux_norm=aux_norm)
    assert_equal_to_autograd(
        random_sae(D, D_SAE, K, dtype=dtype), rows(dtype=dtype), dead_latents(dead), config, rtol
    )


@pytest.mark.parametrize("aux_norm", ["raw", "variance"])
@pytest.mark.parametrize("dead", [0, 8])
@pytest.mark.parametrize("silent", [0.0, 5.0])  # with 5, fewer than k a row are positive
@pytest.mark.parametrize(
    "changes", [{"activation": "batchtopk"}, {"activation": "matryoshka", "nested": 4}]
)
def test_gradients_of_activations_over_a_batch(changes, silent, dead, aux_norm):
    config = replace(CONFIG, aux_norm=aux_norm, **changes)
    sae = random_sae(D, D_SAE, K, threshold=0.5)
    sae.b_enc.sub_(silent)
    assert_equal_to_autograd(sae, rows(), dead_latents(dead), config, 1e-12)
    single = random_sae(D, D_SAE, K, threshold=0.5, dtype=torch.float32)
    assert_equal_to_autograd(single, rows(dtype=torch.float32), dead_latents(dead), config, 2e-5)


@pytest.mark.parametrize("aux_norm", ["raw", "variance"])
@pytest.mark.parametrize("dead", [0, 8])
@pytest.mark.parametrize("silent", [0.0, 5.0])
@pytest.mark.parametrize(("k", "nested"), [(4, 1), (4, 3), (7, 2), (7, 3)])
def test_gradients_of_hierarchical(k, nested, silent, dead, aux_norm):
    config = replace(CONFIG, k=k, nested=nested, aux_norm=aux_norm, activation="hierarchical")
    sae = random_sae(D, D_SAE, k)
    sae.b_enc.sub_(silent)
    assert_equal_to_autograd(sae, rows(), dead_latents(dead), config, 1e-12)
    single = random_sae(D, D_SAE, k, dtype=torch.float32)
    assert_equal_to_autograd(single, rows(dtype=torch.float32), dead_latents(dead), config, 2e-5)


def test_the_loss_of_hierarchical_is_of_the_same_sae_read_at_each_k():
    config = replace(CONFIG, k=12, nested=3, activation="hierarchical")
    sae, x = random_sae(D, D_SAE, 12), rows()
    errors = [(x - replace(sae, k=k)(x)).square().mean() for k in (3, 6, 12)]
    found = losses(sae, x, dead_latents(0), config, 1.7)
    torch.testing.assert_close(found.loss, torch.stack(errors).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.error, x - sae(x))


@pytest.mark.parametrize("aux_norm", ["raw", "variance"])
@pytest.mark.parametrize("dead", [0, 8])
@pytest.mark.parametrize("threshold", [0.0, 2.0, 50.0])  # many above, some, none
def test_gradients_of_jumprelu(threshold, dead, aux_norm):
    config = replace(CONFIG, aux_norm=aux_norm, activation="jumprelu", bandwidth=0.7, l0_coef=0.3)
    sae = random_sae(D, D_SAE, K, threshold=threshold)
    result = losses(sae, rows(), dead_latents(dead), config, 1.7)
    assert bool(result.gradients["threshold"].any()) == (threshold < 50)
    assert_equal_to_autograd(sae, rows(), dead_latents(dead), config, 1e-12)


@pytest.mark.parametrize("aux_norm", ["raw", "variance"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_gradients_of_gated(dtype, rtol, aux_norm):
    config = GatedConfig(d_sae=D_SAE, k=K, l1_coef=0.7, aux_norm=aux_norm)
    sae = random_gated(D, D_SAE, dtype)
    result = losses(sae, rows(dtype=dtype), dead_latents(0), config, 1.7)
    assert result.gradients.keys() == sae.tensors().keys()
    assert_equal_to_autograd(sae, rows(dtype=dtype), dead_latents(0), config, rtol)


ACTIVATIONS = {
    "topk": {},
    "batchtopk": {},
    "jumprelu": {"bandwidth": 0.7, "l0_coef": 0.3},
    "matryoshka": {"nested": 4},
    "hierarchical": {"nested": 3},
    "gated": {"l1_coef": 0.7, "aux_coef": 0.0},
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("aux_norm", ["raw", "variance"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dead", [0, 8])
def test_gradients_of_transcoders(activation, aux_norm, skip, dead):
    """Which read and write rows of different widths."""
    settings = {**asdict(CONFIG), "kind": "transcoder", "skip": skip, "aux_norm": aux_norm}
    given = {**settings, "activation": activation, **ACTIVATIONS[activation]}
    config = objective.find(activation).settings(**given)
    if activation == "gated":
        sae = random_gated(D, D_SAE, d_out=7, skip=skip)
    else:
        threshold = None if activation in ("topk", "hierarchical") else 2.0
        sae = random_sae(D, D_SAE, K, threshold=threshold, d_out=7, skip=skip)
    y = rows(seed=10, d=7)
    assert_equal_to_autograd(sae, rows(), dead_latents(dead), config, 1e-12, y)
    result = losses(sae, rows(), dead_latents(dead), config, 1.7, y)
    assert "b_in" not in result.gradients
    assert all(bool(gradient.any()) for gradient in result.gradients.values())


def test_every_activation_has_its_gradients_compared():
    assert sorted(ACTIVATIONS) == objective.names()


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_gradients_of_a_crosscoder_are_of_its_targets(activation):
    """One code for both, a decoder and a bias for each; every column counts the same."""
    config = replace(CONFIG, activation=activation, kind="crosscoder", aux_coef=0.0)
    sae = random_sae(D, D_SAE, K, threshold=0.5 if activation == "batchtopk" else None)
    x = rows()
    own = {name: tensor.clone().requires_grad_() for name, tensor in sae.tensors().items()}
    parts = [slice(5), slice(5, D)]
    pre = own["b_enc"].expand(N, D_SAE)
    for part in parts:
        pre = pre + (x[:, part] - own["b_dec"][part]) @ own["W_enc"][part]
    result = losses(sae, x, dead_latents(0), config, 1.0)
    one = torch.ones((), dtype=torch.float64)
    kept = torch.zeros_like(pre).index_put((result.kept.rows, result.kept.indices), one)
    total = 0
    for part in parts:
        y_hat = (pre.relu() * kept) @ own["W_dec"][:, part] + own["b_dec"][part]
        total = total + (x[:, part] - y_hat).square().sum() / (N * D)
    total.backward()
    torch.testing.assert_close(result.loss, total.detach(), rtol=1e-12, atol=0)
    for name, gradient in result.gradients.items():
        wanted = own[name].grad
        torch.testing.assert_close(
            gradient, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()), msg=name
        )


def test_a_gated_sae_is_one_with_thresholds():
    """Also where a gate is open and the magnitude negative, and the reverse."""
    sae, x = random_gated(D, D_SAE), rows()
    u = (x - sae.b_dec) @ sae.W_enc
    is_open = u + sae.b_gate > 0
    magnitude = sae.r_mag.exp() * u + sae.b_enc
    assert (is_open & (magnitude < 0)).any() and (~is_open & (magnitude > 0)).any()
    f = is_open * magnitude.relu()
    torch.testing.assert_close(sae.thresholded()(x), f @ sae.W_dec + sae.b_dec)
    kept = sae.encode(x)
    dense = torch.zeros_like(f).index_put((kept.rows, kept.indices), kept.values)
    torch.testing.assert_close(dense, f)
    torch.testing.assert_close(sae.folded(0.3)(x / 0.3) * 0.3, f @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("aux_norm", ["raw", "variance"])
def test_gradients_where_fewer_than_k_are_positive(aux_norm):
    sae = random_sae(D, D_SAE, K)
    sae.b_enc.sub_(7.0)
    result = losses(sae, rows(), dead_latents(20), CONFIG, 1.7)
    positive = result.kept.active()
    assert positive.min() < K
    assert positive.max() > 0
    assert_equal_to_autograd(
        sae, rows(), dead_latents(20), replace(CONFIG, aux_norm=aux_norm), 1e-12
    )


def test_gradients_of_tied_latents_go_to_the_kept_ones_only():
    sae = random_sae(D, D_SAE, K)
    sae.W_enc.copy_(sae.W_enc[:, :1].expand(-1, D_SAE).clone())
    sae.b_enc.zero_()
    result = losses(sae, rows(), dead_latents(0), CONFIG, 1.0)
    used = torch.zeros(D_SAE, dtype=torch.bool)
    used[result.kept.indices[result.kept.values > 0]] = True
    assert not result.gradients["W_dec"][~used].any()
    assert bool((result.kept.values.view(N, K) == result.kept.values.view(N, K)[:, :1]).all())


def test_aux_reaches_encoder_and_decoder_of_dead_latents():
    """sparsify 1.3.3 had an encoder gradient of exactly 0 here."""
    sae, dead = random_sae(D, D_SAE, K), dead_latents(8)
    without = losses(sae, rows(), dead, replace(CONFIG, aux_coef=0.0), 1.0).gradients
    with_aux = losses(sae, rows(), dead, CONFIG, 1.0).gradients
    for name in ("W_enc", "W_dec", "b_enc"):
        change = (with_aux[name] - without[name]).abs()
        per_latent = change.sum(0) if name == "W_enc" else change.reshape(D_SAE, -1).sum(1)
        assert bool((per_latent[dead] > 0).all()), name
        per_latent[dead] = 0
        assert not per_latent.any(), name


def test_aux_does_not_push_on_the_living():
    """The error is a constant to AuxK: through x_hat it would move the living latents and b_dec's
    output path.
    """
    sae, dead = random_sae(D, D_SAE, K), dead_latents(8)
    sae.encoder[dead] = 0.0
    sae.b_enc[dead] = -1.0  # the dead are silent, so AuxK has no path of its own
    without = losses(sae, rows(), dead, replace(CONFIG, aux_coef=0.0), 1.0).gradients
    for name, gradient in losses(sae, rows(), dead, CONFIG, 1.0).gradients.items():
        torch.testing.assert_close(gradient, without[name], rtol=1e-12, atol=1e-15)


def test_b_dec_is_counted_once():
    """A zero code must give back b_dec, once, and rows equal to b_dec must give the pre-activation
    b_enc.
    """
    sae = random_sae(D, D_SAE, K)
    sae.b_enc.fill_(-1.0)
    x = sae.b_dec.expand(3, D)
    torch.testing.assert_close(sae(x), x)
    result = losses(sae, x, dead_latents(0), CONFIG, 1.0)
    assert float(result.error.abs().max()) == 0.0
    assert float(result.kept.values.max()) == 0.0


def test_variance_norm_divides_by_the_right_variances():
    """Rows and weights scaled together leave the normalised losses alone."""
    sae, x, dead = random_sae(D, D_SAE, K), rows(), dead_latents(8)
    config = replace(CONFIG, aux_norm="variance")
    one, ten = (
        losses(sae, x, dead, config, 1.7),
        losses(sae.folded(0.1), 10 * x, dead, config, 170.0),
    )
    torch.testing.assert_close(one.loss, ten.loss)
    torch.testing.assert_close(one.aux, ten.aux)


def test_aux_of_a_perfect_reconstruction_is_zero_not_nan():
    sae, dead = random_sae(D, D_SAE, K), dead_latents(3)
    sae.b_enc.fill_(-1.0)
    result = losses(sae, sae.b_dec.expand(3, D), dead, replace(CONFIG, aux_norm="variance"), 1.0)
    assert float(result.aux) == 0.0
    assert all(bool(gradient.isfinite().all()) for gradient in result.gradients.values())
