"""The steering vector of a run, as study=steering left it, for the card's code."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from residual_saes.data.errors import StoreError

FILES = "steering_vec_L*"  # in the study's folder: the tensor, and .json with what it follows from
# What each value of study.positions takes of a call's positions. A call shows a prompt or, with a
# cache, one new token; the answer begins at the prompt's last token.
_SLICES = {
    "all": (":", "every position of prompt and answer"),
    "generated": ("-1:", "the prompt's last position, and those of the answer"),
    "prompt": (":-1", "the prompt but its last position"),
}


class Vector(NamedTuple):
    """What the card's code needs."""

    file: str  # name of the tensor's file
    layer: int
    module: str  # of the layer in transformers' model
    scale: float
    chosen: bool  # whether the dev questions chose the scale; else they chose to do nothing
    positions: str  # a slice
    where: str  # the slice in words


def of_study(files: Mapping[str, bytes]) -> Vector | None:
    """The vector among the files of a result of study=steering; None if there is none.

    Raises:
        StoreError: the file beside it is not what the study writes.
    """
    for name in sorted(fnmatch.filter(files, f"{FILES}.json")):
        tensor = f"{name.removesuffix('.json')}.pt"
        if tensor not in files:
            continue
        try:
            about = json.loads(files[name])
            positions, where = _SLICES[about["positions"]]
            module = about["module"]
            if not re.fullmatch(r"[\w.]+", module):
                raise ValueError(module)
            return Vector(
                file=tensor,
                layer=int(about["layer"]),
                module=module,
                scale=float(about["chosen_scale"] or about["best_scale_but_0"]),
                chosen=bool(about["chosen_scale"]),
                positions=positions,
                where=where,
            )
        except (ValueError, KeyError, TypeError) as error:
            way_out = "delete it, and do study=steering again"
            raise StoreError(f"{name} is not what study=steering writes; {way_out}") from error
    return None
