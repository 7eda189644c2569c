"""The sparse autoencoder, and the file that holds a trained one.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import SettingError
from train import kernels
from train.kernels import Kept

AUX_NORMS = ("raw", "variance")
INITS = ("random", "rows")
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "matryoshka")  # train/activations.py
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")


@dataclass(frozen=True)
class SAEConfig:
    """The dictionary and its loss. Defaults: caiovicentino/mechreward scripts/train_sae_qwen35.py
    (the reference).
    """

    activation: str = "topk"  # one of ACTIVATIONS
    d_sae: int = 32_768  # latents
    k: int = 128  # latents kept per row: exactly in topk, on average in the others
    # weight of the AuxK loss; 0 turns it off. Gao et al. have 1/32 with aux_norm=variance
    aux_coef: float = 0.125
    k_aux: int = 512  # dead latents that reconstruct the error of each row
    # "raw" as the reference, "variance" as Gao et al. (arXiv 2406.04093); see train/loss.py
    aux_norm: str = "raw"
    # Tokens without firing that make a latent dead (Gao et al., section 2.4); None: 1/25 of the
    # run, at most 10e6.
    dead_after: int | None = 10_000_000
    init: str = "random"  # decoder directions at the start: one of INITS
    # train in the rows' principal axes, where Adam scales each by itself; the file is on raw rows
    rotate: bool = False
    # Restart latents silent for three times as long, along what is left over, in the first 80 % of
    # the run.
    resample: bool = False
    nested: int = (
        5  # matryoshka: dictionaries of the first F / 2^(nested - 1), ..., F / 2, F latents
    )
    l0_coef: float = 1.0  # jumprelu: weight of (L0 / k - 1)^2
    bandwidth: float = (
        0.1  # jumprelu: of the threshold's gradient, in units of rows scaled to E||x|| = sqrt(d)
    )

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise SettingError(
                f"sae.activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}"
            )
        if self.init not in INITS:
            raise SettingError(f"sae.init={self.init!r} must be one of {', '.join(INITS)}")
        for name in ("d_sae", "k", "k_aux", "dead_after", "nested"):
            value = getattr(self, name)
            if value is None and name == "dead_after":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"sae.{name}={value!r} must be a whole number of at least 1")
        if self.k > self.d_sae:
            raise SettingError(
                f"sae.k={self.k} must be at most sae.d_sae={self.d_sae}: so many latents can be kept"
            )
        for name in ("aux_coef", "l0_coef"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingError(
                    f"sae.{name}={getattr(self, name)} must be 0 or a positive number"
                )
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise SettingError(f"sae.bandwidth={self.bandwidth} must be a positive number")
        if self.activation == "matryoshka" and self.d_sae >> (self.nested - 1) < 1:
            raise SettingError(
                f"sae.nested={self.nested} halvings leave nothing of sae.d_sae={self.d_sae}; lower it"
            )
        if self.aux_norm not in AUX_NORMS:
            raise SettingError(
                f"sae.aux_norm={self.aux_norm!r} must be one of {', '.join(AUX_NORMS)}"
            )


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder.

        pre   = (x - b_dec) @ W_enc + b_enc
        f     = ReLU(pre where it is among the k largest of its row, else 0)    TopK, which has no threshold
                pre where it is above the threshold, else 0                     BatchTopK, JumpReLU, Matryoshka
        x_hat = f @ W_dec + b_dec

    Latent i reads along the column W_enc[:, i] and writes along the row W_dec[i], which has norm 1
    ("decoder column" in papers that write the decoder transposed).
    """

    # (d, F); while training, the transpose of a contiguous (F, d): its gradient comes latent by
    # latent
    W_enc: Tensor
    W_dec: Tensor  # (F, d)
    b_enc: Tensor  # (F,)
    b_dec: Tensor  # (d,)
    k: int  # latents kept per row
    threshold: Tensor | None = None  # (F,) at least 0

    @property
    def d_model(self) -> int:
        return len(self.b_dec)

    @property
    def d_sae(self) -> int:
        return len(self.b_enc)

    def encode(self, x: Tensor) -> Kept:
        """The kept latents of (n, d) rows; in TopK k a row, with value 0 where fewer are
        positive.
        """
        centred = x.to(self.W_enc.dtype) - self.b_dec
        if self.threshold is None:
            return kernels.encode(centred, self.W_enc, self.b_enc, self.k)
        return kernels.encode_above(centred, self.W_enc, self.b_enc, self.threshold)

    def decode(self, kept: Kept) -> Tensor:
        """(n, d) reconstruction from kept latents."""
        return kernels.decode(kept, self.W_dec) + self.b_dec

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) reconstruction of (n, d) rows."""
        return self.decode(self.encode(x))

    def to(self, device: torch.device | str) -> SAE:
        return SAE(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, k=self.k)

    def tensors(self) -> dict[str, Tensor]:
        """The weights, and the threshold if there is one, in the order that the optimizer and the
        files have.
        """
        threshold = {} if self.threshold is None else {"threshold": self.threshold}
        return {**{name: getattr(self, name) for name in WEIGHTS}, **threshold}

    def project_(self) -> None:
        """Scale every decoder direction to norm 1, in place."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norms.clamp_min_(torch.finfo(norms.dtype).tiny))

    def folded(self, scale: float, basis: Tensor | None = None) -> SAE:
        """The same autoencoder on raw rows x, given that this one works on scale * x, or on scale *
        x @ basis.

        TopK, ReLU and comparing commute with a positive factor, so only biases and threshold
        change: f and x_hat come out divided by `scale`, as raw rows are.

        Args:
            basis: (d, d) orthogonal.
        """
        W_enc, W_dec, b_dec = self.W_enc, self.W_dec, self.b_dec
        if basis is not None:
            W_enc, W_dec, b_dec = basis @ W_enc, W_dec @ basis.T, basis @ b_dec
        threshold = None if self.threshold is None else self.threshold / scale
        return SAE(W_enc, W_dec, self.b_enc / scale, b_dec / scale, self.k, threshold)


def initial(config: SAEConfig, b_dec: Tensor, seed: int) -> SAE:
    """The SAE before its first step: random unit directions, encoder = decoder transposed, no
    encoder bias.

    A pure function of (config, b_dec, seed): drawn on the CPU, whatever the device.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(config.d_sae, len(b_dec), generator=generator).to(b_dec.device)
    threshold = None if config.activation == "topk" else b_dec.new_zeros(config.d_sae)
    sae = SAE(
        W_dec.clone().T, W_dec, b_dec.new_zeros(config.d_sae), b_dec.clone(), config.k, threshold
    )
    sae.project_()
    sae.W_enc.copy_(W_dec.T)
    return sae
