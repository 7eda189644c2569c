"""Sparse equals dense."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_saes.data.errors import SettingError
from residual_saes.train import kernels, product
from residual_saes.train.kernels import Kept


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_is_topk(x, k):
    values, indices = kernels.topk(x, k)
    assert torch.equal(values.sort(1, descending=True).values, x.topk(k, dim=1).values)
    assert torch.equal(x.gather(1, indices), values)
    assert bool((indices.sort(1).values.diff(dim=1) > 0).all()), "an index is there twice"


@pytest.mark.parametrize(
    ("width", "k"), [(64, 4), (64, 3), (60, 4), (64, 40), (64, 64), (8, 1), (1024, 32)]
)
def test_topk_is_exact(width, k):
    assert_is_topk(draw(50, width), k)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 30), st.integers(0, 10**6))
def test_topk_is_exact_among_ties(k, levels, rows, seed):
    few = torch.randint(
        0, levels, (rows, 128), generator=torch.Generator().manual_seed(seed)
    ).float()
    assert_is_topk(few, k)


def test_topk_repeats_its_choice_among_ties():
    x = torch.ones(9, 128)
    assert torch.equal(kernels.topk(x, 5)[1], kernels.topk(x.clone(), 5)[1])


def test_topk_lets_no_nan_through_unseen():
    x = draw(3, 128)
    x[1, 77] = torch.nan
    values, _ = kernels.topk(x, 4)
    assert values.isnan().any(1).tolist() == [False, True, False]


def test_encode_is_the_same_in_blocks():
    x, encoder, b_enc = draw(37, 8), draw(128, 8, seed=1), draw(128, seed=2)
    whole = product.encode(x, encoder, b_enc, 4)
    blocks = product.encode(x, encoder, b_enc, 4, block_bytes=5 * 128 * 4)
    assert torch.equal(
        whole.indices.view(37, 4).sort(1).values, blocks.indices.view(37, 4).sort(1).values
    )
    torch.testing.assert_close(
        whole.values.view(37, 4).sort(1).values, blocks.values.view(37, 4).sort(1).values
    )


def test_pairs_lie_in_one_piece():
    """CUDA's kernels read them so, whatever strides a tensor has."""
    kept = Kept.even(torch.ones(5, 3), torch.arange(15).view(5, 3))
    assert all(column.is_contiguous() for column in kept)
    assert kept.starts.tolist() == [0, 3, 6, 9, 12]
    one = Kept.even(torch.ones(5, 3)[:, :1], torch.arange(15).view(5, 3)[:, :1])
    assert all(column.is_contiguous() for column in one)


def test_gradient_kernels_equal_dense_ones():
    n, d, d_sae, k = 40, 8, 64, 4
    upstream, W_dec, rows = draw(n, d), draw(d_sae, d, seed=1), draw(n, d, seed=2)
    values, indices = draw(n, d_sae, seed=3).topk(k, dim=1)
    values[:, -1] = 0.0
    kept, dense = Kept.even(values, indices), torch.zeros(n, d_sae).scatter(1, indices, values)
    torch.testing.assert_close(kernels.decode(kept, W_dec), dense @ W_dec)
    wanted = (upstream @ W_dec.T).gather(1, indices).view(-1)
    torch.testing.assert_close(kernels.values_gradient(upstream, kept, W_dec), wanted)
    bags = kernels.group_by_latent(kept.indices, d_sae)
    torch.testing.assert_close(
        kernels.weight_gradient(rows, kept.values, kept.rows, bags), dense.T @ rows
    )
    torch.testing.assert_close(kernels.latent_sums(kept.values, kept.indices, d_sae), dense.sum(0))
    assert torch.equal(kept.active(), (dense > 0).sum(1))


@pytest.mark.parametrize("d", [203, 208])  # the last slice is narrow, and odd
def test_order_and_slices_of_gathers_change_no_bit(monkeypatch, d):
    n, d_sae, k = 70, 32, 12
    upstream, W_dec = draw(n, d), draw(d_sae, d, seed=1)
    kept = Kept.even(*draw(n, d_sae, seed=3).topk(k, dim=1))
    bags = kernels.group_by_latent(kept.indices, d_sae)
    whole = kernels.decode(kept, W_dec)
    gradient = kernels.weight_gradient(upstream, kept.values, kept.rows, bags)
    by_row = kernels.values_gradient(upstream, kept, W_dec)
    assert torch.equal(kernels.values_gradient(upstream, kept, W_dec, bags), by_row)
    for name, value in {"_CACHED_BYTES": 0, "_SLICE_BYTES": 1, "_LEAST_COLUMNS": 64}.items():
        monkeypatch.setattr(kernels, name, value)
    met = []
    bag = kernels.embedding_bag
    monkeypatch.setattr(
        kernels, "embedding_bag", lambda *given, **named: met.append(given) or bag(*given, **named)
    )
    assert torch.equal(kernels.decode(kept, W_dec), whole)
    assert torch.equal(kernels.weight_gradient(upstream, kept.values, kept.rows, bags), gradient)
    assert [given[1].shape[1] for given in met] == 2 * [64, 64, 64, d - 192]


def dense_of(kept, n, d_sae):
    return torch.zeros(n, d_sae).index_put((kept.rows, kept.indices), kept.values)


@pytest.mark.parametrize("block", [1 << 20, 5 * 128 * 4])
def test_encode_above_keeps_what_exceeds_each_latents_threshold(block):
    x, encoder, b_enc = draw(37, 8), draw(128, 8, seed=1), draw(128, seed=2)
    threshold = draw(128, seed=3) + 2
    x[5], threshold[7] = 0.0, torch.inf
    kept, pre = (
        product.encode_above(x, encoder, b_enc, threshold, block_bytes=block),
        x @ encoder.T + b_enc,
    )
    torch.testing.assert_close(dense_of(kept, 37, 128), pre * (pre > threshold))
    assert torch.equal(kept.starts, torch.searchsorted(kept.rows, torch.arange(37)))
    assert bool((kept.rows.diff() >= 0).all())


@pytest.mark.parametrize("block", [1 << 20, 5 * 128 * 4])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("uneven", [False, True])
def test_encode_batch_keeps_the_largest_of_the_batch(block, k, uneven):
    """Also where the first rows, by which the bound is guessed, are unlike the others."""
    x, encoder, b_enc = draw(90, 8), draw(128, 8, seed=1), draw(128, seed=2)
    if uneven:
        x[:70] *= 10
        x = x if k == 8 else x.flip(0)
    kept, pre = product.encode_batch(x, encoder, b_enc, k, block_bytes=block), x @ encoder.T + b_enc
    positive = pre.clamp_min(0).view(-1)
    wanted = positive.topk(90 * k)
    torch.testing.assert_close(
        dense_of(kept, 90, 128),
        torch.zeros(90 * 128).scatter(0, wanted.indices, wanted.values).view(90, 128),
    )
    assert torch.equal(kept.starts, torch.searchsorted(kept.rows, torch.arange(90)))


def test_encode_batch_lets_no_nan_through_unseen():
    x, encoder, b_enc = draw(90, 8), draw(128, 8, seed=1), draw(128, seed=2)
    x[80, 3] = torch.nan
    assert bool(product.encode_batch(x, encoder, b_enc, 4).values.isnan().any())


def test_kernels_on_rows_with_no_pairs():
    """Between others, at the beginning and at the end; and with no pair at all."""
    W_dec, upstream = draw(16, 8), draw(6, 8, seed=1)
    for rows in ([1, 1, 4], []):
        at = torch.tensor(rows, dtype=torch.int64)
        starts = torch.searchsorted(at, torch.arange(6))
        kept = Kept(draw(len(rows), seed=2).abs(), torch.arange(len(rows)), at, starts)
        dense = dense_of(kept, 6, 16)
        torch.testing.assert_close(kernels.decode(kept, W_dec), dense @ W_dec)
        wanted = (upstream @ W_dec.T)[kept.rows, kept.indices]
        torch.testing.assert_close(kernels.values_gradient(upstream, kept, W_dec), wanted)
        bags = kernels.group_by_latent(kept.indices, 16)
        torch.testing.assert_close(
            kernels.weight_gradient(upstream, kept.values, kept.rows, bags), dense.T @ upstream
        )
        assert torch.equal(kept.active(), (dense > 0).sum(1))


def test_weight_gradient_repeats_its_bits():
    rows, values = draw(512, 16), draw(512, 8, seed=1)
    kept = Kept.even(
        values, torch.randint(0, 32, (512, 8), generator=torch.Generator().manual_seed(2))
    )
    first, second = (
        kernels.weight_gradient(
            rows, kept.values, kept.rows, kernels.group_by_latent(kept.indices.clone(), 32)
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("block", [1 << 20, 5 * 128 * 4])
def test_bf16_rounds_the_operands_of_the_encoder_product_alone(block):
    x, encoder, b_enc = draw(37, 8), draw(128, 8, seed=1), 1000 + draw(128, seed=2)
    kept = product.encode(x, encoder, b_enc, 4, "bf16", block)
    pre = (x.bfloat16() @ encoder.bfloat16().T).float() + b_enc
    torch.testing.assert_close(
        kept.values.view(37, 4).sort(1).values, pre.topk(4).values.sort(1).values
    )
    assert not torch.equal(kept.values, product.encode(x, encoder, b_enc, 4).values)


def test_tf32_is_on_for_the_encoder_product_alone(monkeypatch):
    settings, seen = torch.backends.cuda.matmul, []
    addmm = torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *a, **o: seen.append(settings.fp32_precision) or addmm(*a, **o)
    )
    before = settings.fp32_precision
    for matmul in ("fp32", "tf32"):
        product.encode(draw(5, 8), draw(128, 8), draw(128), 4, matmul)
        assert settings.fp32_precision == before
    assert seen == ["ieee", "tf32"]


def test_openblas_gives_the_same_latents():
    x, encoder, b_enc = draw(37, 8), draw(128, 8, seed=1), draw(128, seed=2)
    for keep, how in (
        (product.encode, 4),
        (product.encode_batch, 4),
        (product.encode_above, b_enc),
    ):
        own = keep(x, encoder, b_enc, how, by="openblas", block_bytes=5 * 128 * 4)
        dense = dense_of(keep(x, encoder, b_enc, how, by="torch"), 37, 128)
        torch.testing.assert_close(dense_of(own, 37, 128), dense)


def test_the_way_is_tried_once_and_can_be_pinned(monkeypatch):
    monkeypatch.setattr(product, "_chosen", {})
    monkeypatch.setattr(product, "_pinned", {})
    assert product.way(64, 512, "cpu") == "torch", "too small to matter"
    assert not product.known()
    assert product.way(2048, 2048, "cpu") in product.ways("cpu")
    (choice,) = product.known().values()
    assert not any(trial.fault for trial in choice.trials)
    product.pin(2048, 2048, "cpu", "torch")
    assert product.way(2048, 2048, "cpu") == "torch"
    with pytest.raises(SettingError, match="torch"):
        product.pin(2048, 2048, "cpu", "abacus")
