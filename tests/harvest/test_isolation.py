"""Batches become passes that lose no token, waste little, and wait for no device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import create_masks_for_generate

from residual_saes.data.site import HookPoint
from residual_saes.harvest.forward import batch_residuals, forward
from residual_saes.harvest.isolation import Isolation, attention_mask, forward_inputs, groups
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from tests.harvest.models import CONFIGS, VOCABULARY, save_model

FAMILIES = tuple(CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Each makes the host wait for the device: what comes next depends on a value, on how many there
# are, or on a number of the host (`lift_fresh`).
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
    "repeat_interleave",
    "lift_fresh",
)


class Waits(TorchDispatchMode):
    """Notes every kernel that would wait for an accelerator, on whatever device it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_boolean = name in ("index", "index_put", "index_put_") and any(
            part.dtype == torch.bool
            for part in tree_leaves(args[1])
            if isinstance(part, torch.Tensor)
        )
        if name.startswith(WAITING) or by_boolean:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    root = tmp_path_factory.mktemp("models")

    def opened(family: str) -> LanguageModel:
        folder: Path = root / family
        if not folder.exists():
            save_model(folder, family)
        return load(ModelConfig(str(folder), dtype="float32"))

    return opened


def batch(rows: int = 3, context: int = 40) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    starts = rng.random((rows, context)) < 0.1
    starts[:, 0] = True
    return rng.integers(4, VOCABULARY, (rows, context)).astype(np.uint32), starts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_waits_for_no_device(model: Callable[[str], LanguageModel], family: str) -> None:
    lm = model(family)
    kept_apart: Isolation = "padded" if family == "qwen3_5" else "packed"
    passes = forward_inputs(*batch(), kept_apart)
    with Waits() as waits:
        batch_residuals(lm, passes, [HookPoint(0), HookPoint(2)])
    assert waits.found == []
    with Waits() as waits:  # as it would be: transformers looks at the values of the positions
        forward(lm, passes[0])
    assert "is_nonzero" in waits.found


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_5"])
def test_masks_are_the_ones_that_transformers_makes(
    model: Callable[[str], LanguageModel], family: str
) -> None:
    """Beyond the window of 8 too, and for rows of one piece (transformers makes no full mask)."""
    config: Any = model(family).decoder.config
    tokens, starts = batch()
    (inputs,) = forward_inputs(tokens, starts, "packed")
    ours = attention_mask(config, inputs.positions)
    theirs = create_masks_for_generate(
        config, torch.empty(*tokens.shape, 1), None, None, position_ids=inputs.positions
    )
    assert isinstance(ours, dict) == isinstance(theirs, dict)
    pairs = ours.items() if isinstance(ours, dict) else [("", ours)]
    for kind, mask in pairs:
        assert mask is not None
        assert torch.equal(mask, theirs[kind] if kind else theirs)


def test_unknown_attention_is_left_to_transformers(model: Callable[[str], LanguageModel]) -> None:
    config: Any = model("llama").decoder.config
    positions = torch.arange(4)[None]
    assert attention_mask(config, positions) is not None
    config.attention_chunk_size = 2
    assert attention_mask(config, positions) is None
    config.attention_chunk_size = None
    config._attn_implementation = "flex_attention"  # takes no dense mask
    assert attention_mask(config, positions) is None
    assert attention_mask(model("qwen3_5").decoder.config, positions) is None


def test_every_token_is_in_one_pass_and_none_is_larger_than_the_batch() -> None:
    tokens, starts = batch(rows=4, context=64)
    passes = forward_inputs(tokens, starts, "padded")
    assert len(passes) > 1
    indices = torch.cat([inputs.into for inputs in passes if inputs.into is not None])
    assert sorted(indices.tolist()) == list(range(tokens.size))
    assert sum(inputs.tokens for inputs in passes) == tokens.size
    assert max(inputs.ids.numel() for inputs in passes) <= tokens.size
    flat = torch.from_numpy(tokens.astype(np.int64)).flatten()
    for inputs in passes:
        assert inputs.inside is not None and inputs.into is not None
        assert torch.equal(inputs.ids.flatten()[inputs.inside], flat[inputs.into])


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to share out `items`, in any order whatever."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partial in partitions(rest):
        yield [[first], *partial]
        for at in range(len(partial)):
            yield [*partial[:at], [first, *partial[at]], *partial[at + 1 :]]


@pytest.mark.parametrize("seed", range(8))
def test_no_partition_of_the_pieces_costs_less(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 60, 7)

    def price(found: list[list[int]]) -> int:
        return sum(20 + max(part) * len(part) for part in found)

    allowed = [
        found
        for found in partitions(lengths.tolist())
        if all(max(p) * len(p) <= lengths.sum() for p in found)
    ]
    assert len(allowed) > 300
    ours = [
        lengths[group].tolist() for group in groups(lengths, int(lengths.sum()), pass_tokens=20)
    ]
    assert price(ours) == min(map(price, allowed))


@pytest.mark.parametrize("median", [60, 150, 400, 700, 3000])
def test_padding_adds_less_than_15_percent_to_documents_of_usual_lengths(median: int) -> None:
    rng = np.random.default_rng(median)
    ends = np.cumsum(rng.lognormal(np.log(median), 1.0, 16_384 * 4 // median + 50).astype(int) + 2)
    starts = np.zeros((16, 1024), bool)
    starts[:, 0] = True
    starts.flat[ends[ends < starts.size]] = True
    edges = [*np.flatnonzero(starts).tolist(), starts.size]
    assert max(b - a for a, b in pairwise(edges)) <= 1024
    passes = forward_inputs(np.ones(starts.shape, np.uint32), starts, "padded")
    assert sum(inputs.ids.numel() for inputs in passes) < 1.15 * starts.size


def rows_of_layer_2(lm: LanguageModel, passes: Any, tokens: int) -> torch.Tensor:
    point = HookPoint(2)
    return batch_residuals(lm, passes, [point], {point: torch.empty(tokens, 32)})[point]


def test_eager_attention_adds_its_mask(model: Callable[[str], LanguageModel]) -> None:
    """Families without SDPA (gpt-oss) add the mask to their scores: the rows are the same."""
    lm = model("gemma3")
    tokens, starts = batch()
    passes = forward_inputs(tokens, starts, "packed")
    by_sdpa = rows_of_layer_2(lm, passes, tokens.size)
    config: Any = lm.decoder.config
    config._attn_implementation = "eager"
    assert attention_mask(config, passes[0].positions)["full_attention"].dtype == torch.float32
    by_adding = rows_of_layer_2(lm, passes, tokens.size)
    torch.testing.assert_close(by_adding, by_sdpa, rtol=1e-3, atol=1e-4)
