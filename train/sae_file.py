"""sae_final.pt: the trained SAE on raw rows, in the reference's format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residual_saes.data import durable
from residual_saes.data.durable import Written
from residual_saes.data.errors import StoreError
from residual_saes.data.foreign import reading
from residual_saes.train import torch_file
from residual_saes.train.sae import OPTIONAL, SAE, WEIGHTS, Scales
from residual_saes.train.tensors import refuse, refuse_shape, tensor_of, whole_of

FILE = "sae_final.pt"


def write_final(sae: SAE, scale: float | Scales, run: Path, basis: Tensor | None = None) -> Written:
    """Write run/sae_final.pt durably: a dict W_enc (d, F), W_dec (F, d), b_enc, b_dec, k that opens
    with weights_only; of a transcoder b_in (d,) and perhaps W_skip (d, d_out) too.

    Args:
        sae: trained on rows times `scale`, its decoder directions just projected to norm 1.
        basis: (d, d) orthogonal, if the rows were multiplied by that too.
    """
    folded = sae.folded(scale, basis)
    content = {  # device sync, at the end
        name: tensor.detach().cpu().contiguous() for name, tensor in folded.tensors().items()
    }
    buffer = io.BytesIO()
    torch.save({**content, "k": sae.k}, buffer)
    return durable.write(run / FILE, [buffer.getbuffer()])


def load(path: Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a sae_final.pt, on raw rows.

    Raises:
        StoreError: the file is missing, unreadable, or not the four tensors and k; or a tensor is
            not of finite real numbers.
    """
    if not path.is_file():
        raise StoreError(
            f"no SAE at {path}; train one with `python -m train store=... run={path.parent}`"
        )
    way_out = f"`python -m train ... run={path.parent}` writes it again from the last checkpoint"
    content = torch_file.load(path, way_out)
    with reading(f"{path} cannot be read as an SAE", way_out):
        return checked(path, content).to(device)


def checked(path: Path, content: Any) -> SAE:
    """The SAE of what a file holds by its names. Raises StoreError: it is none."""
    if not isinstance(content, dict) or set(content) - set(OPTIONAL) != {*WEIGHTS, "k"}:
        raise StoreError(
            f"{path} is not an SAE: expected the keys {', '.join(WEIGHTS)}, k, "
            f"and perhaps {', '.join(OPTIONAL)}"
        )
    tensors = {name: tensor_of(content, name, path) for name in content if name != "k"}
    refuse("W_skip" in tensors and "b_in" not in tensors, path, "W_skip alone", "it with b_in")
    d_out, d_sae = tensors["b_dec"].numel(), tensors["b_enc"].numel()
    d = tensors["b_in"].numel() if "b_in" in tensors else d_out
    shapes = {
        "W_enc": (d, d_sae),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        "b_in": (d,),
        "W_skip": (d, d_out),
    }
    for name, tensor in tensors.items():
        refuse_shape(name, tensor, shapes.get(name, (d_sae,)), path)
    k = whole_of("k", path, content["k"])
    refuse(not 1 <= k <= d_sae, path, f"k={k}", f"1 to {d_sae}, its latents")
    if "threshold" in tensors:
        below = bool((tensors["threshold"] < 0).any())
        refuse(below, path, "a threshold below 0", "thresholds from 0 on")
    return SAE.of(**tensors, k=k)
