"""What study=cross_layer finds where the truth is known, and what it takes at true size.

    python -m tests.bench.cross_layer --out FILE
    python -m tests.bench.cross_layer --rows 131072 --out FILE

Data sets without any pair, whose latents prefer the same documents, and data sets with planted
pairs; with --rows instead the search, once, of random activations of two dictionaries of 32,768
latents, 128 a row.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from residual_saes.analyze.latents.codes import choosing_half
from residual_saes.analyze.stats import benjamini_hochberg, overlap_p, wilson
from residual_saes.analyze.studies.cross_layer import pairs
from residual_saes.analyze.studies.cross_layer.pairs import LEVEL, Found
from residual_saes.analyze.studies.cross_layer.rotation import Runs, coincidences
from residual_saes.data.errors import StopRequest
from tests.analyze.planted_firing import Firing, planted, unrelated
from tests.bench.outcome import finish

NULL_SETS, PLANTED_SETS = 400, 25
LATENTS, K = 32_768, 128


def found_in(firing: Firing, least: int = 5) -> Found:
    half = choosing_half(firing.document, 0)
    return pairs.find(firing.theirs, firing.ours, firing.document, half, least, StopRequest())


def _naive(firing: Firing, found: Found) -> bool:
    """Whether a test that does not look at documents finds a pair: rows as if independent."""
    rest = ~choosing_half(firing.document, 0)
    ours, theirs = (codes[rest].astype(bool).toarray() for codes in (firing.ours, firing.theirs))
    p = []
    for latent, partner in enumerate(found.partner[:, 0].tolist()):
        if partner >= 0:
            x, y = ours[:, partner], theirs[:, latent]
            p.append(overlap_p(len(x), int(x.sum()), int(y.sum()), int((x & y).sum())))
    return bool((benjamini_hochberg(p) <= LEVEL).any())


def truth() -> dict[str, Any]:
    false, naive, tests, low = 0, 0, 0, 0
    for seed in range(NULL_SETS):
        firing = unrelated(seed)
        found = found_in(firing)
        false += bool((found.q <= LEVEL).any())
        naive += _naive(firing, found)
        runs = Runs.of(firing.document)
        columns = [sparse.csc_array(codes) for codes in (firing.ours, firing.theirs)]
        for latent in range(firing.ours.shape[1]):
            x, y = (np.sort(codes[:, [latent]].nonzero()[0]) for codes in columns)
            tests += 1
            low += coincidences(x, y, runs)[2] <= LEVEL
    hits, functions, turned = 0, 0, 0
    for seed in range(1000, 1000 + PLANTED_SETS):
        found = found_in(planted(seed))
        count = len(found.q) // 2
        own = np.arange(count)
        hits += int(((found.partner[:count, 0] == own) & (found.q[:count, 0] <= LEVEL)).sum())
        functions += count
        turned += int((found.q[count:] <= LEVEL).any(1).sum())
    return {
        "null_sets_with_a_pair": false,
        "interval": wilson(false, NULL_SETS),
        "null_sets_with_a_pair_if_rows_were_independent": naive,
        "single_tests": tests,
        "single_tests_p_below_0.05": low,
        "planted": functions,
        "planted_found": hits,
        "of_nothing": functions,
        "of_nothing_predicted": turned,
    }


def size(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weights = 1 / (10 + np.arange(LATENTS))
    weights /= weights.sum()

    def drawn() -> Any:
        latent = rng.choice(LATENTS, rows * K, p=weights)
        row = np.repeat(np.arange(rows), K)
        value = rng.random(rows * K, np.float32)
        return sparse.csr_array((value, (row, latent)), shape=(rows, LATENTS))

    firing = Firing(drawn(), drawn(), np.arange(rows) // 600)
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    used = time.process_time()
    found = found_in(firing, 10)
    return {
        "firing_a_row": firing.ours.nnz / rows,
        "pairs_tested": int((found.partner >= 0).sum()),
        "predicted": int((found.q <= LEVEL).any(1).sum()),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        "bytes_of_activations": 8 * (firing.ours.nnz + firing.theirs.nnz),
        "peak_bytes_before": before_bytes,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.rows:
        finish({"rows": args.rows, "latents": LATENTS, "k": K}, size(args.rows), args.out)
    else:
        finish({"null_sets": NULL_SETS, "planted_sets": PLANTED_SETS}, truth(), args.out)


if __name__ == "__main__":
    main()
