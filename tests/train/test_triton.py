"""The CUDA kernels against dense sums in float64: compiled where there is a GPU, else under
Triton's interpreter.

Triton comes with torch's CUDA wheels. Without a GPU: `pip install triton` (286 MB, 1 GB unpacked),
then this file.
"""

import os
import subprocess
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
with pytest.MonkeyPatch.context() as patch:
    if not ON_GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read at imports, and in every launch: _interpreted
    triton = pytest.importorskip(
        "triton", reason="Triton is not installed; torch's CUDA wheels bring it"
    )

    from residual_saes.train import gpu
    from residual_saes.train import triton_kernels as kernels
if not ON_GPU and type(triton.language.sum).__name__ != "InterpretedFunction":
    pytest.skip(
        "something imported Triton before, to compile; run this file alone", allow_module_level=True
    )


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def whole(high, shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def starts_of(lengths):
    """Where bags of these lengths begin."""
    ends = torch.tensor(lengths).cumsum(0)
    return (ends - torch.tensor(lengths)).to(DEVICE)


def bag_of(lengths):
    """(p,) which bag each pair is in."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)


def assert_close(found, wanted):
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


# -- top k -----------------------------------------------------------------------------------------


def assert_is_topk(x, k, **pieces):
    """Those of a stable sort, which puts the lower of equal columns first; ascending columns."""
    values, columns = kernels.topk(x, k, **pieces)
    wanted = x.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(columns, wanted)
    torch.testing.assert_close(values, x.gather(1, wanted), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("width", "k"), [(100, 7), (300, 300), (1000, 400), (2048, 32), (1, 1)])
def test_topk_is_exact(width, k):
    assert_is_topk(draw(2, width), k)


def test_topk_leaves_the_next_one_out():
    assert_is_topk(torch.tensor([[2.0, 4.0, 3.0, 1.0]]).to(DEVICE), 2)


@pytest.mark.parametrize(("width", "k"), [(600, 40), (512, 128), (515, 1)])
def test_topk_is_exact_in_pieces(width, k):
    assert_is_topk(draw(1, width), k, piece=256)
    assert_is_topk(whole(3, (1, width)).float(), k, piece=256)


@pytest.mark.parametrize("k", [1, 60, 199])
@pytest.mark.parametrize("levels", [1, 30])
def test_topk_keeps_the_lowest_columns_of_ties(k, levels):
    assert_is_topk(whole(levels, (1, 200), seed=k).float() - 7.0, k)


def test_topk_orders_every_kind_of_number():
    inf, tiny = float("inf"), 1e-45  # the smallest subnormal
    kinds = torch.tensor(
        [0.0, -0.0, inf, -inf, tiny, -tiny, 1.0, -1.0, 3.4e38, -3.4e38, 1e-38, -1e-38]
    ).to(DEVICE)
    rows = torch.stack(
        [kinds[torch.randperm(12, generator=torch.Generator().manual_seed(i))] for i in range(2)]
    )
    for k in (1, 6, 7, 11):
        values, columns = kernels.topk(rows, k)
        assert torch.equal(values, rows.gather(1, columns))
        assert torch.equal(values.sort(1, descending=True).values, rows.topk(k).values)
    assert torch.equal(
        kernels.topk(torch.tensor([[-0.0, 0.0, -1.0]]).to(DEVICE), 1)[1].cpu(), torch.tensor([[0]])
    )
    assert_is_topk(torch.full((2, 40), -inf).to(DEVICE), 3)


def test_topk_counts_nan_as_largest():
    x = draw(4, 150)
    x[1, 77] = torch.nan
    x[2, :9] = -torch.tensor(torch.nan)
    x[2, 9] = torch.inf
    x[3] = torch.nan
    values, columns = kernels.topk(x, 10)
    assert values.isnan().sum(1).tolist() == [0, 1, 9, 10]
    assert columns[2].tolist() == list(range(10)), "infinity comes right behind the NaNs"
    assert columns[3].tolist() == list(range(10))


# -- sums over bags --------------------------------------------------------------------------------

RAGGED = [3, 0, 1, 20, 0, 8, 0, 9]  # pairs per row


@pytest.mark.parametrize("d", [1, 40, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_and_its_gradient_equal_dense_ones(d, dtype):
    rows, latents, pairs = len(RAGGED), 30, sum(RAGGED)
    values, indices, W_dec = (
        draw(pairs),
        whole(latents, (pairs,)),
        draw(latents, d, seed=1, dtype=dtype),
    )
    upstream, row = draw(rows, d, seed=2), bag_of(RAGGED)
    dense = torch.zeros(rows, latents, dtype=torch.float64, device=DEVICE)
    dense.index_put_((row, indices), values.double(), accumulate=True)
    assert_close(kernels.decode(values, indices, starts_of(RAGGED), W_dec), dense @ W_dec.double())
    wanted = (upstream.double() @ W_dec.double().T)[row, indices]
    found = kernels.values_gradient(upstream, indices, starts_of(RAGGED), W_dec)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_no_pairs_at_all():
    none, starts, W_dec = torch.empty(0, device=DEVICE), starts_of([0, 0]), draw(4, 6)
    whichever = none.long()
    assert torch.equal(
        kernels.decode(none, whichever, starts, W_dec), torch.zeros(2, 6, device=DEVICE)
    )
    assert kernels.values_gradient(draw(2, 6), whichever, starts, W_dec).shape == (0,)
    gradient = kernels.weight_gradient(
        draw(2, 6), none, whichever, whichever, starts_of([0] * 5), 5
    )
    assert torch.equal(gradient, torch.zeros(5, 6, device=DEVICE))
    assert torch.equal(
        kernels.latent_sums(none, whichever, starts_of([0] * 5)), torch.zeros(5, device=DEVICE)
    )


def sorted_pairs(latent, row, d_sae):
    """order, source and starts, as train.kernels makes them."""
    latents, order = latent.sort(stable=True)
    return order, row[order], torch.searchsorted(latents, torch.arange(d_sae, device=DEVICE))


# Where long bags (more than 16 pairs) begin and end within the parts of 16 pairs.
LONG = {
    "first and last": [40, 0, 2, 33],
    "two in one part": [20, 20, 0, 20],
    "short between": [17, 3, 16, 1, 17],
    "on the borders": [32, 16, 0, 48, 17],
    "one alone": [0, 0, 70],
    "ends behind the last part's middle": [1, 17, 0, 0],
}


@pytest.mark.parametrize("lengths", LONG.values(), ids=LONG)
@pytest.mark.parametrize("d", [24, 130])
def test_weight_gradient_equals_the_dense_one(lengths, d):
    n, d_sae = 25, len(lengths)
    shuffled = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    latent, row = bag_of(lengths)[shuffled], whole(n, (sum(lengths),), seed=1)
    rows, weights = draw(n, d), draw(sum(lengths), seed=2)
    order, source, starts = sorted_pairs(latent, row, d_sae)
    dense = torch.zeros(n, d_sae, dtype=torch.float64, device=DEVICE)
    dense.index_put_((row, latent), weights.double(), accumulate=True)
    found = [
        kernels.weight_gradient(rows, weights, order, source, starts, d_sae, chunk=16)
        for _ in range(2)
    ]
    torch.testing.assert_close(found[0].double(), dense.T @ rows.double(), rtol=1e-5, atol=1e-5)
    sums = kernels.latent_sums(weights, order, starts)
    torch.testing.assert_close(sums.double(), dense.sum(0), rtol=1e-5, atol=1e-5)


def test_slices_stay_within_the_cache():
    for rows, d, dtype, wanted in [
        (32_768, 2560, torch.float32, 128),
        (32_768, 2560, torch.bfloat16, 256),
        (8192, 2560, torch.float32, 512),
        (4096, 384, torch.float32, 512),
        (4096, 100, torch.float32, 128),
        (1 << 20, 2560, torch.float32, 128),
    ]:
        assert kernels.slice_columns(torch.empty(rows, d, dtype=dtype, device="meta")) == wanted


@pytest.mark.parametrize("at_once", [4, 16])
def test_pairs_read_at_once_change_rounding_alone(at_once):
    latent, row = bag_of([0, 50, 3, 20]), whole(50, (73,))
    rows, weights, W_dec = draw(50, 130), draw(73, seed=1), draw(60, 130, seed=2)
    order, _, starts = sorted_pairs(latent, row, 4)
    spread, ragged = whole(60, (73,), seed=3), starts_of([10, 0, 60, 3])
    bags = bag_of([10, 0, 60, 3])
    upstream = rows[:4].clone()
    for kernel, given in {
        "decode": (weights, spread, bags, ragged, W_dec),
        "values_gradient": (upstream, spread, bags, ragged, W_dec),
        "weight_gradient": (rows, weights, row, order, starts),
    }.items():
        usual = getattr(gpu, kernel)(*given)
        other = gpu.WAYS[kernel][f"triton {at_once}"](*given)
        assert_close(other, usual.double())


def test_bits_repeat():
    lengths = [0, 50, 3, 20]
    latent, row = bag_of(lengths), whole(50, (73,))
    rows, weights, W_dec = draw(50, 130), draw(73, seed=1), draw(60, 130, seed=2)
    order, source, starts = sorted_pairs(latent, row, 4)
    spread, ragged = whole(60, (73,), seed=3), starts_of([10, 0, 60, 3])

    def everything():
        yield from kernels.topk(whole(9, (1, 300)).float(), 100)
        yield kernels.decode(weights, spread, ragged, W_dec)
        yield kernels.values_gradient(rows[:4].clone(), spread, ragged, W_dec)
        yield kernels.weight_gradient(rows, weights, order, source, starts, 4, chunk=16)
        yield kernels.latent_sums(weights, order, starts)

    for first, second in zip(everything(), everything(), strict=True):
        assert torch.equal(first, second)


# -- the compiler, which needs no GPU --------------------------------------------------------------

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from residual_saes.train import triton_kernels as kernels

FLOATS = {"pre", "values", "weights", "table", "parts", "sums", "upstream", "shares"}
WHOLE = {"columns", "which", "starts", "owners", "order", "indices"}
FIXED = {"BLOCK": 2048, "GROUPS": 256, "STEP": 256, "CHUNK": 512, "P": 8, "D": 128}
target = GPUTarget("cuda", int(sys.argv[1]), 32)
for kernel in (
    kernels._topk_kernel,
    kernels._part_kernel,
    kernels._bag_kernel,
    kernels._sums_kernel,
    kernels._dots_kernel,
):
    kinds = {}
    for name in kernel.arg_names:
        kinds[name] = "*fp32" if name in FLOATS else "*i64" if name in WHOLE else "i32"
        if name in FIXED:
            kinds[name] = "constexpr"
    fixed = {name: FIXED[name] for name in kinds if name in FIXED}
    source = triton.compiler.ASTSource(kernel, kinds, fixed)
    ptx = triton.compile(source, target=target, options={"num_warps": 2}).asm["ptx"]
    assert ".visible .entry" in ptx
    for atomic in ("atom.", "red.global", "red.shared"):
        assert atomic not in ptx, "an atomic: sums in any order"
print("compiled")
"""


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.long)])
def test_kernels_compile_without_atomics(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == "compiled", done.stderr
