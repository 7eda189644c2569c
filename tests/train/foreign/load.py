"""What other libraries compute of the files that ours wrote.

    python tests/train/foreign/load.py IN      in an interpreter that has the libraries

IN/LIBRARY/KIND/... are the files, with loads.py that loads them, IN/x.npy (n, d) the rows. Each
folder gets found.npz: f (n, F) and x_hat (n, d) as the library has them, and where it takes the SAE
to be from. A folder whose class a library lacks gets none: crosscoders are of a fork of
dictionary_learning.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from write import import_dictionary_learning

Found = tuple[Tensor, Tensor, str]


def loaded(folder: Path) -> Any:
    """The SAE by the code that `python -m train.export` prints."""
    names: dict[str, Any] = {}
    exec((folder / "loads.py").read_text(), names)
    return names["sae"]


def saelens(folder: Path, x: Tensor) -> Found:
    sae = loaded(folder)
    hooks = (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out)
    return sae.encode(x), sae(x), " ".join(filter(None, hooks))


def sparsify(folder: Path, x: Tensor) -> Found:
    sae = loaded(folder)
    (name,) = (path.name for path in folder.iterdir() if path.is_dir())
    top = sae.encode(x)
    f = torch.zeros(len(x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
    return f, sae(x).sae_out, name


def dictionary_learning(folder: Path, x: Tensor) -> Found:
    import_dictionary_learning()
    from dictionary_learning import dictionary

    if folder.name.startswith("crosscoder"):
        config = json.loads((folder / "config.json").read_text())["trainer"]
        getattr(dictionary, config["dict_class"])  # the fork alone has it
        crosscoder = loaded(folder)
        layers = x.reshape(len(x), config["num_layers"], -1)
        found = crosscoder(layers).reshape(x.shape)
        return crosscoder.encode(layers), found, config["submodule_name"]
    sae = loaded(folder)
    config = json.loads((folder / "config.json").read_text())["trainer"]
    f = sae.encode(x)
    return f, sae.decode(f), str(config["submodule_name"])


def circuit_tracer(folder: Path, x: Tensor) -> Found:
    from circuit_tracer.transcoder import activation_functions
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    config = yaml.safe_load((folder / "config.yaml").read_text())
    names = ("scan", "feature_input_hook", "feature_output_hook")
    options = {name: config[name] for name in names}
    k = config.get("k")
    if k is not None and "activation" in inspect.signature(load_transcoder_set).parameters:
        options |= {"activation": config["activation"], "k": k}
    file = next(path for path in folder.glob("*layer_21.*") if path.name[:6] != "golden")
    for lazy in (True, False):
        options |= {"lazy_encoder": lazy, "lazy_decoder": lazy}
        found = load_transcoder_set({0: str(file)}, device=torch.device("cpu"), **options)
        if k is not None:  # 0.5.0 has TopK and does not read config.yaml's
            found[0].activation_function = activation_functions.TopK(k)
    return (
        found[0].encode(x),
        found[0](x),
        f"{found.feature_input_hook} {found.feature_output_hook}",
    )


LIBRARIES = {
    "circuit_tracer": circuit_tracer,
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    root = Path(sys.argv[1])
    rows = torch.from_numpy(np.load(root / "x.npy"))
    for library in LIBRARIES:
        for folder in sorted((root / library).iterdir()):
            try:
                f, x_hat, hook = LIBRARIES[library](folder, rows)
            except ImportError as error:
                print(f"{library} is not installed: {error}", file=sys.stderr)
                break
            except AttributeError as error:
                print(f"{library}: {folder.name}: {error}", file=sys.stderr)
                continue
            np.savez(folder / "found.npz", f=f.numpy(), x_hat=x_hat.numpy(), hook=hook)
