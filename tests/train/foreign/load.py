"""What other libraries compute of the files that ours wrote.

    python tests/train/foreign/load.py IN      in an interpreter that has the libraries

IN/LIBRARY/KIND/... are the files, IN/x.npy (n, d) the rows. Each folder gets found.npz: f (n, F)
and x_hat (n, d) as the library has them, and where it takes the SAE to be from.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from write import import_dictionary_learning

Found = tuple[Tensor, Tensor, str]


def saelens(folder: Path, x: Tensor) -> Found:
    from sae_lens import SAE

    sae: Any = SAE.load_from_disk(folder)
    f = sae.encode(x)
    return f, sae.decode(f), str(sae.cfg.metadata.hook_name)


def sparsify(folder: Path, x: Tensor) -> Found:
    from sparsify import SparseCoder

    (name, sae), *others = SparseCoder.load_many(str(folder), local=True).items()
    assert not others
    top = sae.encode(x)
    f = torch.zeros(len(x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
    return f, sae.decode(top.top_acts, top.top_indices), name


def dictionary_learning(folder: Path, x: Tensor) -> Found:
    import_dictionary_learning()
    from dictionary_learning.utils import load_dictionary

    sae, config = load_dictionary(str(folder), "cpu")
    f = sae.encode(x)
    return f, sae.decode(f), str(config["trainer"]["submodule_name"])


LIBRARIES = {
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
            np.savez(folder / "found.npz", f=f.numpy(), x_hat=x_hat.numpy(), hook=hook)
