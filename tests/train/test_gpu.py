"""The ways of the sparse kernels on CUDA that need no Triton, on a CPU against dense float64 sums.

tests/train/test_triton.py has Triton's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from residual_saes.train import gpu, kernels
from residual_saes.train.kernels import Bags, Kept

N, D, F, K = 7, 5, 24, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ways(kernel: str) -> list[Any]:
    return [pytest.param(name, id=name) for name in gpu.WAYS[kernel] if "triton" not in name]


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Pins a way of this test's own."""
    monkeypatch.setattr(gpu, "_pinned", {})

    def pin(kernel: str, way: str) -> None:
        assert gpu.pin(kernel, F, way) == way

    return pin


@pytest.fixture(params=["rows", "bags"])
def pairs(request: pytest.FixtureRequest) -> tuple[Kept, Bags, Tensor]:
    """Pairs, the same by latent, and the dense (bags, F) float64 matrix of them."""
    picked = draw(N, F).topk(K, dim=1).indices
    kept = Kept.even(draw(N, K, seed=1), picked)
    if request.param == "bags":  # two a row, of which some are empty
        starts = torch.stack((kept.starts, kept.starts + torch.arange(N) % (K + 1)), 1).view(-1)
        rows = torch.searchsorted(starts, torch.arange(N * K), right=True) - 1
        kept = kept._replace(rows=rows, starts=starts)
    dense = torch.zeros(len(kept.starts), F, dtype=torch.float64)
    dense[kept.rows, kept.indices] = kept.values.double()
    return kept, kernels.group_by_latent(kept.indices, F), dense


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


Pin = Callable[[str, str], None]
Pairs = tuple[Kept, Bags, Tensor]


@pytest.mark.parametrize("way", ways("topk"))
def test_topk(way: str, pinned: Pin) -> None:
    pinned("topk", way)
    pre = draw(N, F)
    pre[2, 3] = torch.nan
    values, columns = gpu.topk(pre, K)
    assert torch.equal(pre.gather(1, columns).nan_to_num(9), values.nan_to_num(9))
    wanted = pre.nan_to_num(9).sort(dim=1, descending=True).values[:, :K]
    assert torch.equal(values.nan_to_num(9).sort(dim=1, descending=True).values, wanted)


@pytest.mark.parametrize("way", ways("decode"))
def test_decode(way: str, pinned: Pin, pairs: Pairs) -> None:
    pinned("decode", way)
    kept, _, dense = pairs
    W_dec = draw(F, D, seed=2)
    assert_close(gpu.decode(*kept, W_dec), dense @ W_dec.double())


@pytest.mark.parametrize("way", ways("values_gradient"))
def test_values_gradient(way: str, pinned: Pin, pairs: Pairs) -> None:
    pinned("values_gradient", way)
    kept, _, dense = pairs
    W_dec, upstream = draw(F, D, seed=2), draw(len(dense), D, seed=3)
    wanted = (upstream.double() @ W_dec.double().T)[kept.rows, kept.indices]
    assert_close(gpu.values_gradient(upstream, *kept[1:], W_dec), wanted)


@pytest.mark.parametrize("way", ways("weight_gradient"))
def test_weight_gradient(way: str, pinned: Pin, pairs: Pairs) -> None:
    pinned("weight_gradient", way)
    kept, bags, dense = pairs
    source = draw(len(dense), D, seed=3)
    found = gpu.weight_gradient(source, kept.values, kept.rows, *bags)
    assert_close(found, dense.T @ source.double())


@pytest.mark.parametrize("way", ways("latent_sums"))
def test_latent_sums(way: str, pinned: Pin, pairs: Pairs) -> None:
    pinned("latent_sums", way)
    kept, bags, dense = pairs
    assert_close(gpu.latent_sums(kept.values, *bags), dense.sum(0))


def test_no_pairs(pinned: Pin) -> None:
    none, nobody = torch.empty(0), torch.empty(0, dtype=torch.int64)
    starts, empty = torch.zeros(F, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for way in ("torch", "dense"):
        for kernel in ("decode", "weight_gradient"):
            gpu._pinned[kernel, F] = way
        assert not gpu.decode(none, nobody, nobody, empty, draw(F, D)).any()
        found = gpu.weight_gradient(draw(3, D), none, nobody, nobody, starts)
        assert found.shape == (F, D)
        assert not found.any()


def test_what_no_other_way_can_do_is_tritons(pinned: Pin, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def triton(kernel: str, *given: Any, **blocks: int) -> Tensor:
        asked.append(kernel)
        return torch.zeros(1)

    monkeypatch.setattr(gpu, "_triton", triton)
    kept = Kept.even(draw(N, K), draw(N, F).topk(K, dim=1).indices)
    gpu.decode(*kept, draw(F, D))  # nothing is pinned
    pinned("decode", "dense")
    gpu.decode(*kept, draw(F, D).bfloat16())
    assert asked == ["decode"] * 2
    gpu.decode(*kept, draw(F, D))
    assert asked == ["decode"] * 2
    monkeypatch.setattr(gpu, "_DENSE_BYTES", 4 * N * F - 1)
    gpu.decode(*kept, draw(F, D))
    assert asked == ["decode"] * 3


def test_the_first_pinned_way_stays(pinned: Pin) -> None:
    assert gpu.pin("topk", F, "sort") == "sort"
    assert gpu.pin("topk", F, "torch") == "sort"
    assert gpu.pin("topk", F + 1, "torch") == "torch"
