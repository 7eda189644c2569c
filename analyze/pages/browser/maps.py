"""The map of all latents for the page: this run's, and those of other runs of the same width.

points    [x, y], a whole number from 0 to SIDE of each latent, run after run
density   of each other run, [density of each latent]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from residual_saes.analyze.latents import layout
from residual_saes.analyze.pages.browser.joins import Other
from residual_saes.analyze.pages.script import short
from residual_saes.analyze.parts import Parts
from residual_saes.analyze.study import Study
from residual_saes.data import durable

SIDE = 9999


def missing(count: int, *, wanted: bool) -> str | None:
    """Why there is no map of so many latents; None: there is one."""
    if not wanted:
        return "the pages were made with study.map=false"
    return None if count >= layout.FEWEST else f"{count} latents are too few"


def of(study: Study, others: Sequence[Other]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The map's file, and what the page says of it.

    It is kept: a page that is made again, with more of other studies, has the same map.
    """
    own = study.subject.scaled(study.subject.sae.W_dec)
    decoders = [own]
    density = []
    runs = []  # numbers of the other runs that are on the map
    for number, other in enumerate(others):
        theirs = other.subject.scaled(other.subject.sae.W_dec)
        if theirs.shape[1] == own.shape[1]:
            decoders.append(theirs)
            column = pq.read_table(other.files.table, columns=["density"]).column("density")
            density.append(short(column.to_numpy()))
            runs.append(number)
    digests = [durable.digest(each.cpu().contiguous().numpy().data) for each in decoders]
    key = {"version": layout.VERSION, "device": own.device.type, "W_dec": digests}

    made = layout.of(torch.cat(decoders), Parts(study.kept_folder("map", key)))
    columns = np.rint(made.points.T * SIDE).astype(int).tolist()
    about = {"kept": made.kept, "by_chance": made.by_chance, "among": made.among}
    return {"points": columns, "density": density}, {**about, "runs": runs}
