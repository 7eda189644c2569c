"""What fires on a text that is given: equal to the store, to the study, to the page, to Python."""

from __future__ import annotations

import html
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residual_saes import SAE
from residual_saes.analyze import given, shelf
from residual_saes.analyze.latents import text_features
from residual_saes.analyze.latents.text_features import Reader, TextFeatures
from residual_saes.analyze.studies import features as study_features
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data.errors import SettingError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import HookPoint
from residual_saes.harvest import model as models
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.train.sae import SAE as WeightsOf
from tests.analyze.chromium import NEEDS_CHROMIUM, Chromium
from tests.conftest import Call

TEXT = "What's 3+4, {really}?\nTom has <b>7</b> apples"

LOADED: dict[ModelConfig, LanguageModel] = {}  # `lm`, which studies take


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    config = ModelConfig(EMBEDDED, dtype="float32")
    return LOADED.setdefault(config, load(config, head=True))


@pytest.fixture(scope="module")
def subject(tiny_run: Path) -> Subject:
    return Subject.open(tiny_run, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(lm: LanguageModel, subject: Subject) -> TextFeatures:
    return read(lm, subject, TEXT)


def read(lm: LanguageModel, subject: Subject, text: Any) -> TextFeatures:
    (ids,) = given.sequences("text", [text], lm.tokenizer, 512)
    ((own,),) = text_features.read(lm, [Reader.of(subject)], [ids])
    return own


def ask(study: Study, **asked: object) -> dict[str, Any]:
    study.loaded |= LOADED
    study.asked = asked
    (block, *_) = study.perform(study_features.DEFINITION).figures["texts"]
    return block


# -- the values ------------------------------------------------------------------------------------


def test_a_stored_document_has_its_stored_rows_latents(lm: LanguageModel, subject: Subject) -> None:
    """Whole pieces of one unit. A batch may round one in thousands of rows otherwise."""
    unit = subject.unit(1)
    ids = subject.store.tokens(1).ravel()
    starts = np.flatnonzero(subject.store.piece_starts(1).ravel())
    row_of = np.zeros(len(ids), np.int64)
    row_of[unit.local] = np.arange(len(unit.local))
    differing = tokens = 0
    for start, end in list(pairwise(starts))[:12]:
        reader = Reader.of(subject)
        ((own,),) = text_features.read(lm, [reader], [ids[start:end].tolist()])
        stored = np.zeros_like(own.dense)
        kept = subject.sae.encode(unit.rows[row_of[start:end]])
        stored[kept.rows, kept.indices] = kept.values
        assert not own.dense[0].any() and stored[0].any()  # BOS is not encoded
        exact = (np.abs(own.dense[1:] - stored[1:].clip(0)) < 1e-4).all(1)
        differing += int((~exact).sum())
        tokens += end - start
    assert tokens > 300 and differing <= tokens / 300


def test_study_page_and_package_have_the_same_values(
    found: TextFeatures, tiny_study: Any, tiny_run: Path
) -> None:
    block = ask(tiny_study("features"), text=TEXT)
    assert block["tokens"] == list(found.tokens) and block["ids"] == list(found.ids)
    package = SAE.load(tiny_run).features(TEXT)
    assert (package.dense == found.dense).all()
    page = next((tiny_run / "studies/features").glob("what-s-3-4*/index.html")).read_text()
    buttons = re.findall(r'data-feature="(\d+)" data-tokens="(.*?)" data-values="(.*?)"', page)
    assert len(buttons) == 20 == len(block["latents"])
    for (feature, tokens, values), latent in zip(buttons, block["latents"], strict=True):
        assert int(feature) == latent["feature"]
        shown = np.zeros(len(found.ids), np.float32)
        shown[json.loads(html.unescape(tokens))] = json.loads(html.unescape(values))
        assert (shown == found.of(latent["feature"])).all()
    assert "<b>" not in page and "&lt;" in page


def test_summaries_follow_from_the_dense_values(found: TextFeatures) -> None:
    dense = found.dense
    strong = found.top(5)
    order = sorted(range(found.d_sae), key=lambda latent: (-dense[:, latent].max(), latent))
    assert [latent.feature for latent in strong] == order[:5]
    for latent in strong:
        own = dense[:, latent.feature]
        assert latent.max == own.max() and list(latent.tokens) == np.flatnonzero(own).tolist()
        assert latent.mean == pytest.approx(own[own > 0].mean(), rel=1e-6)
    for token in range(len(found.ids)):
        best = sorted(np.flatnonzero(dense[token]), key=lambda i: (-dense[token, i], i))[:3]
        assert [latent for latent, _ in found.at(token, 3)] == best
    assert str(strong[0].feature) in repr(found).splitlines()[2]


def test_several_hook_points_are_read_side_by_side(lm: LanguageModel, subject: Subject) -> None:
    """As a crosscoder reads them; another reader of the same pass has its own values still."""
    points = (HookPoint(10), HookPoint(5))
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(30, 128, generator=generator)
    crosscoder = WeightsOf.of(W_dec.T.contiguous(), W_dec, torch.zeros(30), torch.zeros(128), 4)
    ids = [lm.tokenizer.bos, *range(300, 320)]
    readers = [Reader(crosscoder, points), Reader.of(subject)]
    ((own, other),) = text_features.read(lm, readers, [ids])
    states: dict[int, torch.Tensor] = {}
    handles = [
        lm.blocks[layer].register_forward_hook(
            lambda _m, _i, output, layer=layer: states.update({layer: output[0]})
        )
        for layer in (5, 10)
    ]
    lm.causal(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    rows = torch.cat([states[10], states[5]], -1).reshape(-1, 128).bfloat16().float()
    kept = (rows[1:] @ W_dec.T).topk(4)
    expected = torch.zeros(20, 30).scatter(1, kept.indices, kept.values.relu())
    assert np.allclose(own.dense[1:], expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    ((alone,),) = text_features.read(lm, readers[1:], [ids])
    assert (alone.dense == other.dense).all()


def test_a_text_has_one_bos_whatever_it_spells(lm: LanguageModel, subject: Subject) -> None:
    bos = lm.tokenizer.bos
    for text in ("7", "<bos>7", "<bos><bos>", "a<eos>b", " "):
        ids = read(lm, subject, text).ids
        assert ids[0] == bos and ids.count(bos) == 1, text
    chat = [{"role": "user", "content": "<bos>3 + 4?"}, {"role": "assistant", "content": "7"}]
    assert read(lm, subject, chat).ids.count(bos) == 1


# -- what is asked ---------------------------------------------------------------------------------


def test_texts_as_they_may_be_given(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": "y, [z]"}\n')
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    for value, texts in {
        "a": ["a"],
        "[a, b]": ["[a, b]"],
        "[1, 2]": ["[1, 2]"],
        "[]": ["[]"],
        '[{"a": 1}]': ['[{"a": 1}]'],
        '["a", "b"]': ["a", "b"],
        json.dumps(chat): [chat],
        json.dumps([chat, "a"]): [chat, "a"],
        "@@home": ["@home"],
        f"@{tmp_path}/a.txt": ["one\n\ntwo"],
        f"@{tmp_path}/b.jsonl": ["x", "y, [z]"],
        f"@{tmp_path}/c.jsonl": [chat],
    }.items():
        assert given.contents("text", value) == texts, value


REFUSED = {
    None: "text= is missing",
    "": "text= is empty",
    "@none.txt": "none.txt",
    "@": "text=@",
    "@rows.bin": "rows.bin",
    "@empty.jsonl": "empty.jsonl",
    "@body.jsonl": "body",
    "@many.jsonl": "100",
    "\ud800": "surrogate",
    '[{"role": "wizard", "content": "a"}]': "wizard",
    "7 " * 300: "context",
    '["a", ""]': "number 2",
}


def test_what_cannot_be_read_is_refused_before_the_model(
    tiny_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", None)
    monkeypatch.chdir(tmp_path)
    Path("rows.bin").write_bytes(b"a")
    Path("empty.jsonl").write_text("")
    Path("body.jsonl").write_text('{"body": "a"}\n')
    Path("many.jsonl").write_text('{"text": "a"}\n' * 101)
    study = tiny_study("features")
    for text, named in REFUSED.items():
        with pytest.raises(SettingError, match=re.escape(named)):
            ask(study, text=text)
    for options in ({"each": 0}, {"others": "x"}, {"rows": 0}):
        with pytest.raises(SettingError, match="study"):
            ask(tiny_study("features", **options), text="a")


def test_a_refusal_is_one_line(tiny_run: Path, call: Call) -> None:
    for asked, named in (
        (["text="], "text="),
        (["text=a", "prompt=b"], "prompt="),
        (["text=a", "study=quality"], "text="),
    ):
        arguments = ("study=features", f"run={tiny_run}", "device=cpu", *asked)
        code, err = call("analyze", "residual_saes.analyze.command", *arguments)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, "Traceback" in err) == (2, False) and named in line, err


def test_a_text_that_was_asked_before_needs_no_model(
    tiny_study: Any, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And any number of texts takes bounded room; another's folder stays."""
    own = tiny_run / "studies/features/mine"
    own.mkdir(parents=True, exist_ok=True)
    first = ask(tiny_study("features"), text="Tom has 7")
    monkeypatch.setattr(models, "load", None)
    assert ask(tiny_study("features"), text="Tom has 7") == first
    monkeypatch.undo()
    monkeypatch.setattr(shelf, "LIMIT", 2)
    study = tiny_study("features")
    for text in ("a", "b", "c"):
        ask(study, text=text)
    names = sorted(path.name.rpartition("-")[0] for path in own.parent.iterdir())
    assert names == ["", "b", "c"] and own.is_dir()


def test_another_run_is_read_beside(tiny_study: Any, tiny_run: Path) -> None:
    study = tiny_study("features", others=[str(tiny_run)])
    with pytest.raises(SettingError):
        ask(study, text="a")


# -- the page --------------------------------------------------------------------------------------


@NEEDS_CHROMIUM
def test_the_page_colours_by_the_latent_that_is_clicked(
    chrome: Chromium, tiny_study: Any, tiny_run: Path, found: TextFeatures
) -> None:
    ask(tiny_study("features"), text=TEXT)
    page = next((tiny_run / "studies/features").glob("what-s-3-4*/index.html"))
    chrome.resize(390, 800)
    chrome.open(page.resolve().as_uri(), "document.querySelector('[aria-pressed=true]')")
    second = found.top(2)[1]
    tokens = "[...document.querySelectorAll('.strip span')]"
    shades = f"{tokens}.map((token) => token.style.getPropertyValue('--shade'))"
    for number, latent in ((1, second), (0, found.top(1)[0])):
        chrome.js(f"document.querySelectorAll('button')[{number}].click()")
        values = found.of(latent.feature)
        shown = np.array([float(shade) for shade in chrome.js(shades)])
        assert ((shown > 0) == (values > 0)).all() and shown.argmax() == values.argmax()
        title = chrome.js(f"{tokens}[{values.argmax()}].title")
        assert title.startswith(f"feature {latent.feature}: {float(f'{latent.max:.4g}')}"[:14])
    assert chrome.js("document.querySelector('.strip').textContent") == "".join(found.tokens)
    assert chrome.js("document.documentElement.scrollWidth") <= 390
    assert not chrome.troubles and len(chrome.requests) == 1


def test_hostile_tokens_are_shown_and_not_obeyed(tiny_study: Any, found: TextFeatures) -> None:
    """Whatever a token's text is: a page escapes it, marks what is not to be seen."""
    block = ask(tiny_study("features"), text=TEXT)
    hostile = '\u202e</span><script>alert(1)</script>\x07"'
    block = {**block, "name": hostile, "tokens": [hostile] * len(block["tokens"])}
    for latent in block["latents"]:
        latent |= {"words": hostile, "peaks": [hostile], "raised": [hostile]}
    page = study_features.page_of(
        tiny_study("features"), [{**block, "has_catalogue": True}]
    ).decode()
    assert page.count("<script>") == 1 and "alert(1)</script>" not in page
    assert not {"\u202e", "\x07"} & set(page) and "\\u202e&lt;/span&gt;" in page
