"""SAEs of other libraries as runs: `run=saelens:PATH store=...` measures them by our studies."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data import digests, durable
from data.errors import SettingError, StoreError, TemporaryError
from data.foreign import reading
from data.journal import tell
from data.rows.split import Policy
from data.site import RESID_POST, hook_name
from data.store.place import place_of
from data.store.store import Store
from train import sae_file
from train.export.origin import Origin
from train.export.readers import ORIGINS
from train.export.readers import READERS as READERS
from train.export.readers import is_foreign as is_foreign
from train.run import CONFIG, source_of
from train.sae import SAE, SAEConfig

FOLDER = Path("runs", "imported")
ACCEPT = ("model", "context")  # what an SAE's files may say otherwise than the store, if accepted


def run_of(
    named: str,
    store: str | None,
    layer: int | None,
    accept: Collection[str] = (),
    policy: Policy | None = None,
) -> Path:
    """The run directory of a foreign SAE, made on first use.

    It has the weights as sae_final.pt, and what they are measured on as config.yaml. Its name ends
    with a digest of what it was made from: the weights, the store, the layer, the policy.

    Args:
        named: FORMAT:PATH.
        layer: the store's layer that it is of; None: the one that its files say, or the store's
            only one.
        accept: of ACCEPT, where the files may differ from the store.
        policy: which rows it counts as trained on; None: neither BOS nor outliers.

    Raises:
        SettingError: no store was named, or it lacks the SAE's layer or site, or its rows have
            another width, are another model's or of another context; or `layer` is not the one
            that the files say.
        StoreError: PATH is not what FORMAT says, or has what cannot be taken.
    """
    kind, _, where = named.partition(":")
    path = Path(where)
    if store is None:
        raise SettingError(
            f"run={named} is measured on a store: "
            "give store=, and layer= if the SAE's files do not say its layer"
        )
    opened = Store.open(place_of(store))
    with reading(f"run={named} cannot be read", f"take files that {kind} wrote"):
        sae = READERS[kind](path)
        origin = ORIGINS[kind](path)
    layer = _layer(named, origin, layer, opened)
    _require_fit(named, sae, origin, opened)
    _require_same(named, origin, opened, accept)
    config = asdict(SAEConfig(d_sae=sae.d_sae, k=sae.k))
    config["activation"] = "topk" if sae.threshold is None else "jumprelu"
    settings = {
        "store": {"identity": opened.identity},
        "layer": layer,
        "policy": (policy or Policy()).recorded(),
        "sae": config,
    }
    weights = durable.digest(*(tensor.numpy().tobytes() for tensor in sae.tensors().values()))
    key = durable.digest(json.dumps([settings, weights]).encode())[:8]
    run = FOLDER / f"{kind}-{path.resolve().name}-{key}"
    if _is_whole(run):
        return run
    run.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "settings": settings,
        "store_path": opened.name,
        "sae_name": kind,
        "environment": {},
        "imported": named,
        "source": source_of(opened),
    }
    text = yaml.safe_dump(facts, sort_keys=False).encode()
    files = {
        sae_file.FILE: sae_file.write_final(sae, 1.0, run),
        CONFIG: durable.write(run / CONFIG, [text]),
    }
    digests.put(run, files, {"imported": named})
    return run


def _is_whole(run: Path) -> bool:
    """Whether a run of an SAE was made before, to its end; it is made again if it was damaged."""
    try:
        kept = digests.read(run, "it is made again")
    except TemporaryError:
        raise
    except StoreError as error:
        tell(str(error))
        return False
    wrong = next(kept.faults((CONFIG, sae_file.FILE)), None) if kept else None
    if wrong:
        tell(f"{wrong}: it is made again")
    return kept is not None and wrong is None


def _layer(named: str, origin: Origin, asked: int | None, store: Store) -> int:
    """The store's layer that the SAE is of.

    Raises:
        SettingError: it is not known, not the one asked for, or not in the store.
    """
    has = ", ".join(map(str, store.layers))
    own = origin.layer
    if own is not None and asked not in (None, own):
        raise SettingError(
            f"layer={asked}, and run={named} says that it is of layer {own}; leave layer= out, or "
            "mend what its files say"
        )
    if own is None and asked is None and len(store.layers) > 1:
        raise SettingError(
            f"run={named} does not say its layer, and {store.name} has {has}; give layer="
        )
    layer = own if own is not None else store.layers[0] if asked is None else asked
    if layer not in store.layers:
        whose = (
            f"layer={layer} is" if own is None else f"layer {layer}, which run={named} is of, is"
        )
        raise SettingError(
            f"{whose} not in {store.name}; it has {has}, and "
            f"`python -m harvest layer={layer} store={store.name}` adds it"
        )
    return layer


def _require_fit(named: str, sae: SAE, origin: Origin, store: Store) -> None:
    """Raise SettingError if the store's rows are of another site, or have another width."""
    site = store.manifest.get("site", RESID_POST)
    if sae.b_in is not None or origin.several is not None:
        raise SettingError(f"run={named} is of several hook points, and studies take one of {site}")
    if origin.site not in (None, site):
        raise SettingError(
            f"run={named} is of {origin.hook}, and the rows of {store.name} are {site}"
            f"{_same_rows(origin)}"
        )
    if sae.d_model != store.d_model:
        raise SettingError(
            f"run={named} is of rows of width {sae.d_model}, "
            f"those of {store.name} have {store.d_model}"
        )


def _same_rows(origin: Origin) -> str:
    """What a hook has in common with a layer's output, for the message that refuses it."""
    if origin.site == "resid_pre" and origin.layer:
        before = hook_name(origin.layer - 1)
        return f"; a layer's input is the output of the one before, so {before} would be the same"
    return ""


def _require_same(named: str, origin: Origin, store: Store, accept: Collection[str]) -> None:
    """Raise SettingError if the files name another model or context, and that is not accepted."""
    model, context = str(store.manifest["model"]["id"]), store.context
    differ: dict[str, str] = {}
    if origin.model is not None and plain_name(origin.model) != plain_name(model):
        differ["model"] = f"is of {origin.model}, and the rows of {store.name} are {model}'s"
    if origin.context not in (None, context):
        differ["context"] = (
            f"was trained in contexts of {origin.context} tokens, and {store.name} has {context}"
        )
    refused = [said for what, said in differ.items() if what not in accept]
    if refused:
        raise SettingError(
            f"run={named} {', and '.join(refused)}; accept=[{','.join(differ)}] measures it there"
        )


def plain_name(model: str) -> str:
    """What the names of a model have in common: without owner or folder, as TransformerLens says
    it, which SAELens uses.
    """
    name = model.rstrip("/").rpartition("/")[2].casefold().removesuffix("-hf")
    return "gpt2" if name == "gpt2-small" else name
