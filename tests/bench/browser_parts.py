"""What the feature browser computes of all latents at once, at full size.

`python -m tests.bench.browser_parts together`: which latents fire together, of 32,768 latents on
rows of a skewed random firing. `map`: their map, of directions of width 2,560, half of them about
512 centres. Seconds of a core (`cpu_s`) beside seconds, since the machine may be busy.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residual_saes.analyze.latents import layout
from residual_saes.analyze.parts import Parts
from residual_saes.analyze.studies.catalogue import coactivation
from residual_saes.analyze.studies.catalogue.index import Index, Postings, write
from residual_saes.data.errors import StopRequest
from tests.bench.outcome import finish

SHAPE = {"d_sae": 32_768, "k": 128, "width": 2560, "units": 4, "unit_tokens": 65_536}


def index_of(folder: Path) -> Index:
    """Latent i is drawn in proportion to (i + 1) ** -0.8, k times a row."""
    rng = np.random.default_rng(0)
    share = np.arange(1, SHAPE["d_sae"] + 1) ** -0.8
    below = np.cumsum(share / share.sum())
    tokens = SHAPE["unit_tokens"]
    for unit in range(SHAPE["units"]):
        token = np.repeat(np.arange(tokens), SHAPE["k"])
        drawn = np.searchsorted(below, rng.random(len(token))).clip(0, SHAPE["d_sae"] - 1)
        pair = np.unique(drawn.astype(np.int64) * tokens + token)
        feature = (pair // tokens).astype(np.uint32)
        none = np.zeros(len(pair), np.uint32)
        values = np.ones(len(pair), np.float32)
        postings = Postings(feature, (pair % tokens).astype(np.uint32), none, none, values)
        path = folder / f"unit_{unit:06d}.parquet"
        write(path, postings, "", rows=tokens, d_sae=SHAPE["d_sae"], unit_tokens=tokens)
    return Index(folder, range(SHAPE["units"]), SHAPE["d_sae"], tokens)


def directions() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    count, width = SHAPE["d_sae"], SHAPE["width"]
    centres = torch.randn(count // 64, width, generator=generator)
    made = torch.randn(count, width, generator=generator)
    made[: count // 2] += 0.7 * centres[torch.arange(count // 2) % len(centres)]
    return made


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    began, began_cpu = time.perf_counter(), time.process_time()
    found = work()
    figures = {"s": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found, {**figures, "peak_gib": peak}


def together(folder: Path) -> dict[str, Any]:
    index = index_of(folder)
    with StopRequest() as stop:
        found, figures = timed(lambda: coactivation.partners(index, 10**9, stop))
    return {**figures, "pairs": sum(map(len, found))}


def map_(folder: Path) -> dict[str, Any]:
    made = directions()
    found, figures = timed(lambda: layout.of(made, Parts(folder)))
    kept = {"kept": found.kept, "among": found.among, "by_chance": found.by_chance}
    return {**figures, **kept}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["together", "map"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure = {"together": together, "map": map_}[arguments.what]
        finish(SHAPE, measure(Path(temporary)), arguments.out)
