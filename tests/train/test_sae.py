"""The autoencoder, its settings, its file, and the way to raw rows."""

import math
from dataclasses import replace

import pytest
import torch

from residual_saes.data.errors import SettingError, StoreError
from residual_saes.train import sae as sae_module
from residual_saes.train.sae import SAEConfig, initial
from residual_saes.train.sae_file import FILE, load, write_final
from tests.train.reference import dense_activations, random_sae


def rows(n=20, d=12, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def dense(kept, d_sae):
    """(n, F) activations."""
    return torch.zeros(len(kept.starts), d_sae, dtype=kept.values.dtype).index_put(
        (kept.rows, kept.indices), kept.values
    )


def published_usage(checkpoint, x):
    """The reference's own encode and decode, as its model card has them."""
    pre = (x - checkpoint["b_dec"]) @ checkpoint["W_enc"] + checkpoint["b_enc"]
    values, indices = pre.topk(checkpoint["k"], dim=-1)
    features = torch.zeros_like(pre)
    features.scatter_(-1, indices, torch.relu(values))
    return features, features @ checkpoint["W_dec"] + checkpoint["b_dec"]


def test_equals_its_formula():
    sae, x = random_sae(12, 64, 4), rows().double()
    wanted = dense_activations(sae.tensors(), x, 4)
    torch.testing.assert_close(sae(x), wanted @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(dense(sae.encode(x), 64), wanted)


def test_reads_bfloat16_rows():
    sae, x = random_sae(12, 64, 4, dtype=torch.float32), rows().bfloat16()
    assert torch.equal(sae(x), sae(x.float()))


def test_projection_is_per_latent():
    """On the wrong axis, dimensions instead of latents would have norm 1 (BioNeMo)."""
    sae = random_sae(12, 64, 4)
    directions = torch.nn.functional.normalize(sae.W_dec, dim=1)
    sae.project_()
    torch.testing.assert_close(sae.W_dec, directions)


def test_projection_leaves_a_zero_direction_finite():
    sae = random_sae(12, 64, 4)
    sae.W_dec[3] = 0.0
    sae.project_()
    assert not sae.W_dec[3].any()


def test_start_is_tied_unit_and_reproducible():
    mean = torch.arange(12.0)
    first, again, other = (initial(SAEConfig(d_sae=64, k=4), mean, seed) for seed in (0, 0, 1))
    assert torch.equal(first.W_enc, first.W_dec.T)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(first.b_dec, mean)
    assert not first.b_enc.any()
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    first.W_dec.add_(1.0)
    first.b_dec.add_(1.0)
    assert torch.equal(first.W_enc, again.W_enc), "encoder and decoder share memory"
    assert mean[1] == 1.0, "b_dec shares memory with the mean"


@pytest.mark.parametrize("scale", [0.03, 1.0, 17.3])
def test_fold_changes_no_output(scale):
    sae, x = random_sae(12, 64, 4), rows().double() / scale
    folded = sae.folded(scale)
    wanted = sae(x * scale) / scale
    assert float((folded(x) - wanted).norm() / wanted.norm()) < 1e-12
    kept, raw = sae.encode(x * scale), folded.encode(x)
    torch.testing.assert_close(dense(raw, 64) * scale, dense(kept, 64))
    assert torch.equal(dense(raw, 64) > 0, dense(kept, 64) > 0)


def test_final_file_opens_in_the_published_usage_code(tmp_path):
    """On raw rows, with a scale far from 1."""
    sae, scale = random_sae(12, 64, 4, dtype=torch.float32), 0.03
    sae.project_()
    x = rows() / scale
    write_final(sae, scale, tmp_path)
    path = tmp_path / FILE
    checkpoint = torch.load(path, weights_only=True)
    assert {name: tuple(t.shape) for name, t in checkpoint.items() if name != "k"} == {
        "W_enc": (12, 64),
        "W_dec": (64, 12),
        "b_enc": (64,),
        "b_dec": (12,),
    }
    assert checkpoint["k"] == 4
    assert type(checkpoint["k"]) is int
    assert all(checkpoint[name].is_contiguous() for name in ("W_enc", "W_dec"))
    features, x_hat = published_usage(checkpoint, x)
    wanted = sae(x * scale) / scale
    assert float((x_hat - wanted).norm() / wanted.norm()) < 1e-5
    ours = load(path)
    torch.testing.assert_close(dense(ours.encode(x), 64), features, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours(x), x_hat, rtol=1e-5, atol=1e-3)
    assert float((checkpoint["W_dec"].norm(dim=1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"d_sae": 64, "k": 65}, "sae.k=65 .*sae.d_sae=64"),
        ({"d_sae": 0}, "sae.d_sae=0"),
        ({"k": 0}, "sae.k=0"),
        ({"k": True}, "sae.k=True"),
        ({"k_aux": -1}, "sae.k_aux=-1"),
        ({"dead_after": 0}, "sae.dead_after=0"),
        ({"aux_coef": -0.1}, "sae.aux_coef=-0.1"),
        ({"aux_coef": math.nan}, "sae.aux_coef=nan"),
        ({"aux_norm": "l2"}, "sae.aux_norm='l2'"),
    ],
)
def test_wrong_settings_are_named(wrong, named):
    with pytest.raises(SettingError, match=named):
        SAEConfig(**wrong)


def spoiled_files(sae):
    """Contents that are not an SAE, and what the message must name."""
    good = {**sae.tensors(), "k": 4}
    return {
        "keys": ({name: good[name] for name in ("W_enc", "k")}, "W_dec, b_enc, b_dec, k"),
        "list": ([1, 2], "W_dec, b_enc, b_dec, k"),
        "shape": ({**good, "W_dec": good["W_dec"].T.contiguous()}, "W_dec"),
        "k": ({**good, "k": 65}, "k=65"),
        "nan": ({**good, "b_enc": good["b_enc"] * math.nan}, "b_enc"),
        "text": ({**good, "W_dec": "x"}, "W_dec"),
    }


@pytest.mark.parametrize("kind", ["keys", "list", "shape", "k", "nan", "text"])
def test_load_refuses_what_is_not_an_sae(kind, tmp_path):
    content, named = spoiled_files(random_sae(12, 64, 4))[kind]
    torch.save(content, tmp_path / "sae_final.pt")
    with pytest.raises(StoreError, match=named):
        load(tmp_path / "sae_final.pt")


def test_load_names_a_missing_or_torn_file(tmp_path):
    with pytest.raises(StoreError, match=r"sae_final\.pt"):
        load(tmp_path / "sae_final.pt")
    write_final(random_sae(12, 64, 4), 1.0, tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"sae_final\.pt"):
        load(path)


def test_load_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"W_enc": Payload()}, tmp_path / "sae_final.pt")
    with pytest.raises(StoreError, match=r"sae_final\.pt"):
        load(tmp_path / "sae_final.pt")
    assert not (tmp_path / "ran").exists()


def test_defaults_are_the_reference():
    assert replace(SAEConfig()) == SAEConfig("topk", 32_768, 128, 0.125, 512, "raw", 10_000_000)
    assert sae_module.AUX_NORMS == ("raw", "variance")
