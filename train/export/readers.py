"""SAEs of other libraries and of the reference, by what stands before the colon of FORMAT:PATH."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from residual_saes.data.foreign import reading
from residual_saes.train import sae_file
from residual_saes.train.export import bundle, format, golden
from residual_saes.train.export.origin import Origin
from residual_saes.train.ports import recorded_ports
from residual_saes.train.run import CONFIG, read_config
from residual_saes.train.sae import SAE


def _reference(path: Path) -> SAE:
    """A sae_final.pt, or the one in a folder: the public reference SAE's, or ours."""
    path = path / sae_file.FILE if path.is_dir() else path
    bundle.require_whole(path)
    return golden.checked(sae_file.load(path), path)


def _reference_origin(path: Path) -> Origin:
    """What a run of ours reads and writes, and its model; the reference's own file says nothing."""
    run = path if path.is_dir() else path.parent
    if not (run / CONFIG).is_file():
        return Origin()
    config = read_config(run)
    source = config.get("source", {})
    with reading(f"{run / CONFIG} is not what training wrote", "restore it"):
        ports = recorded_ports(config["settings"])
    model, context = source.get("model"), source.get("context")
    if ports.is_autoencoder and len(ports.reads) == 1:
        point = ports.reads[0].point
        return Origin(str(point), point.site, point.layer, model, context)
    return Origin(model=model, context=context, several=ports, scales=config.get("scales"))


READERS: dict[str, Callable[[Path], SAE]] = {
    name: partial(format.read, name) for name in format.names()
}
READERS["reference"] = _reference
ORIGINS: dict[str, Callable[[Path], Origin]] = {
    name: format.find(name).origin for name in format.names()
}
ORIGINS["reference"] = _reference_origin

# Files of an SAE by which a folder's format is known, its weights last.
_TOLD_BY = {
    "reference": (sae_file.FILE,),
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "safetensors": ("config.json", "sae.safetensors"),
    "dictionary_learning": ("ae.pt",),
}
WEIGHTS = tuple(names[-1] for names in _TOLD_BY.values())


def kind_of(folder: Path) -> str | None:
    """The format of the SAE in a folder; None: of none that its files tell."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return next((kind for kind, names in _TOLD_BY.items() if there.issuperset(names)), None)


def is_foreign(named: str) -> bool:
    """Whether a name is FORMAT:PATH of a format that is known."""
    prefix, colon, _ = named.partition(":")
    return bool(colon) and prefix in READERS
