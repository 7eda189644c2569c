"""SAEs of other libraries as runs: `run=saelens:PATH store=...` measures them by our studies on our
store.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data import durable
from data.errors import SettingError
from data.rows.split import Policy
from data.store.place import place_of
from data.store.store import Store
from train import sae_file
from train.export.formats import FORMATS
from train.run import CONFIG, source_of
from train.sae import SAE, SAEConfig

FOLDER = Path("runs", "imported")
READERS: dict[str, Callable[[Path], SAE]] = {
    **{name: each.read for name, each in FORMATS.items()},
    "reference": lambda path: sae_file.load(path / sae_file.FILE if path.is_dir() else path),
}
"""By what stands before the colon. `reference` is a sae_final.pt, the public reference SAE's or ours."""


def is_foreign(run: str) -> bool:
    """Whether `run` names an SAE of another library."""
    return ":" in run and run.partition(":")[0] in READERS


def run_of(named: str, store: str | None, layer: int | None) -> Path:
    """The run directory of a foreign SAE, made on first use: its weights as sae_final.pt, and what
    it is measured on.

    Its name ends with a digest of what it was made from: the weights, the store, the layer.

    Args:
        named: FORMAT:PATH.
        layer: the store's layer that it is of; None: the store's first.

    Raises:
        SettingError: no store was named, or it lacks the layer, or its rows have another width.
        StoreError: PATH is not what FORMAT says, or has what cannot be taken.
    """
    kind, _, where = named.partition(":")
    if store is None:
        raise SettingError(
            f"run={named} is measured on a store: give store=, and layer= if it is not the store's first"
        )
    opened, found = Store.open(place_of(store)), READERS[kind](Path(where))
    layer = opened.layers[0] if layer is None else layer
    if layer not in opened.layers:
        raise SettingError(
            f"layer={layer} is not in {opened.name}; it has {', '.join(map(str, opened.layers))}"
        )
    if found.d_model != opened.d_model:
        raise SettingError(
            f"run={named} is of rows of width {found.d_model}, those of {opened.name} have {opened.d_model}"
        )
    settings = {
        "store": {"identity": opened.identity},
        "layer": layer,
        "policy": asdict(Policy()),
        "sae": {
            **asdict(SAEConfig(d_sae=found.d_sae, k=found.k)),
            "activation": _activation(found),
        },
    }
    weights = durable.digest(*(tensor.numpy().tobytes() for tensor in found.tensors().values()))
    key = durable.digest(json.dumps([settings, weights]).encode())[:8]
    run = FOLDER / f"{kind}-{Path(where).resolve().name}-{key}"
    if not (run / CONFIG).is_file():
        run.mkdir(parents=True, exist_ok=True)
        sae_file.write_final(found, 1.0, run)
        facts: dict[str, Any] = {
            "store_path": opened.name,
            "sae_name": kind,
            "environment": {},
            "imported": named,
        }
        facts["source"] = source_of(opened)
        durable.write(
            run / CONFIG,
            [yaml.safe_dump({"settings": settings, **facts}, sort_keys=False).encode()],
        )
    return run


def _activation(found: SAE) -> str:
    return "topk" if found.threshold is None else "jumprelu"
