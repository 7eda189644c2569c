"""Counters of silence."""

from dataclasses import replace

import torch

from residual_saes.train import dead
from residual_saes.train.kernels import Kept
from residual_saes.train.sae import SAEConfig
from residual_saes.train.trainer import dead_after


def count_(silent, kept):
    dead.count_(silent, dead.firings(kept, len(silent)), len(kept.starts))


def test_counters_count_tokens_and_reset_on_firing():
    silent = dead.fresh_counters(4, torch.device("cpu"))
    first = Kept.even(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0, 1], [0, 2]]))
    assert dead.firings(first, 4).tolist() == [2, 1, 0, 0]
    count_(silent, first)
    assert silent.tolist() == [0, 0, 2, 2]
    count_(silent, Kept.even(torch.tensor([[1.0, 1.0]]), torch.tensor([[2, 0]])))
    assert silent.tolist() == [0, 1, 0, 3]


def test_kept_but_not_positive_is_silence():
    silent = torch.tensor([5, 5])
    count_(silent, Kept.even(torch.zeros(3, 2), torch.tensor([[0, 1]] * 3)))
    assert silent.tolist() == [8, 8]


def test_dead_from_the_threshold_on():
    assert dead.dead_latents(torch.tensor([9, 10, 11]), 10).tolist() == [1, 2]


def test_counters_do_not_overflow():
    """A billion tokens and more: int32 would wrap."""
    silent = dead.fresh_counters(1, torch.device("cpu"))
    silent += 2**31 - 1
    count_(silent, Kept.even(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64)))
    assert silent.tolist() == [2**31 + 1]


def test_dead_latents_take_turns():
    latents = torch.tensor([1, 4, 5, 8, 9])
    assert torch.equal(dead.in_turns(latents, 5, 3), latents)
    turns = [dead.in_turns(latents, 2, step).tolist() for step in range(5)]
    assert turns == [[1, 4], [5, 8], [1, 9], [4, 5], [8, 9]]


def test_a_short_run_waits_before_it_calls_latents_dead():
    settings = SAEConfig(d_sae=4096, k=32, dead_after=None, bound_dead=True)
    assert dead_after(settings, 150, 2048) == 150 * 2048 // 25  # the usual rule
    assert dead_after(settings, 20, 2048) == 2 * 2048  # what one batch leaves out is chance
    assert dead_after(settings, 20, 64) == 8 * 128
    assert dead_after(replace(settings, bound_dead=False), 20, 64) == 51  # as it was
    assert dead_after(replace(settings, dead_after=7), 20, 64) == 7
