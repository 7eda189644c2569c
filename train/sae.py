"""The TopK sparse autoencoder, and the file that holds a trained one.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import SettingError, StoreError
from train import kernels
from train.kernels import Kept

AUX_NORMS = ("raw", "variance")
_FILE_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


@dataclass(frozen=True)
class SAEConfig:
    """The dictionary and its loss. Defaults: caiovicentino/mechreward scripts/train_sae_qwen35.py (the reference)."""

    d_sae: int = 32_768  # latents
    k: int = 128  # latents kept per row
    aux_coef: float = 0.125  # weight of the AuxK loss; 0 turns it off. Gao et al. have 1/32 with aux_norm=variance
    k_aux: int = 512  # dead latents that reconstruct the error of each row
    aux_norm: str = "raw"  # "raw" as the reference, "variance" as Gao et al. (arXiv 2406.04093); see train/loss.py
    dead_after: int = 10_000_000  # tokens without firing that make a latent dead (Gao et al., section 2.4)

    def __post_init__(self) -> None:
        for name in ("d_sae", "k", "k_aux", "dead_after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"sae.{name}={value!r} must be a whole number of at least 1")
        if self.k > self.d_sae:
            raise SettingError(f"sae.k={self.k} must be at most sae.d_sae={self.d_sae}: so many latents can be kept")
        if not (math.isfinite(self.aux_coef) and self.aux_coef >= 0):
            raise SettingError(f"sae.aux_coef={self.aux_coef} must be 0 or a positive number")
        if self.aux_norm not in AUX_NORMS:
            raise SettingError(f"sae.aux_norm={self.aux_norm!r} must be one of {', '.join(AUX_NORMS)}")


@dataclass(frozen=True)
class SAE:
    """A TopK sparse autoencoder.

        pre   = (x - b_dec) @ W_enc + b_enc
        f     = ReLU(pre where it is among the k largest of its row, else 0)
        x_hat = f @ W_dec + b_dec

    Latent i reads along the column W_enc[:, i] and writes along the row W_dec[i], which has norm 1 ("decoder column" in
    papers that write the decoder transposed).
    """

    W_enc: Tensor  # (d, F); while training, the transpose of a contiguous (F, d): its gradient comes latent by latent
    W_dec: Tensor  # (F, d)
    b_enc: Tensor  # (F,)
    b_dec: Tensor  # (d,)
    k: int  # latents kept per row

    @property
    def d_model(self) -> int:
        return len(self.b_dec)

    @property
    def d_sae(self) -> int:
        return len(self.b_enc)

    def encode(self, x: Tensor) -> Kept:
        """The kept latents of (n, d) rows: values (n, k), 0 where fewer than k are positive, and indices (n, k)."""
        return kernels.encode(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc, self.b_enc, self.k)

    def decode(self, kept: Kept) -> Tensor:
        """(n, d) reconstruction from kept latents."""
        return kernels.decode(kept, self.W_dec) + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) reconstruction of (n, d) rows."""
        return self.decode(self.encode(x))

    def to(self, device: torch.device | str) -> SAE:
        return SAE(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, k=self.k)

    def tensors(self) -> dict[str, Tensor]:
        """The four parameters by name, in the order in which the optimizer and the files have them."""
        return {name: getattr(self, name) for name in _FILE_TENSORS}

    def project_(self) -> None:
        """Scale every decoder direction to norm 1, in place."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norms.clamp_min_(torch.finfo(norms.dtype).tiny))

    def folded(self, scale: float) -> SAE:
        """The same autoencoder on raw rows x, given that this one works on scale * x.

        TopK and ReLU commute with a positive factor, so only the biases change: f and x_hat come out divided by
        `scale`, as raw rows are.
        """
        return SAE(self.W_enc, self.W_dec, self.b_enc / scale, self.b_dec / scale, self.k)


def initial(config: SAEConfig, b_dec: Tensor, seed: int) -> SAE:
    """The SAE before its first step: random unit directions, encoder = decoder transposed, no encoder bias.

    A pure function of (config, b_dec, seed): drawn on the CPU, whatever the device.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(config.d_sae, len(b_dec), generator=generator).to(b_dec.device)
    sae = SAE(W_dec.clone().T, W_dec, b_dec.new_zeros(config.d_sae), b_dec.clone(), config.k)
    sae.project_()
    sae.W_enc.copy_(W_dec.T)
    return sae


def load(path: Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a sae_final.pt, on raw rows.

    Raises:
        StoreError: the file is missing, unreadable, or not the four tensors and k.
    """
    if not path.is_file():
        raise StoreError(f"no SAE at {path}; train one with `python -m train store=... run={path.parent}`")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        way_out = f"`python -m train ... run={path.parent}` writes it again from the last checkpoint"
        raise StoreError(f"{path} cannot be read as an SAE ({type(error).__name__}); {way_out}") from error
    return _checked(path, content)


def _checked(path: Path, content: Any) -> SAE:
    if not isinstance(content, dict) or set(content) != {*_FILE_TENSORS, "k"}:
        raise StoreError(f"{path} is not an SAE: expected the keys {', '.join(_FILE_TENSORS)}, k")
    for name in _FILE_TENSORS:
        if not isinstance(content[name], Tensor):
            raise StoreError(f"{path}: {name} is not a tensor but {type(content[name]).__name__}")
    k, tensors = int(content["k"]), {name: content[name].float() for name in _FILE_TENSORS}
    d, d_sae = tensors["b_dec"].numel(), tensors["b_enc"].numel()
    shapes = {"W_enc": (d, d_sae), "W_dec": (d_sae, d), "b_enc": (d_sae,), "b_dec": (d,)}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise StoreError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, its biases say {shape}")
    if not 1 <= k <= d_sae:
        raise StoreError(f"{path}: k is {k}, allowed is 1 to {d_sae}")
    return SAE(**tensors, k=k)
