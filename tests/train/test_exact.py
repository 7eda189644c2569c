"""What bf16's candidates and float32's scores keep is what float64 keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_saes.train import exact, product
from residual_saes.train.kernels import starts_of


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_usual(seed, n=24, d=48, width=256):
    return draw(n, d, seed=seed), draw(width, d, seed=seed + 1), draw(width, seed=seed + 2)


def wide_range(seed):
    """Sizes from 1e-12 to 1e12 in one row, and from latent to latent."""
    x, encoder, b_enc = as_usual(seed)
    return x * 10 ** (6 * draw(*x.shape, seed=7)), encoder * 10 ** draw(256, 1, seed=8), b_enc


def one_long_latent(seed):
    x, encoder, b_enc = as_usual(seed)
    encoder[seed % 256] *= 1e4
    return x, encoder, b_enc


def outlier_columns(seed):
    x, encoder, b_enc = as_usual(seed)
    x[:, [3, 17]] *= 3000.0
    return x, encoder, b_enc


def copies(seed):
    """Latents that are there four times, and rows that are there twice."""
    x, encoder, b_enc = as_usual(seed)
    return torch.cat((x[:12], x[:12])), encoder[:64].repeat(4, 1), b_enc[:64].repeat(4)


def tiny(seed):
    """Below float32's normal numbers; some rows are 0."""
    x, encoder, b_enc = as_usual(seed)
    x = x * 1e-39
    x[::5] = 0
    return x, encoder, b_enc * 1e-39


def huge(seed):
    x, encoder, b_enc = as_usual(seed)
    x[::3] *= 1e37
    return x, encoder, b_enc


def below_zero(seed):
    """Fewer than k pre-activations are positive; in some rows none is."""
    x, encoder, b_enc = as_usual(seed)
    return x, encoder, b_enc - 15 - 10 * (torch.arange(256) % 2)


def on_the_grid(seed):
    """Numbers that bf16 holds: many ties, and no error but the output's."""
    x, encoder, b_enc = as_usual(seed)
    return x.round(), encoder.round(), b_enc.round()


def worst(seed):
    """Each element is cut by nearly 2^-8 of itself, and every error has the same sign."""
    x, encoder, b_enc = as_usual(seed)
    cut = 1 + 0.99 * 2**-8
    signs = encoder[:1].sign() * 2.0 ** (seed % 5)
    return cut * signs.expand_as(x), cut * signs.expand_as(encoder), 0 * b_enc


def bias_alone(seed):
    """Short rows, and biases that bf16 cuts by nearly 2^-8."""
    x, encoder, b_enc = as_usual(seed)
    return 1e-3 * x, encoder, (1 + 0.99 * 2**-8) * b_enc.sign()


CASES = [
    *(as_usual, wide_range, one_long_latent, outlier_columns, copies),
    *(tiny, huge, below_zero, on_the_grid, worst, bias_alone),
]
seeds = st.integers(0, 10**6)


def reference(x, encoder, b_enc):
    """float64 pre-activations, and float32's rounding of them."""
    pre = x.double() @ encoder.T.double() + b_enc
    long = x.double().norm(dim=1)[:, None] * encoder.double().norm(dim=1) + b_enc.abs()
    return pre, 2 * (x.shape[1] + 4) * 2.0**-24 * long + 1e-42


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=3)
@given(seed=seeds)
def test_the_bound_holds(case, wide, seed):
    """Of every pair; and the operands' part is no more than it must be."""
    over = exact.of_bound(*case(seed), wide=wide)
    assert over <= 1
    assert over > {as_usual: 0.1, worst: 0.97 if wide else 0.6}.get(case, -1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("encode", [exact.encode, exact.even])
@settings(max_examples=3)
@given(seed=seeds, k=st.sampled_from([1, 5, 12]))
def test_the_largest_of_each_row_are_float64s(case, encode, seed, k):
    """Up to float32's rounding: what is kept instead is as large."""
    x, encoder, b_enc = case(seed)
    pre, near = reference(x, encoder, b_enc)
    kept = encode(x, encoder, b_enc, k)
    indices = kept.indices.view(len(x), k)
    assert bool((indices.sort(1).values.diff(dim=1) > 0).all())
    own, near = pre.gather(1, indices), near.amax(1, keepdim=True)
    assert bool(((kept.values.view(len(x), k) - own.relu()).abs() <= near).all())
    wanted = pre.topk(k).values
    assert bool(((own.sort(1, descending=True).values - wanted).abs() <= near).all())


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=3)
@given(seed=seeds)
def test_what_is_above_a_threshold_is_float64s(case, seed):
    x, encoder, b_enc = case(seed)
    pre, near = reference(x, encoder, b_enc)
    threshold = pre.amax(0).float() * 0.5
    threshold[7] = torch.inf
    kept = exact.encode_above(x, encoder, b_enc, threshold)
    assert torch.equal(kept.starts, starts_of(kept.rows, len(x)))
    assert bool((kept.rows.diff() >= 0).all())
    there = torch.zeros_like(pre, dtype=torch.bool)
    there[kept.rows, kept.indices] = True
    near = near + threshold.abs().nan_to_num(0, 0) * 2.0**-23
    assert bool(there[pre > threshold + near].all())
    assert not bool(there[pre < threshold - near].any())
    own = pre[kept.rows, kept.indices]
    assert bool(((kept.values - own).abs() <= near[kept.rows, kept.indices]).all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 8, 200])
def test_the_largest_of_the_batch_are_float64s(case, k):
    x, encoder, b_enc = case(1)
    pre, near = reference(x, encoder, b_enc)
    kept = product.encode_batch(x, encoder, b_enc, k, by="bf16")
    wanted = pre.relu().view(-1).topk(len(x) * k).values
    found = torch.cat((kept.values.double(), torch.zeros(len(wanted) - len(kept.values))))
    off = (found.sort(descending=True).values - wanted).abs()
    assert float(off.amax()) <= float(near.amax())
    own = pre[kept.rows, kept.indices]
    assert bool(((kept.values - own).abs() <= near[kept.rows, kept.indices]).all())


def test_no_candidate_is_missed_where_scores_differ_by_their_last_bits():
    """The kept values are the k largest of all scores, bit for bit."""
    x, encoder, b_enc = as_usual(3, n=64, d=40, width=512)
    encoder = encoder[:1] + 1e-3 * encoder  # all latents are nearly the same
    kept = exact.encode(x, encoder, b_enc * 1e-4, 8)
    rows = torch.arange(64).repeat_interleave(512)
    columns = torch.arange(512).repeat(64)
    every = exact.scored(x, encoder, b_enc * 1e-4, rows, columns)
    wanted = every.view(64, 512).topk(8).values.relu()
    assert torch.equal(kept.values.view(64, 8).sort(1, descending=True).values, wanted)


@pytest.mark.parametrize("encode", [exact.encode, exact.even])
def test_a_rows_values_do_not_depend_on_how_it_was_found(encode, monkeypatch):
    x, encoder, b_enc = as_usual(4)
    usual = encode(x, encoder, b_enc, 4)
    monkeypatch.setattr(exact.Cheap, "lowest", lambda self, rows, bar: bar - torch.inf)
    left = encode(x, encoder, b_enc, 4)  # all rows are left to the float32 product
    dense = torch.zeros(2, len(x), 256)
    for number, kept in enumerate((usual, left)):
        dense[number, kept.rows, kept.indices] = kept.values
    assert torch.equal(*dense)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["row", "latent", "bias"])
def test_what_is_not_finite_shows(what, where):
    x, encoder, b_enc = as_usual(5)
    {"row": x[3], "latent": encoder[3], "bias": b_enc}[where][3] = what
    bad = ~torch.isfinite(x @ encoder.T + b_enc)
    shown = bad & ~((x @ encoder.T + b_enc) < 0)
    for encode in (exact.encode, exact.even):
        values = encode(x, encoder, b_enc, 4).values.view(-1, 4)
        assert torch.equal(values.isfinite().all(1), ~shown.any(1))
    above = exact.encode_above(x, encoder, b_enc, torch.zeros(256))
    assert torch.equal(
        ~shown.any(1),
        ~torch.zeros(24).index_add(0, above.rows, (~above.values.isfinite()).float()).bool(),
    )
    batch = product.encode_batch(x, encoder, b_enc, 4, by="bf16")
    assert bool(batch.values.isfinite().all()) != bool(shown.any())


@pytest.mark.parametrize("case", CASES)
def test_wide_rows_and_large_encoders_give_the_same_bits(case, monkeypatch):
    """There candidates are fewer, and scored latent by latent."""
    given = case(8)
    usual = exact.encode(*given, 5)
    above = exact.encode_above(*given, given[2] + 5)
    for name, value in {"_WORTH": 1, "_CACHE": 0, "_SLICE": 7 * 48 * 4}.items():
        monkeypatch.setattr(exact, name, value)
    found = exact.encode(*given, 5)
    assert torch.equal(
        found.values.view(-1, 5).sort(1).values, usual.values.view(-1, 5).sort(1).values
    )
    again = exact.encode_above(*given, given[2] + 5)
    assert all(map(torch.equal, again, above))


def test_bits_repeat_and_blocks_change_nothing():
    given = as_usual(6, n=60)
    whole = exact.encode(*given, 5)
    again = exact.encode(*given, 5)
    pieces = exact.encode(*given, 5, block_bytes=7 * 256 * 2)
    for one, other in ((whole, again), (whole, pieces)):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.values, other.values)


def test_the_encoder_goes_this_way_where_it_is_chosen(monkeypatch):
    monkeypatch.setattr(product, "_pinned", {(48, 256, "cpu"): "bf16"})
    x, encoder, b_enc = as_usual(7, n=600)
    asked = []
    for name in ("encode", "encode_above", "encode_batch"):
        own = getattr(exact, name)
        monkeypatch.setattr(exact, name, lambda *a, own=own: asked.append(own.__name__) or own(*a))
    for rows, times in ((x, 3), (x[:500], 3)):  # few rows are not worth rounding the encoder for
        product.encode(rows, encoder.T.contiguous().T, b_enc, 4)
        product.encode_above(rows, encoder, b_enc, b_enc + 9)
        product.encode_batch(rows, encoder, b_enc, 4)
        assert asked == ["encode", "encode_above", "encode_batch"][:times]
    product.encode(x, encoder, b_enc, 4, matmul="bf16")
    product.encode(x.double(), encoder.double(), b_enc.double(), 4)
    assert len(asked) == 3


def test_the_trial_has_bf16_where_its_bound_holds(monkeypatch):
    monkeypatch.setattr(product, "_multiplies_bf16", lambda kind: True)
    for over, there in ((0.5, True), (1.5, False), (float("nan"), False)):
        monkeypatch.setattr(product, "_chosen", {})
        if over > 1 or over != over:
            monkeypatch.setattr(exact, "of_bound", lambda *given, over=over: over)
        trials = {trial.name: trial.fault for trial in product.choice(1024, 1024, "cpu").trials}
        assert trials == ({"torch": None, "bf16": None} if there else {"torch": None})
