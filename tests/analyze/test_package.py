"""`from residual_saes import SAE, Store`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from residual_saes import SAE, Store
from residual_saes.data.errors import SettingError
from residual_saes.data.site import HookPoint
from residual_saes.train.publish import release

TEXT = "Question: Tom has 7 apples."


@pytest.fixture(scope="module")
def own(tiny_run: Path) -> SAE:
    return SAE.load(tiny_run)


def test_activations_are_dense(own: SAE) -> None:
    x = 3 * torch.randn(7, own.d_model, generator=torch.Generator().manual_seed(0))
    f = own.encode(x)
    weights = own.weights
    pre = (x - weights.b_dec) @ weights.W_enc + weights.b_enc
    kept = pre.topk(weights.k)
    expected = torch.zeros(7, own.d_sae).scatter(1, kept.indices, kept.values.relu())
    assert torch.allclose(f, expected, atol=1e-5)
    assert torch.allclose(own.decode(f), weights(x), atol=1e-4)
    for wrong in (x[0], x[:, :5], x[None]):
        with pytest.raises(SettingError, match="shape"):
            own.encode(wrong)


def test_one_sae_from_wherever_it_lies(
    own: SAE, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run, a run without its store, an export, a release on the Hub: the same values."""
    expected = own.features(TEXT).dense
    release.prepare(tiny_run, "me/mine", tmp_path / "me/mine")

    def download(repo: str, allow_patterns: list[str]) -> Path:
        """Of all that is there, what is asked for."""
        for name in allow_patterns:
            (tmp_path / "cache").mkdir(exist_ok=True)
            shutil.copy(tmp_path / repo / name, tmp_path / "cache")
        return tmp_path / "cache"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    store = own.subject.store.name if own.subject else ""
    monkeypatch.chdir(tmp_path)
    for where, more in (
        (f"saelens:{tmp_path}/me/mine/saelens", {}),
        (f"saelens:{tmp_path}/me/mine/saelens", {"store": store}),
        ("hub:me/mine", {}),
        (str(tmp_path / "me/mine"), {}),
    ):
        sae = SAE.load(where, **more)
        assert (sae.features(TEXT).dense == expected).all(), where
        assert (sae.subject is None) != bool(more) and "layer 5" in repr(sae)
        if not more:
            with pytest.raises(SettingError, match="store"), sae.steer(0, 2):
                pass
            with sae.steer(0, activation=3.0):
                assert sae.generate(TEXT, 2)


def test_what_is_no_sae_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: tmp_path / repo)
    for where in ("nothing", "unknown:here", "hub:a/b"):
        with pytest.raises(SettingError, match=where):
            SAE.load(where)


def test_another_model_is_refused(own: SAE) -> None:
    wide = own.weights.W_dec.repeat(1, 2)
    weights = type(own.weights).of(wide.T, wide, own.weights.b_enc, torch.zeros(128), 8)
    for other in (
        replace(own, subject=None, points=(HookPoint(12),)),
        replace(own, subject=None, weights=weights),
        replace(own, subject=None, model=None),
    ):
        with pytest.raises(SettingError, match="model="):
            other.features(TEXT)


def test_texts_that_cannot_be_read_are_refused(own: SAE) -> None:
    for text in ("", "7 " * 200, [], ["a"], [{"role": "user"}], "\ud800"):
        with pytest.raises(SettingError, match="text"):
            own.features(text)
    for new_tokens in (0, -1, 1024):
        with pytest.raises(SettingError, match="new_tokens"):
            own.generate(TEXT, new_tokens)


def test_the_store_is_the_pipelines(own: SAE) -> None:
    assert own.subject is not None
    assert Store.open(own.subject.store.name).units == own.subject.store.units
