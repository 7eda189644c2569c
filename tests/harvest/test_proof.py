"""A wrong anatomy, whatever is wrong in it, is refused at the start; a right one passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from residual_saes.data.errors import SettingError
from residual_saes.data.site import ATTN_OUT, MLP_IN, MLP_OUT, RESID_MID, HookPoint
from residual_saes.harvest.anatomy import INSIDE, Anatomy, Place, Reader, Term
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.proof import prove
from tests.harvest.families import save_family
from tests.harvest.models import save_model

pytestmark = pytest.mark.filterwarnings("ignore")
LAYER = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    root = tmp_path_factory.mktemp("proof")
    folders = {"gemma4": save_model(root / "gemma4", "gemma4")}
    folders |= {family: save_family(root / family, family) for family in ("llama", "gptj")}
    found = {name: load(ModelConfig(str(f), dtype="float32")) for name, f in folders.items()}
    scalar: Any = found["gemma4"].blocks[LAYER].layer_scalar
    scalar.fill_(0.5)
    # Another layer's MLP, under a name of this one.
    blocks: Any = found["llama"].blocks
    blocks[LAYER].add_module("stranger", blocks[LAYER - 1].mlp)
    return found


@pytest.fixture
def restored(models: dict[str, LanguageModel]) -> Iterator[None]:
    right = {name: lm.anatomy for name, lm in models.items()}
    yield
    for name, lm in models.items():
        lm.anatomy = right[name]


def planted(anatomy: Anatomy, **changes: Any) -> Anatomy:
    """An anatomy with other facts of `LAYER`."""
    layers = list(anatomy.layers)
    layers[LAYER] = replace(layers[LAYER], **changes)
    return replace(anatomy, layers=tuple(layers))


def proven(lm: LanguageModel, site: str) -> None:
    prove(lm, [HookPoint(LAYER, site)], torch.arange(20, 84).reshape(2, 32))


@pytest.mark.parametrize("family", ["gemma4", "llama", "gptj"])
def test_what_is_right_passes(models: dict[str, LanguageModel], family: str) -> None:
    for site in models[family].anatomy.layers[LAYER].places:
        proven(models[family], site)


WRONG: dict[str, tuple[str, str, Place]] = {
    "before the MLP's post-norm": ("gemma4", MLP_OUT, (Term("mlp"),)),
    "a gate's output": ("gemma4", MLP_OUT, (Term("mlp.gate_proj"),)),
    "attention's output for the MLP's": ("gptj", MLP_OUT, (Term("attn"),)),
    "another layer's MLP": ("llama", MLP_OUT, (Term("stranger"),)),
    "the MLP's output twice": ("llama", MLP_OUT, (Term("mlp", factors=(2.0,)),)),
    "before attention's post-norm": ("gemma4", ATTN_OUT, (Term("self_attn"),)),
    "the MLP's output for attention's": ("gptj", ATTN_OUT, (Term("mlp"),)),
    "the layer's input": ("llama", RESID_MID, (Reader("input_layernorm", 0),)),
    "the stream before the norm": ("gemma4", MLP_IN, (Reader("pre_feedforward_layernorm", 0),)),
    "inside the MLP": ("gemma4", MLP_IN, (Reader("mlp.down_proj", 0),)),
    "behind the MLP": ("gemma4", MLP_IN, (Reader("post_feedforward_layernorm", 0),)),
    "what attention reads": ("llama", MLP_IN, (Reader("self_attn", "hidden_states"),)),
    "what another layer's MLP reads": ("llama", MLP_IN, (Reader("stranger", 0),)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_place_is_refused(
    models: dict[str, LanguageModel], restored: None, name: str
) -> None:
    family, site, place = WRONG[name]
    lm = models[family]
    places = {**lm.anatomy.layers[LAYER].places, site: place}
    lm.anatomy = planted(lm.anatomy, places=places)
    with pytest.raises(SettingError, match=f"site={site} .*resid_pre.*resid_post") as error:
        proven(lm, site)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"others": ()}, {"scale": ()}])
def test_what_else_a_layer_does_counts(
    models: dict[str, LanguageModel], restored: None, changes: dict[str, Any]
) -> None:
    """Gemma 4 adds per-layer inputs behind its MLP, and multiplies the stream at its end."""
    lm = models["gemma4"]
    lm.anatomy = planted(lm.anatomy, **changes)
    with pytest.raises(SettingError, match=f"site={MLP_OUT} "):
        proven(lm, MLP_OUT)
    proven(lm, RESID_MID)  # the rest holds


def test_sites_that_fail_are_not_offered(models: dict[str, LanguageModel], restored: None) -> None:
    lm = models["gptj"]
    places = {**lm.anatomy.layers[LAYER].places, ATTN_OUT: (Term("mlp"),)}
    lm.anatomy = planted(lm.anatomy, places=places)
    with pytest.raises(SettingError) as error:
        proven(lm, ATTN_OUT)
    offered = str(error.value).split("one of ")[1].split(", ")
    assert set(offered).isdisjoint({ATTN_OUT, MLP_OUT, RESID_MID})
    assert set(INSIDE) & set(offered) == {MLP_IN}
