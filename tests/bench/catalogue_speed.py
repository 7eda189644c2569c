"""The catalogue's one pass over re-encoding for every batch of latents: `python -m
tests.bench.catalogue_speed`.

One store, one SAE of 4,096 latents, the same rows, one process, alternating rounds. Ours is all
that `study=catalogue` does without a language model: reading the store, encoding once, the inverted
index on disk, counts, moments, histograms, strongest contexts and samples, and the table. The
others do what dashboards do (SAEDashboard: 128 latents at a time, over all tokens again for every
batch), with rows that lie in memory already, nothing written, and only counts, sums, histograms and
the 20 strongest tokens of each latent:

    full      every batch encodes all rows as our kernels do, top k over all latents, and keeps its
              own 128
    columns   every batch multiplies with its own 128 columns of W_enc alone and applies ReLU. That
              is wrong for TopK, which needs the other columns to know what is kept: it is the
              least that re-encoding could cost

Their time is of `--batches` of the batches, times all over those.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from residual_saes.analyze.studies.catalogue import study as catalogue
from residual_saes.analyze.studies.catalogue import table as feature_table
from residual_saes.analyze.studies.catalogue.study import Options
from residual_saes.analyze.studies.catalogue.table import Content
from residual_saes.analyze.subject import Subject
from residual_saes.data import locks
from residual_saes.data.errors import StopRequest
from residual_saes.data.rows.split import Policy
from residual_saes.data.site import RESID_POST
from residual_saes.data.store.store import Store
from residual_saes.train import sae
from residual_saes.train.ports import ports_of
from residual_saes.train.sae import SAE, SAEConfig
from tests.bench.outcome import finish
from tests.conftest import make_store

LAYER, CONTEXT, CHUNK, BATCH, LATENTS, TOP, BINS = 21, 1024, 1024, 4096, 128, 20, 64


def subject(folder: Path, tokens: int, unit: int, width: int, d_sae: int, k: int) -> Subject:
    """Rows in which directions of a dictionary are active, of which the SAE knows the
    directions.
    """
    draw = torch.Generator().manual_seed(0)
    made = sae.initial(SAEConfig(d_sae=d_sae, k=k, k_aux=k), torch.zeros(width), seed=0)
    rows = torch.randn(tokens, width, generator=draw)
    for at in range(0, tokens, BATCH):
        part = rows[at : at + BATCH]
        active = torch.randint(d_sae, (len(part), k), generator=draw)
        strength = torch.rand(len(part), k, generator=draw) * 10
        part += torch.nn.functional.embedding_bag(
            active, made.W_dec, mode="sum", per_sample_weights=strength
        )
    bits = rows.bfloat16().view(torch.uint16).numpy()
    make_store(
        folder / "s.zarr", bits, context=CONTEXT, unit=unit, chunk=CHUNK, codec="none", layer=LAYER
    )
    ports = ports_of("sae", [LAYER], [RESID_POST], None)
    return Subject(folder, {}, (Store.open(folder / "s.zarr"),), made, "", ports, Policy())


def ours(one: Subject, folder: Path) -> int:
    """The whole catalogue without logits; the rows that it is of."""
    options = Options(part="all", logits=0)
    with locks.locked(folder / "index", ""), StopRequest() as stop:
        state, index, _ = catalogue.read(one, options, folder / "index", stop)
        near = catalogue.neighbours(one)
        content = Content(
            one.store, index, state, near, None, None, options.quantiles, options.each
        )
        feature_table.write(folder / catalogue.FILE, content, stop)
    return state.rows


def full(made: SAE, x: Tensor, first: int) -> Tensor:
    """(n, 128) activations of a batch of latents: all are encoded."""
    kept = made.encode(x)
    mine = (kept.indices >= first) & (kept.indices < first + LATENTS)
    dense = x.new_zeros(len(x), LATENTS)
    dense[kept.rows[mine], kept.indices[mine] - first] = kept.values[mine]
    return dense


def columns(made: SAE, x: Tensor, first: int) -> Tensor:
    """(n, 128) what a batch of latents would be without the others."""
    part = slice(first, first + LATENTS)
    return torch.relu((x - made.b_dec) @ made.W_enc[:, part] + made.b_enc[part])


def reencoding(encode: Any, made: SAE, rows: Tensor, batches: int) -> float:
    """Seconds for all batches of latents."""
    of = made.d_sae // LATENTS
    began = time.perf_counter()
    for number in range(batches):
        first = number * (of // batches) * LATENTS
        best = torch.zeros(0, LATENTS)
        count, total, histogram = torch.zeros(LATENTS), torch.zeros(LATENTS), torch.zeros(BINS)
        for at in range(0, len(rows), BATCH):
            dense = encode(made, rows[at : at + BATCH].float(), first)
            fires = dense > 0
            count += fires.sum(0)
            total += dense.sum(0)
            histogram += torch.histc(dense[fires], BINS, 0, 100)
            best = torch.cat([best, dense]).topk(TOP, dim=0).values
    return (time.perf_counter() - began) * of / batches


@torch.inference_mode()
def measure(one: Subject, rounds: int, batches: int) -> dict[str, Any]:
    """Tokens per second of all three, and ratios round by round."""
    store = one.store
    bits = np.concatenate([store.residuals(LAYER, unit) for unit in range(store.units)])
    rows, names = torch.from_numpy(bits).view(torch.bfloat16), ("ours", "full", "columns")
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        folder = Path(tempfile.mkdtemp(dir=one.run))
        began = time.perf_counter()
        ours(one, folder)
        found["ours"].append(time.perf_counter() - began)
        shutil.rmtree(folder)
        for name, encode in (("full", full), ("columns", columns)):
            found[name].append(reencoding(encode, one.sae, rows, batches))
    figures: dict[str, Any] = {
        f"{name}_tokens_per_s": len(rows) / statistics.median(found[name]) for name in names
    }
    for name in names[1:]:
        ratios = [theirs / mine for theirs, mine in zip(found[name], found["ours"], strict=True)]
        figures[f"ratio_to_{name}"] = statistics.median(ratios)
        figures[f"ratio_to_{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.catalogue_speed")
    defaults = {
        "tokens": 65_536,
        "unit": 16_384,
        "width": 384,
        "d_sae": 4096,
        "k": 32,
        "rounds": 3,
        "batches": 4,
    }
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--folder", type=Path, help="where the store is made; default: the temporary one"
    )
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    shape = vars(parser.parse_args())
    out, where = shape.pop("out"), shape.pop("folder")
    folder = Path(tempfile.mkdtemp(dir=where))
    try:
        made = {name: shape[name] for name in ("tokens", "unit", "width", "d_sae", "k")}
        figures = measure(subject(folder, **made), shape["rounds"], shape["batches"])
    finally:
        shutil.rmtree(folder)
    finish(shape, figures, out)


if __name__ == "__main__":
    main()
