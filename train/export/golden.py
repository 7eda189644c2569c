"""Golden rows: a few rows with the latents and the reconstruction that an export has to give.

They lie beside the library's weights as golden.safetensors, which the library ignores, or as
golden.WEIGHTS where a folder holds the weights of several layers:

    rows (n, d), x_hat (n, d)            float32; of a transcoder y_hat (n, d_out) for x_hat
    row, latent (p,) int64, value (p,)   the latents above 0 and their activations, pair by pair

Whoever reads the export checks its reader by them. Ours do: a file that was damaged, or that is
read as another function, is refused. A folder without golden rows is another author's. Before
train/export/bundle.py recorded every file's digest, the metadata had that of the weights' file.

Rows are made of the SAE's own directions, not taken from the store: so they are there wherever an
export is made, the same ones each time, and they fire many latents with clear margins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from residual_saes.data import durable
from residual_saes.data.errors import StoreError
from residual_saes.data.foreign import reading
from residual_saes.train.export.format import About, find, read_tensors
from residual_saes.train.sae import SAE
from residual_saes.train.tensors import require_usable

FILE = "golden.safetensors"
_WEIGHTS = (".safetensors", ".pt")  # endings of files of weights
_ROWS = 8
_CANDIDATES = 64  # of which those are taken whose kept latents are the clearest
# Libraries fold biases and norms in float32, in orders of their own.
_X_HAT_ERROR = 1e-5  # of the norm of x_hat
_LATENT_ERROR = 1e-3  # of the row's largest activation


def files(name: str, sae: SAE, about: About) -> dict[str, bytes]:
    """A library's files, and golden rows beside its weights: contents by path.

    Raises:
        StoreError: the library has no such SAE.
    """
    return beside(find(name).write(sae, about), [sae])


def beside(content: Mapping[str, bytes], saes: Sequence[SAE]) -> dict[str, bytes]:
    """A library's files with golden rows: the weights among them are of `saes`, in this order."""
    paths = [PurePosixPath(path) for path in content]
    weights = [path for path in paths if path.suffix in _WEIGHTS]
    golden = {}
    for path, sae in zip(weights, saes, strict=True):
        golden[str(path.with_name(_name(path.name)))] = of(sae)
    return {**content, **golden}


def _name(weights: str) -> str:
    """The name of the golden rows of a file of weights."""
    return f"golden.{weights}" if "layer_" in weights else FILE


def of(sae: SAE) -> bytes:
    """The content of golden.safetensors."""
    rows = _rows(sae)
    latents = _latents(sae, rows)
    row, latent = latents.nonzero(as_tuple=True)
    tensors = {"rows": rows, _output(sae): sae(rows), "row": row, "latent": latent}
    tensors["value"] = latents[row, latent]
    return bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def checked(sae: SAE, weights: Path) -> SAE:
    """`sae` as it was read from a file, if the golden rows beside that are right or missing.

    Raises:
        StoreError: the file is not the one that was exported, or computes something else, or
            weights that were folded leave float32.
    """
    for name, tensor in sae.tensors().items():
        require_usable(name, tensor, weights)
    path = weights.with_name(_name(weights.name))
    if not os.path.lexists(path):
        return sae
    golden = read_tensors(path)
    digest = _digests(path).get(weights.name)
    if digest not in (None, durable.digest_file(weights).xxh3_128):
        raise _wrong(weights, path, "another digest than")
    with reading(f"{path} is not of {weights.name}", "restore it"):
        wanted = golden[_output(sae)]
        _require_shapes(golden, wanted, sae)
        right = torch.zeros(len(golden["rows"]), sae.d_sae)
        right[golden["row"], golden["latent"]] = golden["value"]
        latents, x_hat = _latents(sae, golden["rows"]), sae(golden["rows"])
        error = torch.linalg.vector_norm(x_hat - wanted)
        limit = _X_HAT_ERROR * torch.linalg.vector_norm(wanted)
    same = (latents - right).abs() <= _LATENT_ERROR * right.amax(dim=1, keepdim=True)
    if not bool(same.all()):
        raise _wrong(weights, path, "other latents than")
    if not bool(error <= limit):
        raise _wrong(weights, path, "another reconstruction than")
    return sae


def _output(sae: SAE) -> str:
    """The name of what it gives: a transcoder's is no approximation of its input."""
    return "x_hat" if sae.b_in is None else "y_hat"


def _require_shapes(golden: Mapping[str, Tensor], wanted: Tensor, sae: SAE) -> None:
    """Raise ValueError for rows that were not made by `of`."""
    rows = golden["rows"]
    pairs = {golden[name].shape for name in ("row", "latent", "value")}
    fits = rows.ndim == 2 and len(rows) <= _CANDIDATES and wanted.shape == (len(rows), sae.d_out)
    if not fits or len(pairs) > 1 or golden["row"].ndim != 1:
        raise ValueError("its shapes are not those of golden rows")


def _wrong(weights: Path, path: Path, what: str) -> StoreError:
    return StoreError(
        f"{weights} has {what} {path.name} beside it says; restore or export it again, or delete "
        f"{path.name} if the file was changed on purpose"
    )


def _digests(path: Path) -> dict[str, str]:
    with reading(f"{path} cannot be read", "restore it"), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _latents(sae: SAE, rows: Tensor) -> Tensor:
    """(n, F) activations."""
    kept = sae.encode(rows)
    latents = torch.zeros(len(rows), sae.d_sae)
    latents[kept.rows, kept.indices] = kept.values
    return latents


def _rows(sae: SAE) -> Tensor:
    """(n, d) b_in and a few latents' directions each, long enough to pass biases and thresholds."""
    draw = torch.Generator().manual_seed(0)
    fire = min(2 * sae.k, max(sae.d_sae // 2, 1))
    threshold = sae.b_enc * 0 if sae.threshold is None else sae.threshold
    b_in = sae.b_dec if sae.b_in is None else sae.b_in
    length = torch.maximum(
        2 * (sae.b_enc.abs().mean() + threshold.mean()),
        torch.linalg.vector_norm(b_in) / fire**0.5,
    ).clamp_min(1e-3)
    directions = _directions(sae)
    rows = b_in.repeat(_CANDIDATES, 1)
    for number in range(_CANDIDATES):
        latents = torch.randperm(sae.d_sae, generator=draw)[:fire]
        sizes = length * (1 + torch.rand(fire, generator=draw))
        rows[number] += sizes @ directions[latents]
    pre = (rows - b_in) @ sae.W_enc + sae.b_enc
    if sae.threshold is not None:
        margin = (pre - sae.threshold).abs().amin(dim=1)
    elif sae.k < sae.d_sae:
        largest = pre.topk(sae.k + 1, dim=1).values
        margin = largest[:, -2] - largest[:, -1]
    else:
        margin = pre.new_ones(len(pre))
    clear = (margin / pre.abs().amax(dim=1)).topk(_ROWS).indices
    return rows[clear]


def _directions(sae: SAE) -> Tensor:
    """(F, d) W_dec; of a transcoder, which writes elsewhere, the encoder, of which 1 gives 1."""
    if sae.b_in is None:
        return sae.W_dec
    squares = sae.encoder.square().sum(dim=1, keepdim=True)
    return sae.encoder / squares.clamp_min(torch.finfo(squares.dtype).tiny)
