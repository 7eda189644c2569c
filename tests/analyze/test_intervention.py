"""Interventions against plain loops over whole forward passes.

Their nulls are exact. Steering can be made to write a token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from residual_saes.analyze.changes import intervention as hook
from residual_saes.analyze.changes.intervention import EqualNorm, LatentChange, Steer
from residual_saes.analyze.language_model import edited, generate, unembedded
from residual_saes.analyze.questions.problems import read
from residual_saes.analyze.questions.prompts import PROMPTS
from residual_saes.data.errors import SettingError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import HookPoint
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.site import tap
from residual_saes.train.sae import SAE
from tests.harvest.models import save_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="float32"), head=True)


@pytest.fixture(scope="module")
def bfloat16() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="bfloat16"), head=True)


@pytest.fixture(params=["float32", "bfloat16"])
def of_either_dtype(request: Any, lm: LanguageModel, bfloat16: LanguageModel) -> LanguageModel:
    return lm if request.param == "float32" else bfloat16


@pytest.fixture(scope="module")
def prompts(lm: LanguageModel) -> list[list[int]]:
    found = [PROMPTS["lm_eval"](lm.tokenizer, problem.question) for problem in read("tiny", 3)]
    assert len({len(prompt) for prompt in found}) == 3
    return found


def by(lm: LanguageModel, scale: float, positions: str) -> Steer:
    """A steer along `direction`."""
    return Steer("v", direction(lm).numpy(), scale, positions)


def lengths(prompts: list[list[int]]) -> list[int]:
    return [len(prompt) for prompt in prompts]


def direction(lm: LanguageModel) -> Tensor:
    vector = torch.randn(
        lm.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return vector / vector.norm()


def traced(
    lm: LanguageModel, prompts: list[list[int]], *how: Any, new_tokens: int = 6
) -> tuple[Any, list[Tensor]]:
    """Generations, and the logits that each step chose from.

    `how` is a layer with an intervention, or with a steer's scale and positions; without, nothing
    is changed.
    """
    seen: list[Tensor] = []
    handle = lm.causal.register_forward_hook(
        lambda _m, _i, output: seen.append(output.logits[:, -1].clone())
    )
    try:
        if not how:
            return generate(lm, prompts, new_tokens), seen
        layer, *what = how
        change = by(lm, *what) if len(what) > 1 else what[0]
        with hook.intervened(lm, layer, change, lengths(prompts)):
            return generate(lm, prompts, new_tokens), seen
    finally:
        handle.remove()


def same(first: tuple[Any, list[Tensor]], second: tuple[Any, list[Tensor]]) -> bool:
    """Token for token, and every logit bit for bit."""
    return first[0] == second[0] and all(
        torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True)
    )


@pytest.mark.parametrize("positions", hook.POSITIONS)
def test_scale_0_changes_nothing_to_the_last_bit(
    lm: LanguageModel, prompts: Any, positions: str
) -> None:
    assert same(traced(lm, prompts, 5, 0.0, positions), traced(lm, prompts))


def test_the_prompt_alone_is_inert_from_the_layer_that_is_said_on(
    lm: LanguageModel, prompts: Any
) -> None:
    """In the cached path that generation takes, and where a given text is read."""
    unsteered = traced(lm, prompts, new_tokens=3)
    inert = [
        same(traced(lm, prompts, layer, 20.0, "prompt", new_tokens=3), unsteered)
        for layer in range(lm.n_layers)
    ]
    assert inert == [
        layer >= 6 for layer in range(12)
    ]  # 12 layers, the last 5 of which share keys and values
    assert hook.prompt_inert_from(lm) == 6
    texts = [(prompt, written.ids) for prompt, written in zip(prompts, unsteered[0], strict=True)]
    for layer in (5, 6, 11):
        kl = [effect.kl for effect in hook.effects(lm, texts, layer, by(lm, 20.0, "prompt"))]
        assert all(value == 0 for value in kl) if layer > 5 else all(value > 1e-6 for value in kl)
    assert not same(traced(lm, prompts, 8, 20.0, "generated", new_tokens=3), unsteered)


@pytest.mark.parametrize("family", ["gemma4", "llama", "gpt2", "qwen3_5"])
def test_other_families_are_inert_from_the_layer_that_is_said_on(
    family: str, tmp_path: Path
) -> None:
    other = load(ModelConfig(str(save_model(tmp_path, family)), dtype="float32"), head=True)
    prompts = [[2, *range(20, 29)], [2, 40, 41]]
    unsteered = traced(other, prompts, new_tokens=3)
    found = [
        same(traced(other, prompts, layer, 9.0, "prompt", new_tokens=3), unsteered)
        for layer in range(other.n_layers)
    ]
    assert found == [layer >= hook.prompt_inert_from(other) for layer in range(other.n_layers)]
    assert hook.prompt_inert_from(other) == (3 if family == "gemma4" else other.n_layers - 1)


def plain(
    lm: LanguageModel,
    prompt: list[int],
    layer: int,
    change: Callable[[Tensor], Tensor],
    positions: str,
    new_tokens: int,
) -> list[int]:
    """Greedy changed generation of one prompt, by a whole forward pass per token.

    Args:
        change: of a state (d,) what is added to it.
    """
    ids = list(prompt)

    def edit(states: Tensor) -> Tensor:
        states = states.clone()
        for at in range(states.shape[1]):
            generated = at >= len(prompt) - 1
            if positions == "all" or generated == (positions == "generated"):
                states[0, at] += change(states[0, at]).to(states)
        return states

    with torch.inference_mode(), edited(lm.blocks[layer], edit):
        for _ in range(new_tokens):
            ids.append(int(lm.causal(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == lm.tokenizer.inner.eos_token_id:
                return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("positions", hook.POSITIONS)
@pytest.mark.parametrize("layer", [3, 8])
def test_a_cached_batch_is_what_single_whole_passes_give(
    lm: LanguageModel, prompts: Any, layer: int, positions: str
) -> None:
    scale = 60.0
    written, _ = traced(lm, prompts, layer, scale, positions, new_tokens=4)
    step = (scale * direction(lm)).float()
    assert [answer.ids for answer in written] == [
        plain(lm, prompt, layer, lambda _: step, positions, 4) for prompt in prompts
    ]
    changed = [answer.ids for answer in written] != [
        answer.ids for answer in traced(lm, prompts, new_tokens=4)[0]
    ]
    assert changed == (positions != "prompt" or layer == 3)


def test_padding_is_not_steered(lm: LanguageModel, prompts: Any) -> None:
    seen = []
    widths = lengths(prompts)
    with hook.intervened(lm, 3, by(lm, 2.0, "all"), widths), tap(lm, [3]) as taken:
        generate(lm, prompts, 1)
        seen.append(taken[HookPoint(3)].clone())
    with tap(lm, [3]) as taken:
        generate(lm, prompts, 1)
        seen.append(taken[HookPoint(3)].clone())
    for row, width in enumerate(widths):
        delta = (seen[0] - seen[1])[row]
        assert not delta[: max(widths) - width].any()
        expected = (2.0 * direction(lm)).float().expand(width, -1)
        torch.testing.assert_close(delta[max(widths) - width :], expected, rtol=0, atol=2e-5)


def test_the_hook_goes_when_something_fails(lm: LanguageModel, prompts: Any) -> None:
    unsteered = traced(lm, prompts)
    with (
        pytest.raises(IndexError),
        hook.intervened(lm, 4, by(lm, 30.0, "all"), lengths(prompts)),
    ):
        raise IndexError
    assert same(traced(lm, prompts), unsteered)


def test_steering_towards_a_token_writes_it(lm: LanguageModel, prompts: Any) -> None:
    """The last layer pushed to where the head reads a token."""
    rows = lm.causal.get_output_embeddings().weight.detach()
    own = unembedded(lm, 1000 * rows).argmax(-1) == torch.arange(len(rows))
    token = int(torch.nonzero(own)[100])
    towards = Steer("v", rows[token].numpy().astype(np.float64), 1e4, "generated")
    with hook.intervened(lm, 11, towards, lengths(prompts)):
        written = generate(lm, prompts, 4)
    assert all(answer.ids == [token] * 4 for answer in written)


def test_effects_are_those_of_whole_distributions(lm: LanguageModel, prompts: Any) -> None:
    three = 3 * 4 * lm.vocabulary  # bytes of 3 positions' logits
    texts = [(prompt, [7, 30, 99, 12, 200][: at % 3 + 3]) for at, prompt in enumerate(prompts)]
    texts[1] = (texts[1][0], [])
    found = hook.effects(lm, texts, 3, by(lm, 4.0, "all"), 150, three)
    for (prompt, written), effect in zip(texts, found, strict=True):
        ids, last = torch.tensor([[*prompt, *written]]), len(prompt) - 1
        with torch.inference_mode():
            with tap(lm, [3]) as taken:
                clean = lm.causal(ids, use_cache=False).logits[0, last:-1].double().log_softmax(-1)
            with edited(lm.blocks[3], lambda states: states + 4.0 * direction(lm).float()):
                moved = lm.causal(ids, use_cache=False).logits[0, last:-1].double().log_softmax(-1)
        norms = taken[HookPoint(3)][0].double().norm(dim=1)
        assert effect.kl == pytest.approx(
            float((moved.exp() * (moved - clean)).sum()), rel=1e-3, abs=1e-6
        )
        assert effect.norm == pytest.approx(float(norms[last:].mean()), rel=1e-4)
        assert effect.relative == pytest.approx(float((4.0 / norms).mean()), rel=1e-4)


# -- latents ---------------------------------------------------------------------------------------


def random_sae(lm: LanguageModel, prompts: list[list[int]], layer: int, kind: str = "topk") -> SAE:
    """Directions that nobody trained, which fire in these prompts.

    Args:
        kind: topk, or threshold, as BatchTopK and JumpReLU leave.
    """
    with torch.inference_mode(), tap(lm, [layer]) as taken:
        lm.decoder(input_ids=torch.tensor([prompts[0]]), use_cache=False)
    rows = taken[HookPoint(layer)][0].float().clone()
    generator = torch.Generator().manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(48, lm.d_model, generator=generator), dim=1)
    threshold = None
    if kind == "threshold":
        threshold = (rows - rows.mean(0)).matmul(W_dec.T).quantile(0.8, dim=0).clamp_min(0)
    return SAE.of(W_dec.T.clone(), W_dec, torch.zeros(48), rows.mean(0), 8, threshold)


def dense(sae: SAE, state: Tensor) -> Tensor:
    """(F,) activations of a state (d,), by the definition."""
    pre = (state.float() - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.threshold is not None:
        return torch.where(pre > sae.threshold, pre, 0.0)
    kept = pre.topk(sae.k)
    return torch.zeros_like(pre).scatter(0, kept.indices, kept.values.relu())


def by_loop(change: LatentChange) -> Callable[[Tensor], Tensor]:
    """What a change adds to a state (d,): the difference of two decodings, latent by latent."""
    sae = change.sae

    def added(state: Tensor) -> Tensor:
        before = dense(sae, state).double()
        after = before.clone()
        for number, feature in enumerate(change.features):
            value = change.value[number] if isinstance(change.value, tuple) else change.value
            given = {"ablate": 0.0, "clamp": value, "add": float(before[feature]) + value}
            after[feature] = given[change.change]
        return ((after - before) @ sae.W_dec.double()).float()

    return added


CHANGED = [("ablate", 0.0), ("clamp", (9.0, 0.5, 4.0)), ("clamp", 6.0), ("add", (-8.0, 12.0, 5.0))]


@pytest.mark.parametrize(
    ("kind", "positions", "change", "value"),
    [
        (kind, hook.POSITIONS[(number + shift) % 3], *how)
        for shift, kind in enumerate(["topk", "threshold"])
        for number, how in enumerate(CHANGED)
    ],
)
def test_a_change_of_latents_is_what_plain_loops_give(
    lm: LanguageModel, prompts: Any, kind: str, positions: str, change: str, value: Any
) -> None:
    sae = random_sae(lm, prompts, 3, kind)
    latents = LatentChange(sae, change, (40, 7, 22), value, positions)
    written, _ = traced(lm, prompts, 3, latents, new_tokens=3)
    assert [answer.ids for answer in written] == [
        plain(lm, prompt, 3, by_loop(latents), positions, 3) for prompt in prompts
    ]
    # The states themselves, of which the tokens say little.
    with torch.inference_mode(), tap(lm, [3]) as taken:
        lm.decoder(input_ids=torch.tensor([prompts[1]]), use_cache=False)
    rows = taken[HookPoint(3)][0]
    by_row = torch.stack([by_loop(latents)(row) for row in rows])
    added = latents.delta(lm)(rows[None]).expand(1, *rows.shape)[0]
    torch.testing.assert_close(added, by_row, rtol=1e-4, atol=1e-4)
    assert by_row.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_the_error_and_the_other_latents_stay(lm: LanguageModel, prompts: Any, kind: str) -> None:
    """h' - f' W_dec = h - f W_dec, where f' has the new values: whatever the SAE missed is there
    still.
    """
    sae = random_sae(lm, prompts, 5, kind)
    with torch.inference_mode(), tap(lm, [5]) as taken:
        lm.decoder(input_ids=torch.tensor([prompts[0]]), use_cache=False)
    rows = taken[HookPoint(5)][0]
    before = torch.stack([dense(sae, row) for row in rows])
    features = before.sum(0).topk(3).indices
    for change, value in (("ablate", 0.0), ("clamp", 2.5), ("add", 1.5)):
        latents = LatentChange(sae, change, tuple(features.tolist()), value, "all")
        after = before.clone()
        given = {"ablate": 0.0, "clamp": value, "add": before[:, features] + value}
        after[:, features] = torch.as_tensor(given[change])
        moved = rows + latents.delta(lm)(rows)
        error = rows - before @ sae.W_dec - sae.b_dec
        assert error.norm() > 1  # the SAE is a bad one
        torch.testing.assert_close(moved - after @ sae.W_dec - sae.b_dec, error, atol=1e-4, rtol=0)


def test_what_changes_nothing_changes_no_bit(of_either_dtype: LanguageModel, prompts: Any) -> None:
    model = of_either_dtype
    plain_sae = random_sae(model, prompts, 3)
    b_enc = plain_sae.b_enc.clone()
    b_enc[7] = -1e6  # never fires
    sae = SAE.of(plain_sae.W_enc, plain_sae.W_dec, b_enc, plain_sae.b_dec, 8)
    untouched = traced(model, prompts, new_tokens=2)
    for change, value in (("ablate", 0.0), ("clamp", 0.0), ("add", 0.0)):
        silent = LatentChange(sae, change, (7,), value, "all")
        assert same(traced(model, prompts, 3, silent, new_tokens=2), untouched)
        across = EqualNorm(silent, direction(model).numpy())
        assert same(traced(model, prompts, 3, across, new_tokens=2), untouched)
    assert not same(
        traced(model, prompts, 3, LatentChange(sae, "clamp", (7,), 9.0, "all"), new_tokens=2),
        untouched,
    )
    texts = [(prompt, [7, 30]) for prompt in prompts]
    kl = [effect.kl for effect in hook.effects(model, texts, 3, silent)]
    assert kl == [0.0] * len(texts)


def test_clamped_to_its_own_value_a_latent_changes_nothing(lm: LanguageModel, prompts: Any) -> None:
    sae = random_sae(lm, prompts, 3)
    with torch.inference_mode(), tap(lm, [3]) as taken:
        lm.decoder(input_ids=torch.tensor([prompts[0]]), use_cache=False)
    rows = taken[HookPoint(3)][0]
    fired = 0.0
    for row in rows[:8]:
        (value,) = hook.activations(sae, row[None], torch.tensor([5, 30])).tolist()
        fired += sum(value)
        own = LatentChange(sae, "clamp", (5, 30), tuple(value), "all")
        assert not own.delta(lm)(row[None]).any()
    assert fired > 1


def test_adding_to_a_latent_is_steering_by_its_direction(
    of_either_dtype: LanguageModel, prompts: Any
) -> None:
    model = of_either_dtype
    sae = random_sae(model, prompts, 3)
    added = LatentChange(sae, "add", (11,), 30.0, "generated")
    steer = Steer("v", sae.W_dec[11].double().numpy(), 30.0, "generated")
    assert same(traced(model, prompts, 3, added), traced(model, prompts, 3, steer))
    two = LatentChange(sae, "add", (11, 4), (30.0, -20.0), "generated")
    both = (30 * sae.W_dec[11] - 20 * sae.W_dec[4]).double().numpy()
    steer = Steer("v", both, 1.0, "generated")
    assert traced(model, prompts, 3, two)[0] == traced(model, prompts, 3, steer)[0]


@pytest.mark.parametrize("family", ["gemma4", "llama", "gpt2", "qwen3_5"])
def test_latents_of_other_families_change_as_plain_loops_say(family: str, tmp_path: Path) -> None:
    other = load(ModelConfig(str(save_model(tmp_path, family)), dtype="float32"), head=True)
    prompts = [[2, *range(20, 29)], [2, 40, 41]]
    for layer, change in ((0, "ablate"), (other.n_layers - 1, "clamp")):
        latents = LatentChange(random_sae(other, prompts, layer), change, (1, 2, 3, 4), 40.0, "all")
        written, _ = traced(other, prompts, layer, latents, new_tokens=2)
        assert [answer.ids for answer in written] == [
            plain(other, prompt, layer, by_loop(latents), "all", 2) for prompt in prompts
        ]


@pytest.mark.parametrize(("change", "value"), CHANGED)
def test_another_direction_is_as_long_at_every_position(
    lm: LanguageModel, prompts: Any, change: str, value: Any
) -> None:
    sae = random_sae(lm, prompts, 3)
    latents = LatentChange(sae, change, (40, 7, 22), value, "all")
    with torch.inference_mode(), tap(lm, [3]) as taken:
        lm.decoder(input_ids=torch.tensor([prompts[0]]), use_cache=False)
    rows = taken[HookPoint(3)][0]
    own = latents.delta(lm)(rows[None]).expand(1, *rows.shape)[0]
    other = EqualNorm(latents, direction(lm).numpy()).delta(lm)(rows[None])[0]
    torch.testing.assert_close(other.norm(dim=1), own.norm(dim=1), rtol=1e-4, atol=1e-5)
    along = other @ direction(lm).float()
    torch.testing.assert_close(along, own.norm(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [(), (48,), (-1,), (3, 4, 3)])
def test_what_is_no_set_of_latents_is_refused(
    lm: LanguageModel, prompts: Any, features: tuple[int, ...]
) -> None:
    with pytest.raises(SettingError, match="features"):
        LatentChange(random_sae(lm, prompts, 3), "ablate", features, 0.0, "all")
