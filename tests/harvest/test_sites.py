"""Sites inside a layer: their values are the model's own, and an edit reaches the stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from residual_saes.data.errors import SettingError
from residual_saes.data.site import (
    ATTN_OUT,
    MLP_IN,
    MLP_OUT,
    RESID_MID,
    RESID_POST,
    RESID_PRE,
    SITES,
    HookPoint,
)
from residual_saes.data.text.sources import FileText
from residual_saes.harvest.anatomy import Term
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.decoder import find_blocks
from residual_saes.harvest.dissection import dissect, require_foreseen
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.selfcheck import choose_isolation
from residual_saes.harvest.site import DeepestReached, edited_at, tap
from residual_saes.harvest.status import status
from residual_saes.harvest.verify import verify
from tests.harvest.families import save_family, tiny_config
from tests.harvest.models import enlarge_, save_model

pytestmark = pytest.mark.filterwarnings("ignore")
LAYER = 2


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    """Tiny float32 models by family, each built once."""
    models: dict[str, LanguageModel] = {}

    def model(family: str) -> LanguageModel:
        if family not in models:
            folder = tmp_path_factory.mktemp(family)
            save = save_model if family == "gemma4" else save_family
            models[family] = load(ModelConfig(str(save(folder, family)), dtype="float32"))
        return models[family]

    return model


def values(lm: LanguageModel, layer: int = LAYER) -> dict[str, torch.Tensor]:
    """Values of every site of a layer in one pass, (b, t, d) each."""
    points = [HookPoint(layer, site) for site in lm.anatomy.sites(layer)]
    with tap(lm, points) as taken:
        run(lm)
    return {point.site: states for point, states in taken.items()}


def run(lm: LanguageModel) -> Any:
    ids = torch.arange(20, 40).reshape(2, 10)
    with torch.inference_mode():
        return lm.decoder(input_ids=ids, use_cache=False).last_hidden_state


# Gemma 4; residual multipliers; an MLP of two modules of the layer itself; a mixture of experts.
MODULES = {
    "gemma4": ("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    "granite": ("self_attn", "mlp", "mlp"),
    "opt": ("self_attn", "fc1", "fc2"),
    "mixtral": ("self_attn", "mlp", "mlp"),
}


def by_hand(lm: LanguageModel, family: str) -> dict[str, torch.Tensor]:
    """The sites of a layer by its own modules' names."""
    block = lm.blocks[LAYER]
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, *, of_input: bool = False) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            value = inputs[0] if of_input else output
            kept[name] = value[0] if isinstance(value, tuple) else value

        return hook

    modules = MODULES[family]
    handles = [
        block.get_submodule(modules[0]).register_forward_hook(keep(ATTN_OUT)),
        block.get_submodule(modules[1]).register_forward_hook(keep(MLP_IN, of_input=True)),
        block.get_submodule(modules[2]).register_forward_hook(keep(MLP_OUT)),
    ]
    run(lm)
    for handle in handles:
        handle.remove()
    config: Any = lm.decoder.config
    factor = config.residual_multiplier if family == "granite" else 1.0
    kept[ATTN_OUT] = kept[ATTN_OUT] * factor
    kept[MLP_OUT] = kept[MLP_OUT] * factor
    return kept


@pytest.mark.parametrize("family", MODULES)
def test_sites_are_what_the_modules_give(
    opened: Callable[[str], LanguageModel], family: str
) -> None:
    lm = opened(family)
    expected = by_hand(lm, family)
    found = values(lm)
    assert set(found) == set(SITES)
    for site, states in expected.items():
        torch.testing.assert_close(found[site], states.reshape(found[site].shape), rtol=0, atol=0)
    summed = found[RESID_PRE] + found[ATTN_OUT]
    torch.testing.assert_close(summed, found[RESID_MID], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma4", "granite", "opt", "gptj", "granitemoehybrid"])
@pytest.mark.parametrize("site", [RESID_PRE, ATTN_OUT, MLP_IN, MLP_OUT, RESID_POST])
def test_an_edit_is_what_the_model_goes_on_with(
    opened: Callable[[str], LanguageModel], family: str, site: str
) -> None:
    """The same values change nothing. Others are what a tap inside sees, and what the sum holds."""
    lm = opened(family)
    before = values(lm)
    point = HookPoint(LAYER, site)
    with edited_at(lm, point, lambda states: states.clone()):
        same = values(lm)
    for name, states in before.items():
        torch.testing.assert_close(same[name], states, rtol=1e-5, atol=1e-6)
    target = torch.randn_like(before[site])
    with edited_at(lm, point, lambda states: target.to(states.dtype)):
        after = values(lm)
    torch.testing.assert_close(after[site], target, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[RESID_POST], before[RESID_POST], atol=1e-3)


def test_an_mlp_may_be_replaced_by_a_function_of_what_it_reads(
    opened: Callable[[str], LanguageModel],
) -> None:
    """As a transcoder does it: the layer's output is resid_mid and the function's value."""
    lm = opened("llama")
    reads, writes = HookPoint(LAYER, MLP_IN), HookPoint(LAYER, MLP_OUT)
    with tap(lm, [reads]) as read:

        def function(_states: torch.Tensor) -> torch.Tensor:
            return 3.0 * read[reads]

        with edited_at(lm, writes, function):
            found = values(lm)
    expected = found[RESID_MID] + 3.0 * found[MLP_IN]
    torch.testing.assert_close(found[RESID_POST], expected, rtol=1e-5, atol=1e-5)


def test_experts_beside_a_dense_mlp_write_one_sum_and_read_different_norms() -> None:
    """Gemma 4 with a mixture: experts behind a norm of their own, a router of the stream."""
    config = tiny_config("gemma4_text")
    config.update(
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        }
    )
    torch.manual_seed(0)
    decoder = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    enlarge_(decoder)
    anatomy = dissect(decoder, find_blocks(decoder), 1, torch.arange(20, 36).reshape(2, 8))
    assert set(SITES) - set(anatomy.sites(1)) == {MLP_IN}
    assert anatomy.layers[1].places[MLP_OUT] == (Term("post_feedforward_layernorm"),)
    with pytest.raises(SettingError, match="site=mlp_in "):
        anatomy.require([HookPoint(1, MLP_IN)])


def test_a_layer_that_changes_its_input_in_place_is_refused(
    opened: Callable[[str], LanguageModel],
) -> None:
    """What was taken of the layer below would change with it."""
    lm = opened("llama")
    handle = lm.blocks[LAYER].register_forward_pre_hook(lambda _, inputs: inputs[0].add_(1.0))
    with handle, pytest.raises(SettingError, match=f"layer {LAYER} "):
        choose_isolation(lm, [LAYER - 1, LAYER], 16)


def test_a_store_takes_sites_and_others_later(tmp_path: Path) -> None:
    """int8 is fitted to each. Status and verify go over all of them."""
    folder, text = save_family(tmp_path / "model", "granite"), tmp_path / "text.txt"
    lm = load(ModelConfig(str(folder), dtype="float32"))
    text.write_text("All work and no play makes nobody happy. " * 9)
    first = HarvestConfig(
        *(tmp_path / "s.zarr", (LAYER,)),
        tokens=128,
        context=16,
        batch=2,
        unit=64,
        sites=(MLP_IN, MLP_OUT),
        codec="int8",
    )
    harvest(first, lm, FileText(text))
    store = harvest(replace(first, layers=(1, LAYER), sites=(ATTN_OUT,)), lm, FileText(text))
    points = [HookPoint(1, ATTN_OUT)] + [HookPoint(LAYER, s) for s in (ATTN_OUT, MLP_IN, MLP_OUT)]
    assert store.points == points and all(map(store.complete, points))
    told = list(status(store.place))
    for point in points:
        assert any(line.startswith(f"{point}: 2 of 2 units") for line in told)
    assert "is the same" in verify(store.place, lambda _deepest: lm)

    # A stored row is its site's, but for int8's rounding.
    with tap(lm, points, ends=True) as taken, suppress(DeepestReached), torch.inference_mode():
        lm.decoder(input_ids=torch.from_numpy(store.tokens(0)[:1].astype(np.int64)))
    first_row = np.flatnonzero(store.permutation(0) == 0)[0]
    for point in points:
        bits = torch.from_numpy(store.residuals(point, 0)[first_row])
        row = bits.view(torch.bfloat16).float()
        assert (row - taken[point][0, 0]).norm() < 0.05 * row.norm()


@pytest.mark.parametrize(
    ("family", "site"), [("gptj", RESID_MID), ("bert", MLP_OUT), ("doge", ATTN_OUT)]
)
def test_what_the_code_shows_is_refused_before_any_weight(family: str, site: str) -> None:
    config = tiny_config(family)
    with pytest.raises(SettingError, match=f"site={site} .*resid_pre"):
        require_foreseen(config, [HookPoint(1, RESID_POST), HookPoint(1, site)])
    require_foreseen(config, [HookPoint(1, RESID_PRE), HookPoint(1, RESID_POST)])
    require_foreseen(tiny_config("llama"), [HookPoint(1, site)])


def test_a_site_that_a_family_has_not_is_one_line(opened: Callable[[str], LanguageModel]) -> None:
    lm = opened("gptj")
    with (
        pytest.raises(SettingError, match=r"site=resid_mid .*attn_out, mlp_in, mlp_out"),
        tap(lm, [HookPoint(1, RESID_MID)]),
    ):
        pass
    with pytest.raises(SettingError, match="attn_out"), edited_at(lm, "resid_mid_1", torch.neg):
        pass
