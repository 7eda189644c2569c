"""Exports hold golden rows, and a reader that computes something else of them is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from residual_saes.data import digests, durable
from residual_saes.data.errors import StoreError
from residual_saes.train.export import bundle, format, golden
from residual_saes.train.sae import SAE
from tests.train.test_formats import CASES, KINDS, TAKEN, D, F, K, about, made


def exported(folder: Path, name: str, sae: SAE, kind: str = "topk") -> Path:
    """The folder with the library's files."""
    bundle.write(folder, golden.files(name, sae, about(kind)))
    return golden_of(folder).parent


def golden_of(folder: Path) -> Path:
    return next(folder.rglob("golden.*"))


def weights_of(folder: Path) -> Path:
    found = [path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors")]
    return next(path for path in found if not path.name.startswith("golden"))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_golden_rows_have_the_latents_of_the_sae(tmp_path: Path, name: str, kind: str) -> None:
    sae = made(kind)
    folder = exported(tmp_path, name, sae, kind)
    rows = load_file(golden_of(folder))
    given = rows["x_hat" if sae.b_in is None else "y_hat"]
    assert rows["rows"].shape == given.shape == (8, D)
    # By the formula, not by the code that wrote them.
    centred = rows["rows"] - (sae.b_dec if sae.b_in is None else sae.b_in)
    pre = centred @ sae.W_enc + sae.b_enc
    if sae.threshold is None:
        right = torch.where(pre >= pre.topk(K, dim=1).values[:, -1:], pre.relu(), 0)
    else:
        right = torch.where(pre > sae.threshold, pre, 0)
    found = torch.zeros(8, F)
    found[rows["row"], rows["latent"]] = rows["value"]
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    skip = 0 if sae.W_skip is None else centred @ sae.W_skip
    torch.testing.assert_close(given, right @ sae.W_dec + sae.b_dec + skip)
    assert int((right > 0).sum()) >= 8 * K  # every row fires
    format.find(name).read(folder)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_flipped_bit_in_any_file_is_noticed(tmp_path: Path, name: str, kind: str) -> None:
    weights = exported(tmp_path, name, made(kind), kind)
    format.read(name, weights)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        whole = path.read_bytes()
        flipped(path)
        with pytest.raises(StoreError, match=path.name):
            format.read(name, weights)
        path.unlink()
        if path.name != digests.FILE:
            with pytest.raises(StoreError, match=path.name):
                format.read(name, weights)
        path.write_bytes(whole)


def test_what_was_exported_before_does_not_stay(tmp_path: Path) -> None:
    bundle.write(tmp_path, {"a/config.json": b"{}", "b.pt": b"b"})
    bundle.write(tmp_path, {"b.pt": b"c"})
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"b.pt", digests.FILE}
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(StoreError, match=r"mine\.json"):
        bundle.write(tmp_path, {"d.pt": b"d"})
    assert (tmp_path / "b.pt").read_bytes() == b"c"  # nothing was begun


@pytest.mark.parametrize("first", [True, False])
def test_a_folder_whose_writing_was_stopped_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Also the first time, when nothing else is there: it is no other author's."""
    if not first:
        exported(tmp_path, "dictionary_learning", made("thresholds"))
    real = durable.write

    def stops(path: Path, parts: Iterable[bytes]) -> Any:
        if path.name == "config.json":  # without it the rest would be read as another kind of SAE
            raise KeyboardInterrupt
        return real(path, parts)

    monkeypatch.setattr(durable, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, "dictionary_learning", made("topk"))
    with pytest.raises(StoreError, match=digests.FILE if not first else "missing"):
        format.read("dictionary_learning", tmp_path)
    monkeypatch.undo()
    exported(tmp_path, "dictionary_learning", made("topk"))
    format.read("dictionary_learning", tmp_path)


def changed(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write other weights, and forget the digests of the old ones."""
    for place in (folder, folder.parent):
        (place / digests.FILE).unlink(missing_ok=True)
    weights = weights_of(folder)
    if weights.suffix == ".pt":
        torch.save(tensors, weights)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = weights_of(folder)
    plain = torch.load(weights, weights_only=True) if weights.suffix == ".pt" else None
    return plain or load_file(weights)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_that_compute_something_else_are_noticed_by_the_rows_alone(
    tmp_path: Path, name: str, kind: str
) -> None:
    folder = exported(tmp_path, name, made(kind), kind)
    plain = read_weights(folder)
    changed(folder, name, plain)
    format.find(name).read(folder)
    decoder = next(key for key in plain if key in ("W_dec", "decoder.weight"))
    encoder = next(key for key in plain if key in ("W_enc", "encoder.weight"))
    bias = next(key for key in plain if key in ("b_dec", "decoder.bias"))
    wrong = {decoder: plain[decoder].roll(1, dims=-2), bias: plain[bias] * 1.01}
    wrong[encoder] = plain[encoder].mT.reshape(plain[encoder].shape)  # transposed, laid out anew
    if "W_skip" in plain:
        wrong["W_skip"] = plain["W_skip"].T
    golden_rows = golden_of(folder)
    for key, tensor in wrong.items():
        changed(folder, name, {**plain, key: tensor})
        with pytest.raises(StoreError, match=f"{golden_rows.name}|last k latents") as caught:
            format.find(name).read(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    changed(folder, name, {**plain, bias: wrong[bias]})
    golden_rows.unlink()  # another author's
    format.find(name).read(folder)


def test_other_latents_that_reconstruct_the_same_are_noticed(tmp_path: Path) -> None:
    folder = exported(tmp_path, "safetensors", made("topk"))
    plain = load_file(weights_of(folder))
    twice = {name: 2 * plain[name] for name in ("W_enc", "b_enc")}
    changed(folder, "safetensors", {**plain, **twice, "W_dec": plain["W_dec"] / 2})
    with pytest.raises(StoreError, match="latents"):
        format.find("safetensors").read(folder)


@pytest.mark.parametrize("name", [name for name, kinds in TAKEN.items() if "topk" in kinds])
def test_another_k_is_noticed(tmp_path: Path, name: str) -> None:
    folder = exported(tmp_path, name, made("topk"))
    (config,) = (path for path in folder.glob("*.json") if path.name != digests.FILE)
    content = json.loads(config.read_text())
    (content["trainer"] if name == "dictionary_learning" else content)["k"] = K + 1
    config.write_text(json.dumps(content))
    changed(folder, name, read_weights(folder))
    if name == "dictionary_learning":  # which has it in both files
        state = torch.load(folder / "ae.pt", weights_only=True)
        changed(folder, name, {**state, "k": torch.tensor(K + 1)})
    with pytest.raises(StoreError, match=golden.FILE):
        format.find(name).read(folder)


def test_golden_rows_of_another_sae_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, "safetensors", made("topk"))
    (folder / digests.FILE).unlink()
    good = load_file(folder / golden.FILE)
    for wrong in (
        {**good, "latent": good["latent"] + F},
        {**good, "rows": good["rows"][:, 1:].contiguous()},
        {name: tensor for name, tensor in good.items() if name != "x_hat"},
        {**good, "x_hat": good["x_hat"] * torch.nan},
    ):
        save_file(wrong, folder / golden.FILE)
        with pytest.raises(StoreError, match=golden.FILE) as caught:
            format.find("safetensors").read(folder)
        assert "\n" not in str(caught.value)
    (folder / golden.FILE).write_bytes(b"damaged")
    with pytest.raises(StoreError, match=golden.FILE):
        format.find("safetensors").read(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_far_from_0_and_large_weights_are_no_damage(tmp_path: Path, kind: str) -> None:
    """Biases that libraries fold in float32, at the size of real residual streams."""
    sae = made(kind)
    b_in = None if sae.b_in is None else sae.b_in * 1000
    far = replace(sae, b_enc=sae.b_enc * 50, b_dec=sae.b_dec * 1000, b_in=b_in)
    for name, kinds in TAKEN.items():
        if kind in kinds:
            format.find(name).read(exported(tmp_path / name, name, far, kind))
