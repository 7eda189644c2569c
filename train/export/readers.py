"""SAEs of other libraries and of the reference, by what stands before the colon of FORMAT:PATH."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from train import sae_file
from train.export import bundle, format, golden
from train.export.origin import Origin
from train.run import CONFIG, read_config
from train.sae import SAE


def _reference(path: Path) -> SAE:
    """A sae_final.pt, or the one in a folder: the public reference SAE's, or ours."""
    path = path / sae_file.FILE if path.is_dir() else path
    bundle.require_whole(path)
    return golden.checked(sae_file.load(path), path)


def _reference_origin(path: Path) -> Origin:
    """The layer and the model of a run of ours; the reference's own file names none."""
    run = path if path.is_dir() else path.parent
    if not (run / CONFIG).is_file():
        return Origin()
    config = read_config(run)
    source = config.get("source", {})
    layer = config["settings"].get("layer")
    return Origin(None, None, layer, source.get("model"), source.get("context"))


READERS: dict[str, Callable[[Path], SAE]] = {
    name: partial(format.read, name) for name in format.names()
}
READERS["reference"] = _reference
ORIGINS: dict[str, Callable[[Path], Origin]] = {
    name: format.find(name).origin for name in format.names()
}
ORIGINS["reference"] = _reference_origin


def is_foreign(named: str) -> bool:
    """Whether a name is FORMAT:PATH of a format that is known."""
    prefix, colon, _ = named.partition(":")
    return bool(colon) and prefix in READERS
