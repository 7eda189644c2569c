"""Nearest directions, by blocks and all at once, against the plain computation in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from residual_saes.analyze.latents import nearest as module
from residual_saes.analyze.latents.nearest import nearest, nearest_others, unit
from residual_saes.analyze.parts import Parts


@pytest.fixture(params=["small", "judged", "bf16"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions are small, or judged pair by pair, of a product of either precision."""
    if request.param != "small":
        monkeypatch.setattr(module, "_SMALL", 0)
    if request.param == "bf16":
        monkeypatch.setattr(module, "way", lambda among: "bf16")


def drawn(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def plain(of: Tensor, among: Tensor, *, themselves: bool = False) -> Tensor:
    cosines = unit(of.double()) @ unit(among.double()).T
    return cosines.fill_diagonal_(-torch.inf) if themselves else cosines


def check(found: tuple[Tensor, Tensor], cosines: Tensor, count: int) -> None:
    """The largest of float64 `cosines`, in order; of equal ones, any."""
    values, ids = found
    expected = cosines.topk(count, dim=1).values
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=5e-7)
    torch.testing.assert_close(cosines.gather(1, ids), expected, rtol=0, atol=5e-7)
    assert all(len(set(row)) == count for row in ids.tolist())


@pytest.mark.parametrize("block", [1 << 28, 1])  # bytes: everything at once, and row by row
def test_among_others(block: int, size: None) -> None:
    of, among = drawn(7, 5), drawn(90, 5, seed=1)
    for count in (0, 1, 3, 90):
        check(nearest(of, among, count, block_bytes=block), plain(of, among), count)
    themselves = nearest(of, of, 1, block_bytes=block)
    assert themselves[1][:, 0].tolist() == list(range(7))
    assert nearest(of[:0], among, 3, block_bytes=block)[1].shape == (0, 3)
    wide = drawn(5, 90).T  # not contiguous, as a transposed W_enc is
    check(nearest(wide, wide, 2, block_bytes=block), plain(wide, wide), 2)


@pytest.mark.parametrize("block", [2048, 64, 33])
def test_a_set_beside_itself(block: int, size: None) -> None:
    """By pairs of blocks, of which each serves both; the last one is narrower."""
    for width in (5, 40):
        of = drawn(150, width)
        for count in (0, 1, 10, 149):
            found = nearest_others(of, count, block=block)
            check(found, plain(of, of, themselves=True), count)
            assert not (found[1] == torch.arange(150)[:, None]).any()
    assert nearest_others(of[:1], 0)[0].shape == (1, 0)


@pytest.mark.parametrize("block", [128, 32])
def test_equal_and_zero_directions(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More equal ones than there are candidates: those with the lowest numbers, by a second look.

    A zero direction has cosines of 0, and no bound.
    """
    monkeypatch.setattr(module, "_SMALL", 0)
    of = drawn(160, 16)
    copies = torch.arange(3, 160, 3)
    of[copies] = of[0] * 2.0 ** torch.randint(-3, 4, (len(copies), 1))
    of[[1, 158]] = 0
    for first in range(7, 150, 14):  # fewer equal ones than candidates
        of[[first + 1, first + 3]] = of[first].clone()
    found = nearest_others(of, 4, block=block)
    check(found, plain(of, of, themselves=True), 4)
    copies = (unit(of) == unit(of)[0]).all(1).nonzero().view(-1)
    assert len(copies) > 40 and found[1][0].tolist() == copies[1:5].tolist()
    values, ids = found
    equal = (values[:, 1:] == values[:, :-1]) & (of != 0).any(1, keepdim=True)
    assert equal.sum() > 60 and (ids[:, 1:] > ids[:, :-1])[equal].all()
    check(nearest(of[:9], of, 4), plain(of[:9], of), 4)


def test_equal_candidates_in_any_order() -> None:
    """A GPU's top k has no order of its own."""
    values, ids = module._ordered(torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[5, 3, 9]]), 2)
    assert values.tolist() == [[2.0, 1.0]] and ids.tolist() == [[9, 3]]


def test_nan_is_nearest(size: None) -> None:
    """NaN cannot hide, and spoils no other rank."""
    of = drawn(120, 16)
    of[77] = torch.nan
    values, ids = nearest_others(of, 5, block=32)
    others = torch.arange(120) != 77
    assert (ids[others, 0] == 77).all() and values[others, 0].isnan().all()
    expected = plain(of, of, themselves=True)[others].nan_to_num(-torch.inf).topk(4, dim=1).values
    torch.testing.assert_close(values[others, 1:].double(), expected, rtol=0, atol=5e-7)
    assert values[77].isnan().all()


def test_candidates_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are off by less than the bound, and all to the wrong side, change nothing.

    Of 20 directions 6 * 10^-7 apart, these products turn the order round.
    """
    monkeypatch.setattr(module, "_SMALL", 0)
    of, across = unit(drawn(1, 256)), drawn(300, 256, seed=1)
    across = unit(across - (across @ of.T) * of)
    cosine = torch.linspace(0, 0.5, 300)[:, None]
    cosine[40:60, 0] = 0.9 + 6e-7 * torch.arange(20)
    among = unit(cosine * of + (1 - cosine.square()).sqrt() * across)
    dense = of @ among.T
    dense[0, 40:60] = dense[0, 40:60].flip(0)
    values, ids = module.largest(of, among, dense, 6, among_norm=1.0)
    assert ids.tolist() == plain(of, among).topk(6, dim=1).indices.tolist()
    check((values, ids), plain(of, among), 6)


def test_candidates_of_bf16_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of bf16's bound: the nearest direction looks further than 59 others."""
    of, across = unit(drawn(1, 256)), drawn(300, 256, seed=1)
    across = unit(across - (across @ of.T) * of)
    cosine = torch.linspace(0, 0.5, 300)[:, None]
    cosine[40:100, 0] = 0.9 - 6e-5 * torch.arange(60)
    among = unit(cosine * of + (1 - cosine.square()).sqrt() * across)
    most = partial(module._rounded(of, among).most, slice(None))
    dense = of @ among.T
    dense[0, 40] -= 0.9 * float(most(dense[:, 40]) - dense[0, 40])
    assert dense[0, 40] < dense[0, 99]
    values, ids = module.largest(of, among, dense, 6, among_norm=1.0, bound=most)
    assert ids.tolist() == [[40, 41, 42, 43, 44, 45]]
    check((values, ids), plain(of, among), 6)
    assert module.largest(of, among, dense, 6, among_norm=1.0)[1][0, 0] == 41  # by float32's bound


def test_parts_of_another_precision_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study may go on where the trial takes another way, in either direction."""
    monkeypatch.setattr(module, "_SMALL", 0)
    of = drawn(200, 24)
    for name in ("torch", "bf16", "torch"):
        monkeypatch.setattr(module, "way", lambda among, name=name: name)
        found = nearest_others(of, 5, Parts(tmp_path), block=32)
        check(found, plain(of, of, themselves=True), 5)


def test_a_stop_costs_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are there are read, and what is made from them on is the same."""
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "_PART", 64)
    of = drawn(200, 24)
    whole = nearest_others(of, 5, Parts(tmp_path), block=32)
    files = sorted(tmp_path.glob("*.npz"))
    assert len(files) == 4
    for last in (files[3], files[1]):
        last.unlink()
        again = nearest_others(of, 5, Parts(tmp_path), block=32)
        assert torch.equal(again[0], whole[0]) and torch.equal(again[1], whole[1])
    calls: list[Tensor] = []
    monkeypatch.setattr(torch, "mm", lambda *given, **out: calls.append(given[0]))
    nearest_others(of, 5, Parts(tmp_path), block=32)
    assert not calls
