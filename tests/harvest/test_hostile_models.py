"""A model's folder of a stranger is refused in one line, before anything large is built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from residual_saes.data.errors import DocumentError, SettingError
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.harvest.headers import Stored, require_layers, stored
from residual_saes.harvest.model_folder import read_config
from residual_saes.harvest.tokens import Tokenizer
from residual_saes.harvest.weight_files import shards

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def embedded(name: str) -> dict[str, Any]:
    return dict(json.loads((MODEL_DIR / name).read_text()))


def folder_of(tmp_path: Path, **files: bytes) -> Path:
    """A copy of the embedded model's small files, with others in their place."""
    for path in MODEL_DIR.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_bytes(data)
    return tmp_path


def with_config(**changes: Any) -> bytes:
    return json.dumps({**embedded("config.json"), **changes}).encode()


CONFIGS: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "a list": b"[1]",
    "no text": b"\xff\xfe\x00",
    "digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 5_000 + b"}",
    "a key twice": b'{"model_type": "llama", "model_type": "gemma"}',
    "a billion layers": json.dumps({**LLAMA, "num_hidden_layers": 10**9}).encode(),
    "layers of another name": b'{"model_type": "gpt2", "n_layer": 1000000}',
    "a million experts": json.dumps({**LLAMA, "num_local_experts": 10**6}).encode(),
    "a part of another kind": with_config(text_config="x"),
    "names that are none": with_config(architectures=[1]),
    "another type": with_config(model_type=[1]),
    "no width": with_config(hidden_size=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_configuration_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_config(folder_of(tmp_path, config=CONFIGS[name]))
    assert len(str(caught.value).splitlines()) == 1


def test_code_beside_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config = json.dumps({"model_type": "evil", "auto_map": evil}).encode()
    tokens = json.dumps({"tokenizer_class": "Evil", "auto_map": evil}).encode()
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('ran')\nclass Evil: pass\n")
    folder = folder_of(tmp_path, config=config, tokenizer_config=tokens)
    with pytest.raises(SettingError):
        read_config(folder)
    with pytest.raises(SettingError):
        Tokenizer.load(folder)
    assert not (tmp_path / "ran").exists()


def test_layers_that_the_files_cannot_hold_are_refused_before_they_are_built() -> None:
    files = stored("embedded", MODEL_DIR)
    text = read_config(MODEL_DIR).get_text_config()
    require_layers(files, text, "embedded")
    text.num_hidden_layers = 5_000
    with pytest.raises(SettingError, match="5,000 layers"):
        require_layers(files, text, "embedded")
    text.num_hidden_layers = 200
    require_layers(Stored({"F32": 1}, weights=200 * 9), text, "deep")


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    whole = embedded("tokenizer.json")
    change(whole)
    return json.dumps(whole).encode()


def normalized(*inner: dict[str, Any]) -> bytes:
    together = {"type": "Sequence", "normalizers": list(inner)}
    return changed(lambda whole: whole.update(normalizer=together))


TOKENIZERS: dict[str, Callable[[], bytes]] = {
    "deep": lambda: b'{"a":' * 50_000,
    "empty": lambda: b"{}",
    "no text": lambda: os.urandom(1000),
    "doubled": lambda: normalized(*[replaced({"String": "a"}, "aa")] * 60),
    "doubled at nothing": lambda: normalized(*[replaced({"Regex": ""}, "a")] * 60),
    "prepended": lambda: normalized({"type": "Prepend", "prepend": "a" * 10**7}),
    "many added": lambda: b'{"single_word": 1}' * 60_000,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError) as caught:
        Tokenizer.load(folder_of(tmp_path, tokenizer=TOKENIZERS[name]()))
    assert len(str(caught.value).splitlines()) == 1


def test_normalizers_of_models_pass_and_a_pattern_that_never_ends_refuses_a_document(
    tmp_path: Path,
) -> None:
    slow = {"Regex": "(a+)+$|(x*)*y"}
    usual = [{"type": "Prepend", "prepend": "▁"}, replaced({"String": " "}, "▁")]
    tokenizer = Tokenizer.load(
        folder_of(tmp_path, tokenizer=normalized(*usual, replaced(slow, "b")))
    )
    short, long = tokenizer.attempt(["aab", "a" * 5_000 + "b"])
    assert not isinstance(short, DocumentError)
    assert isinstance(long, DocumentError)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[1]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_a_hostile_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(SettingError, match="index"):
        shards(tmp_path / "index.json")
