"""The sparse autoencoder, and its settings.

Shapes: n rows, d = d_model, F = d_sae, k = kept latents per row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from residual_saes.data.errors import SettingError
from residual_saes.data.site import require_site
from residual_saes.train import kernels, product
from residual_saes.train.kernels import Kept
from residual_saes.train.ports import KINDS

AUX_NORMS = ("raw", "variance")
INITS = ("random", "rows", "map", "kaiming")
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")  # of a file
OPTIONAL = ("threshold", "b_in", "W_skip")  # what a file may have beside them


@dataclass(frozen=True)
class SAEConfig:
    """The dictionary and its loss.

    Sizes and weights: caiovicentino/mechreward scripts/train_sae_qwen35.py (the reference).
    Defaults are conf/sae/scaled_32k.yaml's; conf/sae/topk_32k.yaml is the reference to the step. An
    objective with settings of its own extends this class (train/objectives/gated.py).
    """

    activation: str = "topk"  # a file of train/objectives
    d_sae: int = 32_768  # latents
    # Latents kept per row: exactly in topk and hierarchical, on average in the others; in gated at
    # the start only.
    k: int = 128
    # Weight of the AuxK loss; 0 turns it off. Gao et al. have 1/32 with aux_norm=variance.
    aux_coef: float = 0.125
    k_aux: int = 512  # dead latents that reconstruct the error of each row
    # raw as the reference, variance as Gao et al. (arXiv 2406.04093): train/objectives/auxk.py
    aux_norm: str = "raw"
    # Tokens without firing that make a latent dead (Gao et al., section 2.4). None: 1/25 of the
    # run, at most 10e6.
    dead_after: int | None = 10_000_000
    init: str = "random"  # directions at the start, one of INITS: train/start.py
    # Train in the rows' principal axes, where Adam scales each by itself. The file is on raw rows.
    rotate: bool = False
    # In the first 80 % of the run, restart latents silent for three times dead_after along the
    # error.
    resample: bool = False
    # The next three are of some objectives. They stay here because every run's recorded settings
    # have them.
    # matryoshka: dictionaries of the first F / 2^(nested - 1), ..., F / 2, F latents;
    # hierarchical: reconstructions from the k / 2^(nested - 1), ..., k / 2, k largest
    nested: int = 5
    l0_coef: float = 1.0  # jumprelu: weight of (L0 / k - 1)^2
    bandwidth: float = 0.1  # jumprelu: of theta's gradient, on rows scaled to E||x|| = sqrt(d)
    # Train on rows scaled to E||x|| = sqrt(d), as Gao et al.; False: on rows as they are.
    scale_rows: bool = True
    # AuxK with ReLU, as Gao et al.; False: without, of latents silent in this batch too.
    aux_relu: bool = True
    kind: str = "sae"  # what it reads and writes, one of train.ports.KINDS
    target: str | None = None  # transcoder: the site that it writes; None: mlp_out
    skip: bool = False  # transcoder: an affine way around the latents (arXiv 2501.18823)
    # Keep dead latents cheap in short runs. dead_after=None is then at least 8 periods of a latent
    # of average frequency (8 d_sae / k tokens) and 2 batches, and AuxK chooses in each step among
    # at most 4 k_aux dead latents, which take turns.
    bound_dead: bool = False
    # What runs had before those settings were there, and do not record.
    LATER: ClassVar[Mapping[str, Any]] = {
        "scale_rows": True,
        "aux_relu": True,
        "kind": "sae",
        "target": None,
        "skip": False,
        "bound_dead": False,
    }

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise SettingError(f"sae.init={self.init!r} must be one of {', '.join(INITS)}")
        if self.init == "map" and self.kind != "transcoder":
            raise SettingError(
                "sae.init=map is of transcoders, whose encoder and decoder are of different hook "
                f"points, and sae.kind={self.kind}; take sae.init=rows"
            )
        if self.kind not in KINDS:
            raise SettingError(f"sae.kind={self.kind} must be one of {', '.join(KINDS)}")
        if self.target is not None:
            require_site(self.target)
        for name, given in (("target", self.target is not None), ("skip", self.skip)):
            if given and self.kind != "transcoder":
                raise SettingError(
                    f"sae.{name}={getattr(self, name)} is of transcoders, and sae.kind={self.kind};"
                    f" leave sae.{name}= out, or take sae=transcoder_32k"
                )
        for name in ("d_sae", "k", "k_aux", "dead_after"):
            value = getattr(self, name)
            if value is None and name == "dead_after":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"sae.{name}={value!r} must be a whole number of at least 1")
        if self.rotate and self.kind == "transcoder":
            raise SettingError(
                "sae.rotate=true turns what is read and what is written alike, and a transcoder's "
                "are of different hook points; set sae.rotate=false"
            )
        if self.k > self.d_sae:
            raise SettingError(
                f"sae.k={self.k} must be at most sae.d_sae={self.d_sae}: "
                "so many latents can be kept"
            )
        if not (math.isfinite(self.aux_coef) and self.aux_coef >= 0):
            raise SettingError(f"sae.aux_coef={self.aux_coef} must be 0 or a positive number")
        if self.aux_norm not in AUX_NORMS:
            raise SettingError(
                f"sae.aux_norm={self.aux_norm!r} must be one of {', '.join(AUX_NORMS)}"
            )

    def recorded(self) -> dict[str, Any]:
        """What a run records: settings that came later, only where they differ from before."""
        return recorded(self, self.LATER)


def recorded(config: Any, later: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, without those of `later` that have the values there.

    Runs that were recorded before those fields existed remain the same runs.
    """
    values = asdict(config)
    return {k: v for k, v in values.items() if k not in later or v != later[k]}


class Scales(NamedTuple):
    """What rows were multiplied by in training: a number, or one for each column."""

    read: float | Tensor  # (d,)
    written: float | Tensor  # (d_out,)

    @property
    def of_latents(self) -> float:
        """What latents are divided by to be of raw rows; of several scales their geometric mean."""
        if isinstance(self.written, Tensor):
            # Device sync, at the end.
            return math.exp(float(self.written.double().log().mean()))
        return self.written


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder, a transcoder or a crosscoder.

        pre   = (x - b_in) @ W_enc + b_enc                     b_in is b_dec, unless it has its own
        f     = ReLU(the k largest of each row of pre), 0 elsewhere         no threshold: TopK
                pre where it is above the threshold, 0 elsewhere            with a threshold
        y_hat = f @ W_dec + b_dec + (x - b_in) @ W_skip                     W_skip: if there is one

    An autoencoder's y_hat approximates x. A transcoder's approximates other rows y of the same
    tokens, so it has a b_in of its own. A crosscoder is an autoencoder of rows of several hook
    points, one behind the other; train/ports.py says which columns are whose.

    Latent i reads along encoder[i] and writes along W_dec[i], which has norm 1 ("decoder column" in
    papers that write the decoder transposed). Files hold the encoder as W_enc (d, F).
    """

    encoder: Tensor  # (F, d), contiguous in training: its gradient comes latent by latent
    W_dec: Tensor  # (F, d); of a transcoder (F, d_out)
    b_enc: Tensor  # (F,)
    b_dec: Tensor  # (d,); of a transcoder (d_out,)
    k: int  # latents kept per row
    threshold: Tensor | None = None  # (F,) at least 0
    b_in: Tensor | None = None  # (d,) of a transcoder; None: b_dec
    W_skip: Tensor | None = None  # (d, d_out) an affine way around the latents
    # How its rows are encoded (train/product.py). None: the way that this process has settled.
    by: str | None = "torch"

    @classmethod
    def of(
        cls,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        k: int,
        threshold: Tensor | None = None,
        b_in: Tensor | None = None,
        W_skip: Tensor | None = None,
    ) -> SAE:
        """An SAE with the tensors of a file: W_enc (d, F), of which the encoder is a view."""
        return cls(W_enc.T, W_dec, b_enc, b_dec, k, threshold, b_in, W_skip)

    @property
    def W_enc(self) -> Tensor:
        """(d, F), a view of the encoder."""
        return self.encoder.T

    @property
    def d_model(self) -> int:
        """Width of the rows that it reads."""
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the rows that it writes."""
        return len(self.b_dec)

    @property
    def d_sae(self) -> int:
        return len(self.b_enc)

    def encode(self, x: Tensor) -> Kept:
        """The kept latents of (n, d) rows.

        TopK keeps k a row, with value 0 where fewer are positive.
        """
        centred = self.centred(x)
        if self.threshold is None:
            return product.encode(centred, self.encoder, self.b_enc, self.k, by=self.by)
        return product.encode_above(centred, self.encoder, self.b_enc, self.threshold, by=self.by)

    def centred(self, x: Tensor) -> Tensor:
        """(n, d) rows x less b_in, in the weights' type."""
        return x.to(self.encoder.dtype) - (self.b_dec if self.b_in is None else self.b_in)

    def decode(self, kept: Kept) -> Tensor:
        """(n, d_out) what kept latents and b_dec give, without W_skip."""
        return kernels.decode(kept, self.W_dec) + self.b_dec

    def reconstruct(self, x: Tensor, kept: Kept) -> Tensor:
        """(n, d_out) reconstruction from rows x (n, d) and their kept latents."""
        decoded = self.decode(kept)
        return decoded if self.W_skip is None else decoded + self.centred(x) @ self.W_skip

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d_out) reconstruction from (n, d) rows."""
        return self.reconstruct(x, self.encode(x))

    def to(self, device: torch.device | str) -> SAE:
        moved: dict[str, Any] = {}
        for name, tensor in self.parameters().items():
            moved[name] = tensor.to(device)
        return replace(self, **moved)

    def parameters(self) -> dict[str, Tensor]:
        """The tensors by field: the encoder, W_dec, b_enc, b_dec, and the threshold if any."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names and in the shapes of files."""
        return in_files(self.parameters())

    def project_(self) -> None:
        """Scale every decoder direction to norm 1, in place."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norms.clamp_min_(torch.finfo(norms.dtype).tiny))

    def unit_decoder(self) -> SAE:
        """The same function with decoder rows of norm 1. Latents are kept by activation times norm.

        With thresholds that is the same; TopK may keep others where norms differ.
        """
        norms = torch.linalg.vector_norm(self.W_dec, dim=1)
        norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return replace(
            self,
            encoder=self.encoder * norms[:, None],
            W_dec=self.W_dec / norms[:, None],
            b_enc=self.b_enc * norms,
            threshold=None if self.threshold is None else self.threshold * norms,
        )

    def folded(self, scale: float | Scales, basis: Tensor | None = None) -> SAE:
        """The same function on raw rows x, of an SAE on scale * x or on scale * x @ basis.

        TopK, ReLU and comparing commute with a positive factor. So with one scale only biases and
        threshold change, and f and x_hat come out divided by it, as raw rows are. With a scale for
        each column, s_in read and s_out written, and g that of latents:

            W_enc  s_in W_enc / g        b_enc, threshold  divided by g
            W_dec  g W_dec / s_out       b_in  b_in / s_in
            b_dec  b_dec / s_out         W_skip  s_in W_skip / s_out

        Directions of W_dec keep norm 1 where one hook point is written. A crosscoder's have it once
        each target's columns are multiplied by s_out / g.

        Args:
            basis: (d, d) orthogonal, of an autoencoder.
        """
        scales = scale if isinstance(scale, Scales) else Scales(scale, scale)
        s_in, s_out, g = scales.read, scales.written, scales.of_latents
        W_enc, W_dec, b_dec = self.W_enc, self.W_dec, self.b_dec
        if basis is not None:
            W_enc, W_dec, b_dec = basis @ W_enc, W_dec @ basis.T, basis @ b_dec
        W_skip = None
        if self.W_skip is not None:
            W_skip = _times(self.W_skip, s_in / s_out, rows=True)  # one hook point on either side
        return SAE.of(
            _times(W_enc, s_in / g, rows=True),
            _times(W_dec, g / s_out),
            self.b_enc / g,
            _over(b_dec, s_out),
            self.k,
            None if self.threshold is None else self.threshold / g,
            None if self.b_in is None else _over(self.b_in, s_in),
            W_skip,
        )


def _times(weights: Tensor, scale: float | Tensor, rows: bool = False) -> Tensor:
    """`weights` times a number, or times one for each of its columns or rows."""
    if isinstance(scale, Tensor):
        scale = scale.to(weights).unsqueeze(1 if rows else 0)
    return weights * scale


def _over(bias: Tensor, scale: float | Tensor) -> Tensor:
    """`bias` divided by a number, or by one for each of its elements."""
    return bias / (scale.to(bias) if isinstance(scale, Tensor) else scale)


def in_files(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names and in the shapes of files, as views.

    What belongs to `encoder` (F, d) is W_enc's there, (d, F).
    """
    filed = {}
    for name, tensor in tensors.items():
        if name.split(".")[0] == "encoder":
            name = f"W_enc{name.removeprefix('encoder')}"
            tensor = tensor.T if tensor.ndim == 2 else tensor
        filed[name] = tensor
    return filed


def initial(config: SAEConfig, b_dec: Tensor, seed: int, b_in: Tensor | None = None) -> SAE:
    """The SAE before its first step: random unit directions, encoder = decoder, no encoder bias.
    It encodes as training does.

    With init=kaiming the encoder is drawn as nn.init.kaiming_uniform_(W_enc, a=sqrt(5)) draws it,
    so its elements are below 1 / sqrt(F), and the decoder has its directions.

    A pure function of (config, b_dec, seed): drawn on the CPU, whatever the device.

    Args:
        b_in: (d,) of a transcoder. Its decoder has random directions of its own, and its W_skip
            starts at 0 (arXiv 2501.18823).
    """
    generator = torch.Generator().manual_seed(seed)
    read = b_dec if b_in is None else b_in
    shape = (config.d_sae, len(read))
    kaiming = config.init == "kaiming"
    if kaiming:
        bound = 1 / math.sqrt(config.d_sae)
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    else:
        drawn = torch.randn(shape, generator=generator)
    encoder = drawn.to(b_dec.device)
    b_enc = b_dec.new_zeros(config.d_sae)
    if b_in is None:
        sae = SAE(encoder, encoder.clone(), b_enc, b_dec.clone(), config.k)
    else:
        own = torch.randn((config.d_sae, len(b_dec)), generator=generator).to(b_dec.device)
        skip = b_dec.new_zeros(len(b_in), len(b_dec)) if config.skip else None
        sae = SAE(encoder, own, b_enc, b_dec.clone(), config.k, None, b_in.clone(), skip)
    sae = replace(sae, by=None)
    sae.project_()
    if not kaiming:
        sae.encoder.copy_(sae.W_dec if b_in is None else normalize(encoder, dim=1))
    return sae
