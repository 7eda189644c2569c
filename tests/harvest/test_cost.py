"""A model's cost from its configuration, against published numbers and models that are run."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Gemma4TextConfig, GPT2Config, LlamaConfig, Qwen3MoeConfig

from residual_saes.data.errors import SettingError
from residual_saes.data.site import HookPoint
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest.cost import cost
from residual_saes.harvest.decoder import find_blocks
from residual_saes.harvest.forward import batch_residuals
from residual_saes.harvest.isolation import forward_inputs
from residual_saes.harvest.model import LanguageModel, ModelConfig
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.tokens import Tokenizer
from tests.harvest.models import COMPOSITE, CONFIGS, E4B

CONTEXT = 256
MEDIUM: dict[str, Any] = {
    "gemma4": Gemma4TextConfig(
        vocab_size=1000,
        vocab_size_per_layer_input=1000,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=48,
        global_head_dim=96,
        sliding_window=512,
        num_kv_shared_layers=4,
        hidden_size_per_layer_input=32,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 2,
    ),
    "llama": LlamaConfig(
        vocab_size=1000,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(
        vocab_size=1000, n_embd=192, n_layer=12, n_head=4, bos_token_id=1, eos_token_id=1
    ),
}


def random_model(config: Any, dtype: Any) -> LanguageModel:
    """Random weights; whatever a plan does not use is made up."""
    decoder = AutoModel.from_config(copy.deepcopy(config), dtype=getattr(torch, dtype))
    decoder.eval().requires_grad_(False)
    n = config.num_hidden_layers
    return LanguageModel(
        config=ModelConfig("none", dtype=dtype),
        decoder=decoder,
        blocks=find_blocks(decoder),
        tokenizer=Tokenizer.load(MODEL_DIR),
        d_model=config.hidden_size,
        vocabulary=1000,
        n_layers=n,
        deepest=n - 1,
        max_context=2048,
        identity={},
    )


def storages(tree: Any) -> list[Any]:
    """The memory behind all tensors of a nested structure."""
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors]


class Live(TorchDispatchMode):
    """The peak of bytes held in tensors that kernels made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            key, nbytes = storage._cdata, storage.nbytes()
            if key not in given | self.known:
                self.known.add(key)
                self.now += nbytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, nbytes)
        return out

    def _gone(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


def test_e4b_has_its_published_size_and_cost() -> None:
    to_21, to_27 = cost(E4B, [21], "bfloat16", 16, 1024), cost(E4B, [21, 27], "bfloat16", 16, 1024)
    assert to_27.parameters == pytest.approx(7.46e9, rel=1e-3)
    assert to_21.flop == pytest.approx(4.23e9, rel=0.03)
    assert to_27.flop == pytest.approx(5.35e9, rel=0.03)
    # 14 layers of 42 go, and their third of a table of 262,144 x 42 x 256.
    table = 262_144 * 14 * 256
    assert 2 * (to_27.parameters - to_27.kept - table) == pytest.approx(2.6e9, rel=0.03)
    assert E4B.num_hidden_layers == 42  # the caller's configuration is left alone


@pytest.mark.parametrize("family", MEDIUM)
def test_flop_are_the_ones_of_the_kernels(family: str) -> None:
    """Against torch's count, which takes all T of a dense mask where we count what is seen."""
    config = MEDIUM[family]
    predicted = cost(config, [3, 7], "float32", 2, CONTEXT)
    lm = random_model(config, "float32")
    lm.truncate_(7)
    starts = np.zeros((2, CONTEXT), bool)
    starts[:, 0] = True
    passes = forward_inputs(np.ones((2, CONTEXT), np.uint32), starts, "packed")
    # The fused kernel for CPUs is not in torch's tables; the plain one is two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        batch_residuals(lm, passes, [HookPoint(3), HookPoint(7)])
    dense = predicted.attention_flop * 2 * CONTEXT / (CONTEXT + 1)
    assert counter.get_total_flops() == pytest.approx(
        (predicted.matmul_flop + dense) * 2 * CONTEXT, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
@pytest.mark.parametrize("family", MEDIUM)
def test_bytes_are_the_ones_that_a_run_holds(family: str, dtype: str) -> None:
    config = MEDIUM[family]
    predicted = cost(config, [3, 7], dtype, 2, CONTEXT)
    lm = random_model(config, dtype)
    assert predicted.parameters == sum(parameter.numel() for parameter in lm.decoder.parameters())
    lm.truncate_(7)
    kept = [weight for weight in lm.decoder.parameters() if not weight.is_meta]
    assert predicted.kept_bytes == sum(weight.nbytes for weight in kept)
    starts = np.zeros((2, CONTEXT), bool)
    starts[:, ::50] = True
    passes = forward_inputs(np.ones((2, CONTEXT), np.uint32), starts, "packed")
    with Live() as live:
        batch_residuals(lm, passes, [HookPoint(3), HookPoint(7)])
    assert live.peak / 1.3 < predicted.activation_bytes < live.peak * 1.3


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_can_be_counted(family: str) -> None:
    text: Any = CONFIGS[family].get_text_config()
    first, last = (
        cost(CONFIGS[family], [layer], "bfloat16", 2, 64)
        for layer in (0, text.num_hidden_layers - 1)
    )
    assert first.kept < last.kept == last.parameters
    assert first.flop < last.flop
    with pytest.raises(SettingError, match=f"layer={text.num_hidden_layers} "):
        cost(CONFIGS[family], [text.num_hidden_layers], "bfloat16", 2, 64)


def test_a_window_and_linear_attention_cost_less() -> None:
    narrow = copy.deepcopy(MEDIUM["gemma4"])
    narrow.sliding_window = 2
    seen = np.minimum(
        np.arange(CONTEXT) + 1, 2
    ).mean()  # in the five layers before the first full one
    assert cost(narrow, [4], "float32", 1, CONTEXT).attention_flop == pytest.approx(
        5 * 4 * seen * 4 * 48
    )
    linear = cost(COMPOSITE["qwen3_5"], [2], "float32", 1, CONTEXT)
    assert linear.attention_flop == 0
    assert linear.matmul_flop > 0


def test_a_mixture_counts_the_experts_that_a_token_meets() -> None:
    def flop(experts: int, active: int) -> float:
        config = Qwen3MoeConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=experts,
            num_experts_per_tok=active,
        )
        return cost(config, [1], "float32", 1, 16).matmul_flop

    assert flop(8, 4) - flop(8, 2) == 2 * 2 * 2 * (
        3 * 32 * 16
    )  # two flop, layers, experts; three matrices
    assert flop(16, 2) - flop(8, 2) == 2 * 2 * 8 * 32  # the router alone


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
@pytest.mark.parametrize("family", MEDIUM)
def test_the_self_check_holds_what_is_counted(family: str, dtype: str) -> None:
    config = MEDIUM[family]
    predicted = cost(config, [3, 7], dtype, 2, CONTEXT)
    lm = random_model(config, dtype)
    lm.truncate_(7)
    with Live() as live:
        assert choose_isolation(lm, [3, 7], CONTEXT) == "packed"
    assert live.peak / 1.5 < predicted.check_bytes < live.peak * 1.5
