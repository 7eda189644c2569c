"""SAEs of other libraries as runs: `run=saelens:PATH store=...` measures them by our studies."""

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
from train.export import format
from train.run import CONFIG, source_of
from train.sae import SAE, SAEConfig

FOLDER = Path("runs", "imported")


def _reference(path: Path) -> SAE:
    """A sae_final.pt, or the one in a folder: the public reference SAE's, or ours."""
    return sae_file.load(path / sae_file.FILE if path.is_dir() else path)


# By what stands before the colon.
READERS: dict[str, Callable[[Path], SAE]] = {
    name: format.find(name).read for name in format.names()
}
READERS["reference"] = _reference


def is_foreign(run: str) -> bool:
    """Whether `run` names an SAE of another library."""
    prefix, colon, _ = run.partition(":")
    return bool(colon) and prefix in READERS


def run_of(named: str, store: str | None, layer: int | None) -> Path:
    """The run directory of a foreign SAE, made on first use.

    It has the weights as sae_final.pt, and what they are measured on as config.yaml. Its name ends
    with a digest of what it was made from: the weights, the store, the layer.

    Args:
        named: FORMAT:PATH.
        layer: the store's layer that it is of; None: the store's first.

    Raises:
        SettingError: no store was named, or it lacks the layer, or its rows have another width.
        StoreError: PATH is not what FORMAT says, or has what cannot be taken.
    """
    kind, _, where = named.partition(":")
    path = Path(where)
    if store is None:
        raise SettingError(
            f"run={named} is measured on a store: "
            "give store=, and layer= if it is not the store's first"
        )
    opened = Store.open(place_of(store))
    sae = READERS[kind](path)
    layer = opened.layers[0] if layer is None else layer
    _require_fit(named, sae, opened, layer)
    config = asdict(SAEConfig(d_sae=sae.d_sae, k=sae.k))
    config["activation"] = "topk" if sae.threshold is None else "jumprelu"
    settings = {
        "store": {"identity": opened.identity},
        "layer": layer,
        "policy": asdict(Policy()),
        "sae": config,
    }
    weights = durable.digest(*(tensor.numpy().tobytes() for tensor in sae.tensors().values()))
    key = durable.digest(json.dumps([settings, weights]).encode())[:8]
    run = FOLDER / f"{kind}-{path.resolve().name}-{key}"
    if (run / CONFIG).is_file():
        return run
    run.mkdir(parents=True, exist_ok=True)
    sae_file.write_final(sae, 1.0, run)
    facts: dict[str, Any] = {
        "settings": settings,
        "store_path": opened.name,
        "sae_name": kind,
        "environment": {},
        "imported": named,
        "source": source_of(opened),
    }
    durable.write(run / CONFIG, [yaml.safe_dump(facts, sort_keys=False).encode()])
    return run


def _require_fit(named: str, sae: SAE, store: Store, layer: int) -> None:
    """Raise SettingError if the store lacks the layer, or its rows have another width."""
    if layer not in store.layers:
        layers = ", ".join(map(str, store.layers))
        raise SettingError(f"layer={layer} is not in {store.name}; it has {layers}")
    if sae.d_model != store.d_model:
        raise SettingError(
            f"run={named} is of rows of width {sae.d_model}, "
            f"those of {store.name} have {store.d_model}"
        )
