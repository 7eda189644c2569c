"""Settings that nobody gives: from the model, the text, and the store that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from residual_saes.data.errors import SettingError
from residual_saes.data.site import HookPoint
from residual_saes.data.store import model_folder
from residual_saes.data.store.place import place_of
from residual_saes.data.store.store import Store
from residual_saes.data.text.hub import HubText
from residual_saes.data.text.sources import FileText
from residual_saes.harvest.defaults import measured, own_model, recalled, recalled_text
from residual_saes.harvest.encoder import Encoder
from residual_saes.harvest.tokens import Tokenizer
from tests.conftest import Call, make_manifest
from tests.harvest.models import save_model

LINE = "A small text about nothing at all, number {}: is it so? It is.\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GPT-2 of four layers and 128 positions."""
    return save_model(tmp_path / "mine", "gpt2")


def harvest(call: Call, *words: str) -> tuple[int, str]:
    return call("harvest", "residual_saes.harvest.command", "device=cpu", *words)


def test_a_model_and_a_text_are_enough_and_a_store_knows_them(
    model: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "words.txt"
    text.write_text("".join(LINE.format(number) for number in range(100)))
    code, err = harvest(call, "model.path=mine", "text.path=words.txt")
    assert code == 0, err
    assert "layer=2: the middle of 4" in err and "context=128" in err and "all of the text" in err
    store = Store.open(tmp_path / "activations" / "mine_words.zarr")
    assert store.points == [HookPoint(2)] and store.manifest["model"]["dtype"] == "float32"
    assert store.spine_end is not None and not store.spine_end.ended_early
    tokens = store.manifest["tokens"]
    assert tokens == store.rows and len(text.read_text()) / 6 < tokens < len(text.read_text())

    # Another layer needs the model alone, which is found from any folder.
    text.unlink()
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as there:
        there.chdir(tmp_path / "elsewhere")
        code, err = harvest(call, "layer=1", "store=../activations/mine_words.zarr")
        assert code == 0, err
        assert model_folder.recalled(store.place, store.manifest) == str(model)
    where = "store=activations/mine_words.zarr"
    assert Store.open(tmp_path / "activations" / "mine_words.zarr").points == [
        HookPoint(1),
        HookPoint(2),
    ]
    (tmp_path / "moved").mkdir()
    (tmp_path / "mine").rename(tmp_path / "moved" / "mine")
    code, err = harvest(call, "layer=0", where)
    assert code == 2 and "model.path=" in err, err
    code, err = harvest(call, "layer=0", where, "model.path=moved/mine", "tokens=999")
    assert code == 2 and "tokens is" in err and "999" in err, err
    code, err = harvest(call, where, "model.path=moved/mine", "action=plan")
    assert code == 0 and f"tokens={tokens}" in err, err


def test_a_text_that_cannot_be_harvested_is_one_line(
    model: Path, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    code, err = harvest(call, "model.path=mine", "text.path=short.txt")
    assert code == 2 and "context=128" in err, err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "words", "id": 1}) + "\n")
    code, err = harvest(call, "model.path=mine", "text.path=rows.jsonl")
    assert code == 2 and "it has body, id" in err, err


def test_a_long_text_is_estimated(model: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(LINE.format(number) * 50)
    source = FileText(tmp_path)
    tokenizer = Tokenizer.load(model)
    whole, is_whole = measured(source, Encoder(tokenizer), 64, tokenizer.bos)
    about, is_about = measured(source, Encoder(tokenizer), 64, tokenizer.bos, counted=20_000)
    assert is_whole and not is_about
    assert about == pytest.approx(whole, rel=0.05)


def test_what_a_store_knows_of_its_model_and_its_text(tmp_path: Path) -> None:
    manifest = make_manifest(8, tokens=64, context=32, unit=32, chunk=32)
    manifest["model"] = {
        **manifest["model"],
        "id": "org/model",
        "revision": "r",
        "dtype": "bfloat16",
    }
    manifest["text"] = {"kind": "hub", "dataset": "org/words", "field": "body", "revision": "abc"}
    Store.open_or_create(tmp_path / "s.zarr", {**manifest, "seed": 7, "batch": 3})
    place = place_of(tmp_path / "s.zarr")
    group = {"name": "x", "path": "other", "revision": "main", "dtype": "float32", "layers": [21]}
    settings = {name: None for name in ("tokens", "context", "seed", "batch", "unit", "chunk")}
    whole = {**settings, "model": group, "text": {}, "site": "resid_post", "layer": None}
    own, told = recalled(whole, {"store", "batch"}, place)
    assert (own["tokens"], own["context"], own["seed"], own["batch"]) == (64, 32, 7, None)
    found = {"path": "org/model", "revision": "r", "dtype": "bfloat16", "layers": None}
    assert own["model"] == {**group, **found}
    assert "batch=" not in told and "seed=7" in told
    source = recalled_text(place)
    assert isinstance(source, HubText)
    assert (source.dataset, source.field, source.revision) == ("org/words", "body", "abc")
    own, _ = recalled(whole, {"store", "model.path"}, place)
    assert (own["model"]["path"], own["model"]["dtype"]) == ("other", "bfloat16")


def test_the_text_of_an_unfinished_store_must_be_given_if_it_is_files(tmp_path: Path) -> None:
    manifest = make_manifest(8, tokens=64, context=32, unit=32, chunk=32)
    manifest["text"] = {"kind": "files", "field": "text", "files": {"a.txt": "0"}}
    Store.open_or_create(tmp_path / "s.zarr", manifest)
    with pytest.raises(SettingError, match=r"a\.txt.*text\.path="):
        recalled_text(place_of(tmp_path / "s.zarr"))


def test_another_model_has_other_layers_and_on_a_cpu_float32() -> None:
    group = {"path": "p", "dtype": "bfloat16", "layers": [21, 27]}
    assert own_model(group, {"model.path"}, "cpu") == {**group, "layers": None, "dtype": "float32"}
    assert own_model(group, {"model.dtype"}, "cpu")["dtype"] == "bfloat16"
    assert own_model(group, {}, "cuda")["dtype"] == "bfloat16"
