"""The steered vector as files: a tensor that any torch reads, and beside it what it follows from.

    steering_vec_L{layer}.pt     float32 (d,), unit norm; opens with weights_only
    steering_vec_L{layer}.json   layer, site, the questions and answers that made it

It is made from train questions alone, so the study's figures on test questions are this vector's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.stats import Floats
from residual_saes.data import durable


def as_shipped(direction: Floats) -> Floats:
    """(d,) rounded to float32, as the file holds it: what is steered is what is shipped."""
    return direction.astype(np.float32).astype(np.float64)


def write(folder: Path, layer: int, vector: Floats, provenance: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        vector: (d,), see `as_shipped`.
    """
    tensor = torch.from_numpy(vector).float()
    content = io.BytesIO()
    torch.save(tensor, content)
    about = {"digest": durable.digest(tensor.numpy().tobytes()), **provenance}
    parts = {"pt": content.getvalue(), "json": dumped(about).encode()}
    for ending, part in parts.items():
        durable.write(folder / f"steering_vec_L{layer}.{ending}", [part])
