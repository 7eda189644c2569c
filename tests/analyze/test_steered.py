"""Steering by a latent against a loop over whole forward passes, in the study and from Python."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residual_saes import SAE
from residual_saes.analyze.latents import rates
from residual_saes.analyze.studies import steer as study_steer
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import MLP_OUT, HookPoint
from residual_saes.data.tiny.problems import problems
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.train.ports import ports_of

PROMPT = f"Question: {next(problems('heldout')).question}\nAnswer:"
TOKENS = 4
LAYER = 5
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="float32"), head=True)


@pytest.fixture(scope="module")
def subject(tiny_run: Path) -> Subject:
    return Subject.open(tiny_run, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def feature(subject: Subject) -> int:
    """A latent that fires often."""
    return int(rates.of(subject).count.argmax())


@pytest.fixture
def ask(tiny_study: Any, lm: LanguageModel) -> Ask:
    """What the study finds with some settings; the model is loaded already."""

    def asked(new_tokens: int = 4, **settings: Any) -> dict[str, Any]:
        study: Study = tiny_study("steer", new_tokens=new_tokens)
        study.loaded[study.model] = lm
        study.asked = settings
        return study.perform(study_steer.DEFINITION).figures

    return asked


@pytest.fixture(scope="module")
def own(tiny_run: Path, lm: LanguageModel) -> SAE:
    sae = SAE.load(tiny_run)
    sae.__dict__["language_model"] = lm
    return sae


@torch.inference_mode()
def logits(lm: LanguageModel, ids: list[int], added: torch.Tensor | None) -> torch.Tensor:
    """(t, V) behind each token, with a vector added to the layer's output everywhere."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        moved = first + added
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = lm.blocks[LAYER].register_forward_hook(hook) if added is not None else None
    try:
        return lm.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        if handle:
            handle.remove()


def greedy(lm: LanguageModel, ids: list[int], added: torch.Tensor | None) -> list[int]:
    new: list[int] = []
    while len(new) < TOKENS:
        token = int(logits(lm, ids + new, added)[-1].argmax())
        if token in lm.causal.generation_config.eos_token_id:
            break
        new.append(token)
    return new


# -- the values ------------------------------------------------------------------------------------


def test_a_scale_adds_the_mean_activation_everywhere(
    ask: Ask, own: SAE, lm: LanguageModel, subject: Subject, feature: int
) -> None:
    scales = [0, 8, -20]
    figures = ask(TOKENS, prompt=PROMPT, feature=feature, scale=scales)
    ids = figures["prompt_ids"]
    plain = greedy(lm, ids, None)
    assert figures["untouched"]["ids"] == plain and figures["chosen"]["doses"][0]["is_untouched"]
    clean = logits(lm, ids + plain, None).log_softmax(1)[len(ids) - 1 : -1]

    # The mean activation, from every held-out row that training would keep.
    values = np.zeros(0)
    for firings in subject.firings(10**9):
        values = np.append(values, firings.value[firings.latent == feature])
    assert figures["chosen"]["activations"] == [pytest.approx(values.mean(), rel=1e-6)]
    for dose, scale in zip(figures["chosen"]["doses"], scales, strict=True):
        added = scale * values.mean() * subject.sae.W_dec[feature].double()
        assert dose["ids"] == greedy(lm, ids, added.float())
        moved = logits(lm, ids + plain, added.float()).log_softmax(1)[len(ids) - 1 : -1]
        kl = (moved.exp() * (moved - clean)).sum(1).mean()
        assert dose["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        assert dose["added"] == [pytest.approx(scale * values.mean(), rel=1e-6)]
        assert dose["relative"] * dose["norm"] == pytest.approx(
            abs(scale) * values.mean(), rel=0.2
        )  # the ratio's mean over positions is not quite the ratio of means
        with own.steer(feature, scale):
            assert own.generate(PROMPT, TOKENS) == dose["text"]
    assert own.generate(PROMPT, TOKENS) == figures["untouched"]["text"]
    assert len({tuple(dose["ids"]) for dose in figures["chosen"]["doses"]}) > 1


def test_random_latents_fire_as_often_and_push_as_far(
    ask: Ask, subject: Subject, feature: int
) -> None:
    """Of several features, which are added together."""
    chosen = [feature, (feature + 1) % subject.sae.d_sae]
    figures = ask(2, prompt=PROMPT, feature=chosen, scale=2)
    known = rates.of(subject)
    own_figures, random_figures = figures["chosen"], figures["random"]
    assert not set(random_figures["features"]) & set(chosen)
    for own, other in zip(own_figures["density"], random_figures["density"], strict=True):
        rank = np.abs(np.log(np.maximum(known.density, 1e-9)) - np.log(own)).argsort()
        near = known.density[rank[:53]]
        assert near.min() <= other <= near.max()
    (dose,), (random,) = own_figures["doses"], random_figures["doses"]
    assert random["relative"] == pytest.approx(dose["relative"], rel=1e-4)
    for each, side in ((dose, own_figures), (random, random_figures)):
        assert np.allclose(each["added"], 2 * np.array(side["activations"]))


def test_a_chat_goes_on_from_the_models_turn(
    ask: Ask, own: SAE, lm: LanguageModel, feature: int
) -> None:
    chat = [{"role": "user", "content": "3 + 4?"}]
    figures = ask(prompt=json.dumps(chat), feature=feature, scale=0)
    (rendered,) = lm.tokenizer.encode([chat], reply=True)
    assert figures["prompt_ids"] == [lm.tokenizer.bos, *rendered]
    assert figures["chosen"]["doses"][0]["is_untouched"]
    assert own.generate(chat, 4) == figures["untouched"]["text"]


def test_steering_ends_with_its_block(own: SAE, feature: int) -> None:
    plain = own.generate(PROMPT, 4)
    with own.steer(feature, 30):
        with pytest.raises(KeyError), own.steer(feature, activation=0.0):
            raise KeyError(own.generate(PROMPT, 4))
        assert own.generate(PROMPT, 4) != plain
        with own.steer(feature, -30):  # on top of the other one
            assert own.generate(PROMPT, 4) == plain
    assert own.generate(PROMPT, 4) == plain


# -- what is asked ---------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"feature": None}, "feature= is missing"),
    ({"feature": 256}, "feature=256"),
    ({"feature": -1}, "feature=-1"),
    ({"feature": 1.5}, "feature=1.5"),
    ({"feature": "a"}, "feature=a"),
    ({"feature": []}, "feature=[]"),
    ({"feature": [3, 3]}, "feature=[3, 3]"),
    ({"feature": [[3]]}, "feature=[3]"),
    ({"feature": True}, "feature=True"),
    ({"scale": "much"}, "scale=much"),
    ({"scale": []}, "scale=[]"),
    ({"scale": [1, None]}, "scale=None"),
    ({"scale": [1, float("nan")]}, "scale="),
    ({"scale": float("inf")}, "scale=inf"),
    ({"scale": True}, "scale=True"),
    ({"scale": list(range(51))}, "scale="),
    ({"prompt": None}, "prompt= is missing"),
    ({"prompt": ""}, "prompt= is empty"),
    ({"prompt": '["a", "b"]'}, "prompt="),
    ({"prompt": "7 " * 1200}, "prompt="),
    ({"prompt": "7 " * 505}, "study.new_tokens"),
]


def test_what_cannot_be_meant_is_refused_before_the_model(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, subject: Subject, feature: int
) -> None:
    monkeypatch.setattr(Study, "lm", None)
    asked = {"prompt": PROMPT, "feature": feature, "scale": [0, 2]}
    for wrong, named in REFUSED:
        with pytest.raises(SettingError, match=re.escape(named)):
            ask(64, **{**asked, **wrong})
    silent = np.flatnonzero(rates.of(subject).count == 0)
    if len(silent):
        with pytest.raises(SettingError, match="fires on none"):
            ask(64, **{**asked, "feature": int(silent[0])})


def test_a_scale_that_breaks_the_model_is_said(ask: Ask, feature: int) -> None:
    with pytest.raises(SettingError, match=re.escape("scale=1e+300")):
        ask(prompt=PROMPT, feature=feature, scale=1e300)


def test_what_is_no_layers_output_is_not_steered(subject: Subject, own: SAE) -> None:
    ports = ports_of("sae", [LAYER], [MLP_OUT], None)
    assert "resid_post" in (study_steer.DEFINITION.refuses(replace(subject, ports=ports), {}) or "")
    elsewhere = replace(own, points=(HookPoint(LAYER, MLP_OUT),))
    with pytest.raises(SettingError, match="output"), elsewhere.steer(3, activation=1.0):
        pass
