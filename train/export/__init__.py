"""sae_final.pt: the trained SAE on raw rows, in the reference's format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from data import durable

if TYPE_CHECKING:
    from torch import Tensor

    from train.sae import SAE

FILE = "sae_final.pt"


def write_final(sae: SAE, scale: float, run: Path, basis: Tensor | None = None) -> Path:
    """Write run/sae_final.pt durably: a dict W_enc (d, F), W_dec (F, d), b_enc, b_dec, k that opens with weights_only.

    Args:
        sae: trained on rows times `scale`, its decoder directions just projected to norm 1.
        basis: (d, d) orthogonal, if the rows were multiplied by that too.
    """
    import torch  # here, so that `python -m train.export` is soon where Ctrl-C is quiet

    folded = sae.folded(scale, basis)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in folded.tensors().items()}
    buffer = io.BytesIO()
    torch.save({**content, "k": sae.k}, buffer)
    durable.write(run / FILE, [buffer.getbuffer()])
    return run / FILE
