"""A map of latents: a place in two dimensions for each, near those whose directions are near.

t-SNE (van der Maaten and Hinton, 2008) of the cosines between decoder directions in their full
width: each latent is drawn to its nearest ones. So near points mean near directions. The distance
between far groups, a group's size and its density mean nothing. `kept` measures how far the map
keeps what it is made of.

Shapes: F latents, d width of the directions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from residual_saes.analyze.latents.nearest import nearest_others, unit
from residual_saes.analyze.parts import Arrays, Parts
from residual_saes.data.journal import note

VERSION = 2  # raise it when the same directions give another map
PERPLEXITY = 30  # about how many neighbours count; scikit-learn's default
FEWEST = 8  # latents of a map
_JUDGED = 10  # nearest directions of each latent that are looked for on the map ...
_AMONG = 100  # ... among so many nearest points at most, of few latents among fewer


class Layout(NamedTuple):
    """A map, and how true it is."""

    points: NDArray[np.float32]  # (F, 2) from 0 to 1 along the longer side
    kept: float  # share of the 10 nearest directions that are among the `among` nearest points
    among: int
    by_chance: float  # the same of points at random


def of(directions: Tensor, parts: Parts) -> Layout:
    """The map of directions (F, d), FEWEST at least; the same directions give the same map.

    Args:
        parts: where the neighbours and the map are kept.
    """
    units = unit(directions.float())
    perplexity = min(PERPLEXITY, (len(units) - 1) // 3)
    near = parts.within("neighbours")

    def make() -> Arrays:
        count = min(3 * perplexity + 1, len(units) - 1)  # as many as scikit-learn asks for
        cosines, ids = (found.cpu().numpy() for found in nearest_others(units, count, near))
        points = _placed(units, cosines, ids, perplexity)
        return {"points": points, "ids": ids[:, :_JUDGED].astype(np.int32)}

    made = parts.of(0, make)
    near.remove()
    points = made["points"]
    among = min(_AMONG, max(_JUDGED, len(points) // 50), len(points) - 1)
    return Layout(points, _kept(points, made["ids"], among), among, among / (len(points) - 1))


def _placed(
    directions: Tensor, cosines: NDArray[np.float32], ids: NDArray[np.int64], perplexity: int
) -> NDArray[np.float32]:
    """t-SNE from the two main components, by one thread: sums of several differ from run to run."""
    count = len(directions)
    note(f"map of {count:,} directions")
    distances = np.sqrt(np.maximum(2 - 2 * cosines, 0))
    # The graph holds each latent itself first, as scikit-learn's own graphs do.
    columns = np.column_stack([np.arange(count), ids])
    values = np.column_stack([np.zeros(count), distances])
    begins = np.arange(0, columns.size + 1, columns.shape[1])
    graph = sparse.csr_matrix((values.ravel(), columns.ravel(), begins), shape=(count, count))
    tsne = TSNE(perplexity=perplexity, metric="precomputed", init=_main(directions))
    with threadpool_limits(1):
        placed = tsne.fit_transform(graph)
    placed -= placed.min(0)
    return np.asarray(placed / max(placed.max(), 1e-9), np.float32)


def _main(directions: Tensor) -> NDArray[np.float32]:
    """(F, 2) the two main components, as small as t-SNE begins."""
    centred = directions - directions.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    main = centred @ vectors[:, -2:].flip(1)
    # An eigenvector has no sign of its own.
    main *= torch.sign(main.gather(0, main.abs().argmax(0, keepdim=True)))
    scaled: NDArray[np.float32] = (1e-4 * main / main[:, 0].std().clamp_min(1e-9)).cpu().numpy()
    return scaled


def _kept(points: NDArray[np.float32], ids: NDArray[np.int32], among: int) -> float:
    """The share of each latent's `ids` (F, k) that are among its `among` nearest points."""
    _, near = cKDTree(points).query(points, among + 1)
    shares = []
    for own, others in zip(near, ids, strict=True):
        shares.append(np.isin(others, own).mean())
    return float(np.mean(shares))
