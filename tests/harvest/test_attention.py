"""Other ways to attend in packed rows: taken where they are right, left out where they are not.

A stand-in for FlashAttention's package computes each piece by SDPA. It stands where transformers
imports the package from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Gemma2Config, modeling_flash_attention_utils

from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.site import HookPoint
from residual_saes.data.store import manifest
from residual_saes.data.store.place import place_of
from residual_saes.data.text.sources import TinyText
from residual_saes.harvest import attention, attention_trial
from residual_saes.harvest.attention import SDPA, Attention
from residual_saes.harvest.attention_trial import proven, settle_attention_
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.forward import batch_residuals
from residual_saes.harvest.isolation import forward_inputs
from residual_saes.harvest.loop import harvest, open_
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.selfcheck import worst
from residual_saes.harvest.verify import verify
from tests.harvest.models import VOCABULARY, save_model, save_tokenizer
from tests.harvest.test_isolation import Waits, batch

WAY = "flash_attention_3"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class StandIn:
    """FlashAttention's function of variable lengths, piece by piece, and how it was called."""

    def __init__(self) -> None:
        self.widest = 512  # head width
        self.fails: Exception | None = None
        self.merges = False  # pieces into one
        self.widens = 0  # the window, by so many keys
        self.is_quiet = False  # computes nothing
        self.ends: set[tuple[int, ...]] = set()
        self.windows: set[tuple[int, int]] = set()

    def function(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        """(n, h, w), as q; `window_size` is how many keys are seen beside a query's own."""
        assert causal and isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.device == q.device and q.ndim == k.ndim == v.ndim == 3
        if self.fails is not None:
            raise self.fails
        if q.shape[-1] > self.widest:
            raise RuntimeError(f"FlashAttention supports head dimension at most {self.widest}")
        self.windows.add(window_size)
        if self.is_quiet:
            return torch.zeros_like(q)
        ends = cu_seqlens_q.tolist()
        self.ends.add(tuple(ends))
        assert max(b - a for a, b in pairwise(ends)) <= max_seqlen_q
        out = torch.empty_like(q)
        for begin, end in pairwise([0, len(q)] if self.merges else ends):
            part = slice(begin, end)
            back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            seen = back >= 0
            if window_size[0] >= 0:
                seen &= back <= window_size[0] + self.widens
            states = [x[part].transpose(0, 1)[None] for x in (q, k, v)]
            out[part] = scaled_dot_product_attention(
                *states, attn_mask=seen, scale=softmax_scale, enable_gqa=True
            )[0].transpose(0, 1)
        return out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The package, as if it were installed."""
    made = StandIn()
    package: Any = ModuleType("flash_attn_interface")
    package.flash_attn_varlen_func = made.function
    package.flash_attn_func = package.flash_attn_with_kvcache = made.function
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(attention, "version", lambda _: "3.0")
    for module in (attention, attention_trial):
        monkeypatch.setattr(module, "installed", lambda: [WAY])
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LanguageModel]:
    root = tmp_path_factory.mktemp("models")

    def opened(family: str, dtype: Any = "float32") -> LanguageModel:
        folder: Path = root / family
        if not folder.exists():
            save_model(folder, family)
        return load(ModelConfig(str(folder), dtype=dtype))

    return opened


def config(lm: LanguageModel, asked: Any = "auto", **other: Any) -> HarvestConfig:
    layers = (lm.n_layers - 1,)
    return HarvestConfig("unused", layers, 1000, context=40, batch=3, attention=asked, **other)


def rows(lm: LanguageModel) -> torch.Tensor:
    """(120, d) float32 rows of the last layer, of a batch of many pieces."""
    point = HookPoint(lm.n_layers - 1)
    tokens, starts = batch()
    out = {point: torch.empty(tokens.size, lm.d_model)}
    return batch_residuals(lm, forward_inputs(tokens, starts, "packed"), [point], out)[point]


def why_not(lm: LanguageModel) -> str:
    """Why the stand-in is left out; empty: it is not."""
    right, left_out = proven(lm, config(lm), [Attention(WAY)])
    assert set(right) | set(left_out) == {WAY} and lm.attention == SDPA
    return left_out.get(WAY, "")


@pytest.mark.parametrize("family", ["gpt2", "gemma4"])
def test_variable_lengths_give_the_rows_of_masks(
    model: Callable[..., LanguageModel], stand_in: StandIn, family: str
) -> None:
    lm = model(family)
    expected = rows(lm)
    settle_attention_(lm, config(lm, "flash"), None)
    widths = {"gemma4": (16, 32)}.get(family, (16,))
    assert lm.attention == Attention(WAY, widths, "3.0")
    stand_in.ends.clear()
    assert worst(rows(lm), expected) < 1e-4
    begins = batch()[1].ravel().nonzero()[0].tolist()
    assert stand_in.ends == {(*begins, 120)}
    inside = {(7, 7)} if family.startswith("gemma") else set()
    assert stand_in.windows == {(-1, -1)} | inside

    stand_in.is_quiet = True
    tokens, starts = batch()
    passes = forward_inputs(tokens, starts, "packed")
    with Waits() as waits:
        batch_residuals(lm, passes, [HookPoint(0)])
    assert waits.found == []


@pytest.mark.long  # torch imports its compiler
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_rows_of_masks(
    model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not compiled: that takes a minute."""
    calls: list[int] = []

    def eager(*states: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(states[0].shape[-1])
        out: Any = flex_attention(*states, **options)
        return out

    monkeypatch.setattr(attention, "flex", lambda: eager)
    lm = model("gemma4")
    expected = rows(lm)
    settle_attention_(lm, config(lm, "flex"), None)
    assert lm.attention == Attention("flex", (16, 32))
    calls.clear()
    assert worst(rows(lm), expected) < 1e-4
    assert sorted(set(calls)) == [16, 32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_way_is_left_out(
    model: Callable[..., LanguageModel], stand_in: StandIn, dtype: str
) -> None:
    lm = model("gemma3", dtype)
    assert why_not(lm) == ""
    stand_in.widens = 1
    assert "differs by" in why_not(lm)
    stand_in.widens = 0
    stand_in.merges = True
    assert "differs by" in why_not(lm)
    with pytest.raises(SettingError, match="attention=flash"):
        settle_attention_(lm, config(lm, "flash"), None)
    assert lm.attention == SDPA


def test_a_way_that_raises_is_left_out(
    model: Callable[..., LanguageModel], stand_in: StandIn
) -> None:
    lm = model("gemma4")
    stand_in.fails = ImportError("undefined symbol")
    assert "undefined symbol" in why_not(lm)
    stand_in.fails = None

    # Layers of the other head width go on with SDPA.
    expected = rows(lm)
    stand_in.widest = 16
    settle_attention_(lm, config(lm, "flash"), None)
    assert lm.attention == Attention(WAY, (16,), "3.0")
    assert worst(rows(lm), expected) < 1e-4

    # A store whose first layers were deeper has head widths that do not come in this one.
    begun = {"attention": {"way": WAY, "widths": [16, 32]}}
    settle_attention_(lm := model("gemma4"), replace(config(lm), layers=(0,)), begun)
    assert lm.attention == Attention(WAY, (16, 32), "3.0")
    with pytest.raises(StoreError, match="at head width 32"):
        settle_attention_(model("gemma4"), config(lm), begun)


def test_only_families_of_full_and_sliding_attention_have_a_choice(
    model: Callable[..., LanguageModel], stand_in: StandIn, tmp_path: Path
) -> None:
    lm = model("gemma3")
    lm.isolation = "padded"
    with pytest.raises(SettingError, match="padded"):
        settle_attention_(lm, config(lm, "flash"), None)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    capped = Gemma2Config(vocab_size=VOCABULARY, **heads, **sizes)
    AutoModelForCausalLM.from_config(capped).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    lm = load(ModelConfig(str(tmp_path), dtype="float32"))
    with pytest.raises(SettingError, match="softcap"):
        settle_attention_(lm, config(lm, "flash"), None)


@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_the_faster_right_way_is_taken(
    model: Callable[..., LanguageModel],
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
) -> None:
    """On a GPU, of a harvest that is long enough; the clock is a fake."""
    lm = model("llama")
    now = 0.0

    def timed(lm: LanguageModel, *others: Any) -> Any:
        nonlocal now
        now += 1.0 if lm.attention == SDPA else seconds
        return batch_residuals(lm, *others)

    monkeypatch.setattr(attention_trial, "batch_residuals", timed)
    monkeypatch.setattr(attention_trial.tuning.time, "perf_counter", lambda: now)
    monkeypatch.setattr(attention_trial, "_on_gpu", lambda _: True)
    monkeypatch.setattr(attention, "flex", lambda: 1 / 0)  # as where nothing compiles
    settle_attention_(lm, config(lm), None)
    assert lm.attention == SDPA
    settle_attention_(lm, replace(config(lm), tokens=10**9), None)
    assert lm.attention == (Attention(WAY, (16,), "3.0") if seconds < 1 else SDPA)


def test_a_store_keeps_its_way(
    model: Callable[..., LanguageModel],
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = TinyText()
    first = replace(config(model("gemma3"), "flash"), store=tmp_path / "a.zarr")
    harvest(first, model("gemma3"), source)
    place = place_of(first.store)
    entry = {"way": WAY, "widths": [16], "version": "3.0"}
    assert manifest.read(place)["attention"] == entry
    verify(place, lambda _: model("gemma3"))

    # Another process has begun it, and this one has chosen otherwise.
    claims = place.claims()
    lm = model("gemma3")
    again = replace(first, attention="auto")
    open_(place, again, lm, source, claims)
    assert lm.attention == Attention(WAY, (16,), "3.0")
    with pytest.raises(MismatchError, match="attention"):
        open_(place, replace(first, attention="sdpa"), model("gemma3"), source, claims)

    # The package has changed, is wrong here, or has gone.
    there = manifest.read(place)
    monkeypatch.setattr(attention, "version", lambda _: "3.1")
    settle_attention_(lm := model("gemma3"), again, there)
    with pytest.raises(MismatchError, match=r"3\.1"):
        open_(place, again, lm, source, claims)
    stand_in.merges = True
    with pytest.raises(StoreError, match="differs by"):
        settle_attention_(model("gemma3"), again, there)
    monkeypatch.setattr(attention, "installed", list)
    with pytest.raises(StoreError, match="flash-attn-3"):
        settle_attention_(model("gemma3"), again, there)

    # A store that records none was made by SDPA.
    lm = model("gemma3")
    settle_attention_(lm, again, {})
    assert lm.attention == SDPA
