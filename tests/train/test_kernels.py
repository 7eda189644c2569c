"""Sparse equals dense."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train import kernels
from train.kernels import Kept


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_is_topk(x, k):
    values, indices = kernels.topk(x, k)
    assert torch.equal(values.sort(1, descending=True).values, x.topk(k, dim=1).values)
    assert torch.equal(x.gather(1, indices), values)
    assert bool((indices.sort(1).values.diff(dim=1) > 0).all()), "an index is there twice"


@pytest.mark.parametrize(("width", "k"), [(64, 4), (64, 3), (60, 4), (64, 40), (64, 64), (8, 1), (1024, 32)])
def test_topk_is_exact(width, k):
    assert_is_topk(draw(50, width), k)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 30), st.integers(0, 10**6))
def test_topk_is_exact_among_ties(k, levels, rows, seed):
    few = torch.randint(0, levels, (rows, 128), generator=torch.Generator().manual_seed(seed)).float()
    assert_is_topk(few, k)


def test_topk_repeats_its_choice_among_ties():
    x = torch.ones(9, 128)
    assert torch.equal(kernels.topk(x, 5)[1], kernels.topk(x.clone(), 5)[1])


def test_topk_lets_no_nan_through_unseen():
    x = draw(3, 128)
    x[1, 77] = torch.nan
    values, _ = kernels.topk(x, 4)
    assert values.isnan().any(1).tolist() == [False, True, False]


def test_encode_is_the_same_in_blocks(monkeypatch):
    x, W_enc, b_enc = draw(37, 8), draw(8, 128, seed=1), draw(128, seed=2)
    whole = kernels.encode(x, W_enc, b_enc, 4)
    monkeypatch.setattr(kernels, "_BLOCK_BYTES", 5 * 128 * 4)
    blocks = kernels.encode(x, W_enc, b_enc, 4)
    assert torch.equal(whole.indices.sort(1).values, blocks.indices.sort(1).values)
    torch.testing.assert_close(whole.values.sort(1).values, blocks.values.sort(1).values)


def test_gradient_kernels_equal_dense_ones():
    n, d, d_sae, k = 40, 8, 64, 4
    upstream, W_dec, rows = draw(n, d), draw(d_sae, d, seed=1), draw(n, d, seed=2)
    values, indices = draw(n, d_sae, seed=3).topk(k, dim=1)
    values[:, -1] = 0.0
    kept, dense = Kept(values, indices), torch.zeros(n, d_sae).scatter(1, indices, values)
    torch.testing.assert_close(kernels.decode(kept, W_dec), dense @ W_dec)
    wanted = (upstream @ W_dec.T).gather(1, indices) * (values > 0)
    torch.testing.assert_close(kernels.values_gradient(upstream, kept, W_dec), wanted)
    bags = kernels.group_by_latent(indices, d_sae)
    torch.testing.assert_close(kernels.weight_gradient(rows, values, bags), dense.T @ rows)
    torch.testing.assert_close(kernels.latent_sums(values, indices, d_sae), dense.sum(0))


def test_weight_gradient_repeats_its_bits():
    rows, values = draw(512, 16), draw(512, 8, seed=1)
    indices = torch.randint(0, 32, (512, 8), generator=torch.Generator().manual_seed(2))
    first, second = (
        kernels.weight_gradient(rows, values, kernels.group_by_latent(indices.clone(), 32)) for _ in range(2)
    )
    assert torch.equal(first, second)
