"""The lines of Python that load an export in the library that it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

import yaml

_LINES = {
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary",
        'sae, config = load_dictionary({folder}, "cpu")',
    ),
    "safetensors": (
        "from residual_saes import SAE",
        "sae = SAE.load({named})",
    ),
    "saelens": ("from sae_lens import SAE", "sae = SAE.load_from_disk({folder})"),
    "sparsify": (
        "from sparsify import SparseCoder",
        "(sae,) = SparseCoder.load_many({folder}, local=True).values()",
    ),
}
_CROSSCODER = (  # of the fork science-of-finetuning
    "from dictionary_learning.dictionary import {cls}",
    "sae = {cls}.from_pretrained({file})",
)
_CIRCUIT_TRACER = (
    "from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set",
    "transcoders = load_transcoder_set({files}, {options})",
)


def lines(name: str, folder: Path, files: Collection[str]) -> list[str]:
    """Code to paste, of an export that is there.

    None of a set for circuit-tracer that lacks a layer: it cannot be loaded.

    Args:
        folder: the export's.
        files: its files, by path in it.
    """
    if name == "circuit_tracer":
        return _of_circuit_tracer(folder, files)
    if name == "dictionary_learning":
        cls = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
        if "CrossCoder" in cls:
            file = repr(str(folder / "ae.pt"))
            return [line.format(cls=cls, file=file) for line in _CROSSCODER]
    # sparsify's files lie in a folder that has the hook's name.
    named = repr(f"{name}:{folder}")
    return [line.format(folder=repr(str(folder)), named=named) for line in _LINES[name]]


def _of_circuit_tracer(folder: Path, files: Collection[str]) -> list[str]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    by_layer = {}
    for file in files:
        if found := re.fullmatch(r"(?:topk_)?layer_(\d+)\.safetensors", file):
            by_layer[int(found[1])] = str(folder / file)
    if sorted(by_layer) != list(range(len(by_layer))):
        return []
    asked = ("scan", "feature_input_hook", "feature_output_hook", "activation", "k")
    options = [f"{option}={config[option]!r}" for option in asked if option in config]
    listed = dict(sorted(by_layer.items()))
    return [line.format(files=listed, options=", ".join(options)) for line in _CIRCUIT_TRACER]
