"""What a study measures: a finished run's SAE, and the held-out rows of the run's store.

`Subject.rows` yields the held-out rows unit by unit. `Subject.firings` also encodes them.

Shapes: n rows of a unit, d d_model, p pairs of a row and a latent that is above 0 in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyze import kept
from analyze.parts import NOWHERE, Arrays, Parts
from data.errors import MismatchError, SettingError, StoreError
from data.foreign import reading
from data.journal import note
from data.rows import statistics
from data.rows.split import Policy, held_out_units, require_complete
from data.settings import whole
from data.store import manifest
from data.store.kinds import BOS, NON_FINITE
from data.store.moments import Moments
from data.store.place import place_of
from data.store.store import Store
from harvest.model_folder import EMBEDDED
from train.kernels import Kept
from train.run import CONFIG, read_config, sae_of
from train.sae import SAE

_BATCH_ROWS = 4096  # rows encoded at a time
# Operations of encoding a unit on a CPU from which its latents are kept: 20 s of a core.
SLOW_UNIT = 1e12
ENCODED_VERSION = 1  # of those: raise it when the same rows give other ones


class Unit(NamedTuple):
    """All finite rows of one unit, BOS and outliers too, in stored order."""

    number: int
    rows: Tensor  # (n, d) float32, raw
    local: NDArray[np.int64]  # (n,) the row's token, as flat position in the unit's spine
    document: NDArray[np.uint32]  # (n,)
    position: NDArray[np.int64]  # (n,) tokens since the BOS of the document's piece, which is 0
    norm: NDArray[np.float32]  # (n,)
    kind: NDArray[np.uint8]  # (n,) as the run's `Policy.kinds_of` has it

    def of_kinds(self, kinds: Sequence[int]) -> NDArray[np.bool_]:
        """(n,) which rows are of one of `kinds`."""
        return np.isin(self.kind, kinds)

    def text_order(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The rows that `mask` (n,) chooses, in the order of the text; stored order is shuffled."""
        chosen = np.flatnonzero(mask)
        return chosen[np.argsort(self.local[chosen])]


class Pairs(NamedTuple):
    """Latents above 0, row by row; (p,) tensors on the SAE's device."""

    latent: Tensor  # int64
    row: Tensor  # int64, number of the row among those that were encoded
    value: Tensor  # float32, > 0


class Firings(NamedTuple):
    """Where latents fire in one unit; pairs are in the order of the text."""

    unit: Unit
    rows: NDArray[np.int64]  # the unit's rows that were encoded, in the order of the text
    latent: NDArray[np.int64]  # (p,)
    row: NDArray[np.int64]  # (p,) number of the row in the unit
    value: NDArray[np.float32]  # (p,) activation, > 0


def positive(kept: Kept) -> Pairs:
    """The kept latents that are above 0. TopK keeps k a row, some of them with the value 0."""
    fires = kept.values > 0
    return Pairs(kept.indices[fires], kept.rows[fires], kept.values[fires])


def encode(sae: SAE, unit: Unit, parts: Parts = NOWHERE) -> Kept:
    """The kept latents of all of a unit's rows.

    Args:
        parts: where they lie or are to lie.
    """
    if parts is NOWHERE:
        return _encoded(sae, unit)

    def make() -> Arrays:
        kept = _encoded(sae, unit)
        latents = kept.indices.to(torch.int32).cpu().numpy()
        return {
            "values": kept.values.cpu().numpy(),
            "latents": latents.astype(np.uint16) if sae.d_sae <= 2**16 else latents,
            "starts": kept.starts.cpu().numpy(),
        }

    part = parts.of(unit.number, make)
    device = unit.rows.device
    starts = torch.from_numpy(part["starts"]).to(device)
    values = torch.from_numpy(part["values"]).to(device)
    latents = torch.from_numpy(part["latents"].astype(np.int64)).to(device)
    return Kept(values, latents, _owners(starts, len(values)), starts)


def _owners(starts: Tensor, pairs: int) -> Tensor:
    """(p,) the bag of each of `pairs` pairs, given where each bag begins."""
    counts = torch.diff(starts, append=starts.new_tensor([pairs]))
    return torch.repeat_interleave(counts)


@torch.inference_mode()
def _encoded(sae: SAE, unit: Unit) -> Kept:
    total = len(unit.rows)
    columns: list[Kept] = []
    pairs = 0
    for start in range(0, total, _BATCH_ROWS):
        note(f"unit {unit.number}: {start:,} of {total:,} rows encoded")
        kept = sae.encode(unit.rows[start : start + _BATCH_ROWS])
        columns.append(kept._replace(rows=kept.rows + start, starts=kept.starts + pairs))
        pairs += len(kept.values)
    if not columns:
        nothing = torch.empty(0, dtype=torch.int64, device=unit.rows.device)
        return Kept(nothing.float(), nothing, nothing, nothing)
    return Kept._make(torch.cat(column) for column in zip(*columns, strict=True))


def taken(kept: Kept, rows: Tensor) -> Kept:
    """The latents of some rows (m,), in that order; `Kept.rows` then counts from 0 in `rows`."""
    ends = torch.cat([kept.starts[1:], kept.starts.new_tensor([len(kept.values)])])
    counts = ends[rows] - kept.starts[rows]
    starts = counts.cumsum(0) - counts
    owners = torch.repeat_interleave(counts)
    pair = torch.arange(len(owners), device=owners.device) + (kept.starts[rows] - starts)[owners]
    return Kept(kept.values[pair], kept.indices[pair], owners, starts)


def open_store(run: Path, recorded_place: str, identity: str, store: str | None) -> Store:
    """The store that a run was trained from.

    Args:
        recorded_place: where the store was when the run was trained.
        identity: the store's digest then.
        store: where the store is now, if it has moved since.

    Raises:
        StoreError: there is no store.
        MismatchError: the store at that place is another one.
    """
    place = place_of(store or recorded_place)
    if store is None and not manifest.exists(place):
        raise StoreError(
            f"the store of {run} was at {place.name} and is not there now; give its place as store="
        )
    opened = Store.open(place)
    if opened.identity != identity:
        unequal = {"store": (identity, opened.identity)}
        raise MismatchError(f"run {run}", unequal, "Give the store it was trained from as store=.")
    return opened


@dataclass(frozen=True)
class Subject:
    """A trained SAE with everything that its figures depend on."""

    run: Path
    config: dict[str, Any]  # config.yaml of the run
    store: Store
    sae: SAE  # on raw rows
    digest: str  # of the SAE's file. Results carry it.
    layer: int
    policy: Policy
    # Whether `rows` gives every unit, not only held-out ones: of a store that was never trained on.
    whole: bool = False

    @classmethod
    def open(cls, run: Path, store: str | None, device: torch.device) -> Subject:
        """The subject of a finished run.

        Args:
            store: where the store is now, if it has moved since.

        Raises:
            StoreError: the run is missing, unfinished or damaged, or its store is missing.
            MismatchError: the store at that place is another one.
        """
        config = read_config(run)
        sae, digest = sae_of(run, device)
        way_out = "restore it, or choose another run="
        with reading(f"{run / CONFIG} is not what training wrote", way_out):
            settings = config["settings"]
            layer = whole("layer", settings["layer"])
            policy = Policy.of(settings["policy"])
            place = str(config["store_path"])
            identity = str(settings["store"]["identity"])
        opened = open_store(run, place, identity, store)
        if sae.d_model != opened.d_model:
            raise StoreError(
                f"the SAE of {run} is of rows of width {sae.d_model}, those of {opened.name} have "
                f"{opened.d_model}; restore it"
            )
        return cls(
            run=run,
            config=config,
            store=opened,
            sae=sae,
            digest=digest,
            layer=layer,
            policy=policy,
        )

    def beside(self, run: str) -> Subject:
        """Another run on the same store, to compare with.

        Raises:
            SettingError: `run` is this run.
            StoreError: `run` is missing, unfinished, or of another store.
        """
        if Path(run).resolve() == self.run.resolve():
            raise SettingError(f"{run} is the run itself; name another one to compare it with")
        try:
            return Subject.open(Path(run), self.store.name, self.device)
        except MismatchError as error:
            raise StoreError(
                f"{run} is of another store than {self.run}, {self.store.name}: "
                "runs are compared on the same rows"
            ) from error

    def on(self, place: str) -> Subject:
        """The same SAE on all of another text's store, of the same model.

        Raises:
            StoreError: there is no store, or it lacks the layer.
            MismatchError: it is of another model.
        """
        store = Store.open(place_of(place))
        unequal = {}
        for key in ("weights", "tokenizer"):
            mine = self.store.manifest["model"][key]
            if store.manifest["model"][key] != mine:
                unequal[key] = (mine, store.manifest["model"][key])
        if unequal:
            raise MismatchError(f"store {store.name}", unequal, "Harvest it with the run's model.")
        require_complete(store, self.layer)
        return replace(self, store=store, whole=True)

    @property
    def device(self) -> torch.device:
        return self.sae.b_dec.device

    def model_path(self, asked: str | None) -> str:
        """Where the language model is: as asked, else as the store's manifest records it."""
        recorded = str(self.store.manifest["model"]["id"])
        return asked or (EMBEDDED if recorded == "tiny" else recorded)

    @cached_property
    def moments(self) -> Moments:
        """Mean and variance of the training rows, as training used them."""
        require_complete(self.store, self.layer)
        return statistics.of_training(self.store, self.layer, self.policy).moments

    @cached_property
    def mean(self) -> Tensor:
        """(d,) float64 mean of the training rows."""
        return torch.from_numpy(self.moments.mean).to(self.device)

    def about_mean(self, rows: Tensor) -> Tensor:
        """(n,) float64 |x - mu|^2 of raw rows x (n, d): what variance explained is a share of."""
        return (rows.double() - self.mean).square().sum(1)

    def rows(self, limit: int) -> Iterator[Unit]:
        """The held-out rows in whole units, until there were at least `limit` rows.

        Of a store that is `whole`, all rows.
        """
        read = 0
        for number in range(self.store.units) if self.whole else held_out_units(self.store):
            unit = self.unit(number)
            yield unit
            read += len(unit.rows)
            if read >= limit:
                return

    def firings(self, limit: int, kinds: Sequence[int] | None = None) -> Iterator[Firings]:
        """Where latents fire in the rows that `rows` yields; BOS rows are never encoded.

        Args:
            limit: see `rows`.
            kinds: of the rows to encode; by default those that the run's policy keeps.
        """
        for unit in self.rows(limit):
            rows = self.text_rows(unit, kinds)
            latent, row, value = (column.cpu().numpy() for column in self.pairs(unit, rows))
            yield Firings(unit, rows, latent, rows[row], value)

    def pairs(self, unit: Unit, rows: NDArray[np.int64]) -> Pairs:
        """What fires in some rows of a unit; `Pairs.row` counts from 0 in `rows`."""
        return positive(taken(self.encoded(unit), torch.from_numpy(rows).to(self.device)))

    def encoded(self, unit: Unit) -> Kept:
        """The kept latents of all of a unit's rows.

        They are kept on the disk for the command's other passes, and for the next command after a
        stop, where that is much faster than to encode the unit again.
        """
        return encode(self.sae, unit, self.encodings(self.sae, "own"))

    def encodings(self, sae: SAE, name: str) -> Parts:
        """Where encodings of this layer's units by `sae` are kept, if that is worth it.

        Args:
            name: tells `sae` from others, given this run.
        """
        is_slow = 2 * self.store.unit_tokens * sae.d_model * sae.d_sae > SLOW_UNIT
        if sae.b_dec.is_cuda or not is_slow:
            return NOWHERE
        follows = {"sae": self.digest, "store": self.store.identity, "layer": self.layer}
        return self.parts("encoded", {"version": ENCODED_VERSION, "name": name, **follows})

    def parts(self, name: str, key: Mapping[str, Any]) -> Parts:
        """Parts of a result that follows from `key`, in RUN/studies/kept; see `forget`.

        Args:
            key: everything that they follow from, with the version of the code that makes them.
        """
        folder = kept.folder_of(self.run, name, key)
        self._opened.add(folder)
        return Parts(folder)

    @cached_property
    def _opened(self) -> set[Path]:
        return set()

    def forget(self) -> None:
        """Remove the parts that were made or read: what they were for is whole."""
        for folder in self._opened:
            Parts(folder).remove()

    def text_rows(self, unit: Unit, kinds: Sequence[int] | None = None) -> NDArray[np.int64]:
        """The unit's rows that `firings` encodes, in the order of the text."""
        kinds = self.policy.kinds if kinds is None else kinds
        return unit.text_order(unit.of_kinds(kinds) & (unit.kind != BOS))

    def unit(self, number: int) -> Unit:
        """Unit `number`, held out or not."""
        kind = self.policy.kinds_of(self.store, self.layer, number)
        finite = np.flatnonzero(kind != NON_FINITE)
        local = self.store.permutation(number)[finite]
        bits = torch.from_numpy(self.store.residuals(self.layer, number)[finite])
        starts = self.store.piece_starts(number).ravel()
        index = np.arange(len(starts))
        since_bos = index - np.maximum.accumulate(np.where(starts, index, 0))
        return Unit(
            number=number,
            rows=bits.view(torch.bfloat16).to(self.device).float(),
            local=local,
            document=self.store.document(number).ravel()[local],
            position=since_bos[local],
            norm=self.store.norms(self.layer, number)[finite],
            kind=kind[finite],
        )
