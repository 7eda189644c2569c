"""What more sites of a layer cost a harvest: `python -m tests.bench.sites_speed`.

Harvests of the embedded model's text into new stores, with `resid_post` alone and with three sites
of the same layer, in alternating rounds of one process, so that a busy machine slows both. The CPU
time of the process counts beside the wall clock, since other processes do not change it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import MLP_IN, MLP_OUT, RESID_POST
from residual_saes.data.text.sources import TinyText
from residual_saes.harvest.config import HarvestConfig
from residual_saes.harvest.loop import harvest
from residual_saes.harvest.model import ModelConfig, load
from residual_saes.harvest.selfcheck import choose_isolation
from tests.bench.outcome import finish

SITES = {"one": (RESID_POST,), "three": (RESID_POST, MLP_IN, MLP_OUT)}


def one_harvest(folder: Path, sites: tuple[str, ...], layer: int, tokens: int) -> dict[str, float]:
    """Seconds of the checks at a harvest's start and of the rest of it, by clock and by CPU."""
    lm = load(ModelConfig(EMBEDDED, dtype="float32"), deepest=layer)
    config = HarvestConfig(folder / "s.zarr", (layer,), tokens=tokens, context=256, sites=sites)
    began = time.perf_counter(), time.process_time()
    choose_isolation(lm, config.points, config.context)
    checked = time.perf_counter(), time.process_time()
    store = harvest(config, lm, TinyText())
    ended = time.perf_counter(), time.process_time()
    assert store.rows == tokens
    shutil.rmtree(folder / "s.zarr")
    checks = [then - now for now, then in zip(began, checked, strict=True)]
    rest = [then - now for now, then in zip(checked, ended, strict=True)]
    return {
        "checks_cpu_s": checks[1],
        "harvest_s": rest[0] - checks[0],  # which it does again
        "harvest_cpu_s": rest[1] - checks[1],
    }


def measure(layer: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, and the share of the speed that is left with three sites."""
    every: dict[str, list[dict[str, float]]] = {name: [] for name in SITES}
    folder = Path(tempfile.mkdtemp())
    try:
        for _ in range(rounds + 1):
            for name, sites in SITES.items():
                every[name].append(one_harvest(folder, sites, layer, tokens))
    finally:
        shutil.rmtree(folder)
    found: dict[str, Any] = {}
    for name, measured in every.items():
        for figure in measured[0]:  # the first round warms caches
            found[f"{name}_{figure}"] = statistics.median(one[figure] for one in measured[1:])
    return {
        **found,
        "share_of_speed": found["one_harvest_s"] / found["three_harvest_s"],
        "share_by_cpu_time": found["one_harvest_cpu_s"] / found["three_harvest_cpu_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sites_speed")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    asked = parser.parse_args()
    shape = {"layer": asked.layer, "tokens": asked.tokens, "rounds": asked.rounds, "sites": SITES}
    finish(shape, measure(asked.layer, asked.tokens, asked.rounds), asked.out)


if __name__ == "__main__":
    main()
