"""Rows that are made of known features: a world, and batches of it.

    x = sum over the active features f of a_f D_f + offset + noise

- Superposition: there are more features than dimensions, and D_f are random unit directions.
- Frequency tail: the root of rank r fires with probability min(c r^-tail, .4). c makes a row hold
  `active` features on average.
- Correlation: roots of one topic fire together. Each fires where a normal variable is above its
  own limit, and the variables of two roots of a topic correlate by `correlation` (a Gaussian
  copula).
- Hierarchy: a share of the features stands in trees of three levels. A child fires only where its
  parent does, and at most one of three children at a time: one of them in three of four cases, by
  1 : 1/2 : 1/3. A child's direction is added to its parent's.
- Magnitudes: a_f is log-normal about the feature's own mean, which is between 1 and 2.

Trees, a frequency tail, correlation and superposition are what SynthSAEBench plants (arXiv
2602.14687), at 16,384 features. Everything is a pure function of (world, number of the batch).

Shapes: n rows, N features, R roots, d = d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from residual_saes.analyze.stats import sums_by
from residual_saes.data.store import records
from residual_saes.data.store.moments import Moments

CHILDREN, LEVELS = 3, 3  # of a tree
WITH_CHILD = 0.75  # of the rows on which a parent fires
MOST_OFTEN = 0.4  # of the rows on which a root fires
TOPIC = 8  # roots
SPREAD = 0.25  # standard deviation of log a_f
NO_PARENT = -1
TRAIN, CHOICE, HELD_OUT, MOMENTS = range(4)  # parts, of which no two share a row
_OFFSET = 2.0  # norm of the mean row, about that of a row about it
_SAMPLE = 32_768  # rows from which the moments come
_SEED = 5_170_223  # none that an SAE has: equal seeds would draw equal directions

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Batch(NamedTuple):
    """Rows, and what they are made of."""

    x: Tensor  # (n, d) float32
    amounts: Tensor  # (n, N) float32, 0 where a feature is not active

    @property
    def fires(self) -> Tensor:
        """(n, N) bool."""
        return self.amounts > 0


@dataclass(frozen=True)
class World:
    """What rows are made of. Two worlds of the same settings and seed are the same."""

    features: int
    d_model: int
    active: float  # features a row, on average
    hierarchy: float  # share of the features that stand in trees
    correlation: float  # of two roots of a topic
    tail: float  # exponent
    noise: float  # standard deviation per dimension
    seed: int

    @property
    def identity(self) -> str:
        """A digest of all that the rows follow from."""
        return records.digest({"world": 1, **asdict(self)})

    @cached_property
    def place(self) -> Ints:
        """(N,) each feature's place in its tree, level by level; 0 of a root, or one alone."""
        size = sum(CHILDREN**level for level in range(LEVELS))
        in_trees = round(self.hierarchy * self.features)
        return np.where(np.arange(self.features) < in_trees, np.arange(self.features) % size, 0)

    @cached_property
    def parent(self) -> Ints:
        """(N,) each feature's parent, which comes before it; NO_PARENT of a root."""
        first = np.arange(self.features) - self.place
        return np.where(self.place > 0, first + (self.place - 1) // CHILDREN, NO_PARENT)

    @cached_property
    def slot(self) -> Floats:
        """(N, 2) a child fires where its parent's uniform variable lies in this interval."""
        shares = 1 / np.arange(1, CHILDREN + 1)
        ends = WITH_CHILD * np.concatenate([[0], np.cumsum(shares / shares.sum())])
        child = (self.place - 1) % CHILDREN
        return np.stack([ends[child], ends[child + 1]], 1)

    @cached_property
    def root(self) -> Ints:
        """(N,) the root of each feature's tree."""
        return np.arange(self.features) - self.place

    @cached_property
    def given_root(self) -> Floats:
        """(N,) the probability that a feature is active where its root is."""
        given = np.ones(self.features)
        for child in np.flatnonzero(self.parent != NO_PARENT):
            low, high = self.slot[child]
            given[child] = given[self.parent[child]] * (high - low)
        return given

    @cached_property
    def of_root(self) -> Floats:
        """(R,) features of its tree that are active where a root is, on average, with itself."""
        (sums,) = sums_by(self.root, self.given_root)
        return sums

    @property
    def most_active(self) -> float:
        """Features a row, at most."""
        return float(MOST_OFTEN * self.of_root.sum())

    @cached_property
    def frequency(self) -> Floats:
        """(N,) the probability that a feature is active."""
        rank = 1 + np.random.default_rng([_SEED, self.seed, 0]).permutation(len(self.roots))
        shape = rank.astype(np.float64) ** -self.tail

        def of_roots(log_c: float) -> Floats:
            return np.asarray(np.minimum(np.exp(log_c) * shape, MOST_OFTEN))

        log_c = brentq(lambda log_c: of_roots(log_c) @ self.of_root - self.active, -60, 60)
        every = np.zeros(self.features)
        every[self.roots] = of_roots(log_c)
        return np.asarray(every[self.root] * self.given_root)

    @cached_property
    def roots(self) -> Ints:
        """(R,) features without a parent."""
        return np.flatnonzero(self.parent == NO_PARENT)

    @cached_property
    def topic(self) -> Ints:
        """(R,) the topic of each root."""
        order = np.random.default_rng([_SEED, self.seed, 1]).permutation(len(self.roots))
        return order // TOPIC

    @cached_property
    def directions(self) -> Tensor:
        """(N, d) of norm 1."""
        drawn = np.random.default_rng([_SEED, self.seed, 2])
        directions = drawn.standard_normal((self.features, self.d_model))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        return torch.from_numpy(directions.astype(np.float32))

    @cached_property
    def offset(self) -> Tensor:
        """(d,) what every row has."""
        drawn = np.random.default_rng([_SEED, self.seed, 3]).standard_normal(self.d_model)
        return torch.from_numpy((_OFFSET * drawn / np.linalg.norm(drawn)).astype(np.float32))

    @cached_property
    def mean_amount(self) -> Floats:
        """(N,) the mean of a feature's magnitude where it is active."""
        return 1 + np.random.default_rng([_SEED, self.seed, 4]).random(self.features)

    def draw(self, part: int, number: int, n: int) -> Batch:
        """Rows of batch `number` of a part."""
        rng = np.random.default_rng([_SEED, self.seed, 5, part, number])
        fires = self._fires(rng, n)
        row, feature = np.nonzero(fires)
        amounts = np.zeros(fires.shape, np.float32)
        normal = rng.standard_normal(len(row), np.float32)
        amounts[row, feature] = self.mean_amount[feature] * np.exp(SPREAD * normal - SPREAD**2 / 2)
        x = self.noise * rng.standard_normal((n, self.d_model), np.float32)
        given = torch.from_numpy(amounts)
        return Batch(torch.from_numpy(x) + self.offset + given @ self.directions, given)

    def _fires(self, rng: np.random.Generator, n: int) -> Bools:
        """(n, N) which features are active."""
        topics = rng.standard_normal((n, int(self.topic.max()) + 1), np.float32)
        own = rng.standard_normal((n, len(self.roots)), np.float32)
        rho = np.float32(self.correlation)
        variable = np.sqrt(rho) * topics[:, self.topic] + np.sqrt(1 - rho) * own
        limit = norm.isf(self.frequency[self.roots]).astype(np.float32)
        fires = np.zeros((n, self.features), np.bool_)
        fires[:, self.roots] = variable > limit
        children = np.flatnonzero(self.parent != NO_PARENT)
        parents, column = np.unique(self.parent[children], return_inverse=True)
        uniform = rng.random((n, len(parents)), np.float32)
        for feature, drawn in zip(children, uniform.T[column], strict=True):
            low, high = self.slot[feature]
            fires[:, feature] = fires[:, self.parent[feature]] & (low <= drawn) & (drawn < high)
        return fires


class Rows:
    """The surface of data.rows.reader.Reader over a world's rows, which are drawn on the fly."""

    def __init__(self, world: World, rows: int, batch: int) -> None:
        self.rows = rows
        self.widths = [world.d_model]
        self._world = world
        self._batch = batch
        sample = world.draw(MOMENTS, 0, _SAMPLE).x.double()
        moments = Moments.of(sample.numpy())
        self.mean, self.variance = moments.mean, moments.variance
        self.mean_norms = [float(sample.norm(dim=1).mean())]

    def batches(self, start: int) -> Iterator[Tensor]:
        """Batches (batch, d) from number `start` on, without end."""
        number = start
        while True:
            yield self._world.draw(TRAIN, number, self._batch).x
            number += 1
