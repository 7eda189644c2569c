"""SAEs of other libraries as runs: `run=saelens:PATH store=...` measures them by our studies."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from residual_saes.data import digests, durable
from residual_saes.data.errors import SettingError, StoreError, TemporaryError
from residual_saes.data.foreign import reading
from residual_saes.data.journal import tell
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy
from residual_saes.data.site import RESID_POST, RESID_PRE, SITES, HookPoint, hook_name
from residual_saes.data.store.place import place_of
from residual_saes.data.store.store import Store
from residual_saes.train import sae_file
from residual_saes.train.export.origin import Origin
from residual_saes.train.export.readers import ORIGINS
from residual_saes.train.export.readers import READERS as READERS
from residual_saes.train.export.readers import is_foreign as is_foreign
from residual_saes.train.ports import Ports, ports_of, recorded_ports
from residual_saes.train.run import CONFIG, source_of
from residual_saes.train.sae import SAE, SAEConfig

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
    ports = _ports(named, sae, origin, layer, opened)
    _require_fit(named, sae, ports, opened)
    _require_same(named, origin, opened, accept)
    settings = {
        "store": {"identity": opened.identity},
        **_places(named, sae, ports),
        "policy": (policy or Policy()).recorded(),
    }
    weights = durable.digest(*(tensor.numpy().tobytes() for tensor in sae.tensors().values()))
    key = durable.digest(json.dumps([settings, weights]).encode())[:8]
    run = FOLDER / f"{kind}-{path.resolve().name}-{key}"
    if _is_whole(run):
        return run
    run.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "settings": settings,
        **({"scales": dict(origin.scales)} if origin.scales else {}),
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


def _ports(named: str, sae: SAE, origin: Origin, asked: int | None, store: Store) -> Ports:
    """The store's hook points that the SAE is of.

    Raises:
        SettingError: they are not known, not of the layer asked for, or not in the store.
    """
    own = origin.ports(store.manifest["model"].get("architecture"))
    layer = origin.layer if own is None else own.reads[0].point.layer
    if layer is not None and asked not in (None, layer):
        raise SettingError(
            f"layer={asked}, and run={named} says that it is of layer {layer}; leave layer= out, "
            "or mend what its files say"
        )
    is_transcoder = sae.b_in is not None
    said = " to ".join(filter(None, [origin.hook, origin.hook_out]))
    if is_transcoder and (own is None or own.is_autoencoder):
        raise SettingError(
            f"run={named} is a transcoder, and its files say of no two hook points that it reads "
            f"one and writes the other ({said or 'nothing'}); those are {', '.join(SITES)}"
        )
    if own is None and origin.site not in (None, *SITES):
        raise SettingError(
            f"run={named} is of {said}; a store's rows are of {', '.join(SITES)} of a layer"
        )
    if own is None:
        site = origin.site or RESID_POST
        own = ports_of(
            "sae", [_layer(named, asked if layer is None else layer, store)], [site], None
        )
    _require_points(named, said, own, store)
    return own


def _layer(named: str, known: int | None, store: Store) -> int:
    """`known`, or the store's only layer. Raises SettingError: it has several."""
    if known is None and len(store.layers) != 1:
        raise SettingError(
            f"run={named} does not say its layer, and {store.name} has {_names(store.points)}; "
            "give layer="
        )
    return store.layers[0] if known is None else known


def _require_points(named: str, said: str, ports: Ports, store: Store) -> None:
    """Raise SettingError if the store lacks one of the hook points, with how to add it."""
    if any(port.store for port in ports.every):
        raise SettingError(f"run={named} is of two stores, and this is one; train its own run=")
    lacks = [port.point for port in ports.every if port.point not in store.points]
    if not lacks:
        return
    layers = ",".join(str(layer) for layer in sorted({point.layer for point in lacks}))
    sites = ",".join(dict.fromkeys(point.site for point in lacks))
    layer = f"[{layers}]" if "," in layers else layers
    site = "" if sites == RESID_POST else f" site=[{sites}]" if "," in sites else f" site={sites}"
    is_not = "is not" if len(lacks) == 1 else "are not"
    raise SettingError(
        f"{' and '.join(map(str, lacks))}, which run={named}{f' ({said})' if said else ''} is of, "
        f"{is_not} in {store.name}; it has {_names(store.points)}{_same_rows(lacks)}, and "
        f"`python -m harvest layer={layer}{site} store={store.name}` adds it"
    )


def _names(points: Iterable[HookPoint]) -> str:
    return ", ".join(point.name for point in points) or "none"


def _places(named: str, sae: SAE, ports: Ports) -> dict[str, Any]:
    """The settings of a run of those hook points: its layer, its site, its SAE's.

    Raises:
        SettingError: no run has such.
    """
    points = [port.point for port in ports.reads]
    layers, sites = ([*dict.fromkeys(one)] for one in zip(*points, strict=True))
    written = ports.writes[0].point
    kind = (
        "crosscoder" if len(points) > 1 else "transcoder" if ports.reads != ports.writes else "sae"
    )
    config = SAEConfig(
        d_sae=sae.d_sae,
        k=sae.k,
        kind=kind,
        target=written.site if kind == "transcoder" else None,
        skip=sae.W_skip is not None,
    ).recorded()
    config["activation"] = "topk" if sae.threshold is None else "jumprelu"
    settings: dict[str, Any] = {"layer": layers if len(layers) > 1 else layers[0]}
    if sites != [RESID_POST]:
        settings["site"] = sites if len(sites) > 1 else sites[0]
    settings["sae"] = config
    if recorded_ports(settings) != ports:
        writes = _names(port.point for port in ports.writes)
        raise SettingError(
            f"run={named} reads {_names(points)} and writes {writes}; "
            "a run's are each of its layers at each of its sites, and a transcoder's of one layer"
        )
    return settings


def _require_fit(named: str, sae: SAE, ports: Ports, store: Store) -> None:
    """Raise SettingError if the store's rows have another width."""
    for side, width in ((ports.reads, sae.d_model), (ports.writes, sae.d_out)):
        has = sum(Source(store, port.point).width for port in side)
        if has != width:
            raise SettingError(
                f"run={named} is of rows of width {width}, those of {store.name} have {has}"
            )


def _same_rows(lacks: Sequence[HookPoint]) -> str:
    """What a layer's input has in common with another hook point."""
    if [point.site for point in lacks] == [RESID_PRE] and lacks[0].layer:
        before = hook_name(lacks[0].layer - 1)
        return f" (a layer's input is the output of the one before: {before})"
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
