"""What a study looks at: a finished run's SAE, and the held-out rows of the store that it was
trained from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data import durable
from data.errors import MismatchError, SettingError, StoreError
from data.rows import split, summary
from data.rows.split import Policy, held_out_units, require_complete
from data.store import manifest
from data.store.kinds import NON_FINITE
from data.store.moments import Moments
from data.store.place import place_of
from data.store.store import Store
from harvest.model_folder import EMBEDDED
from train import sae, sae_file
from train.run import read_config


class Unit(NamedTuple):
    """All finite rows of one held-out unit, BOS and outliers too, in stored order."""

    number: int
    rows: torch.Tensor  # (n, d) float32, raw
    local: NDArray[np.int64]  # (n,) each row's token, as flat position in the unit's spine
    document: NDArray[np.uint32]  # (n,)
    position: NDArray[np.int64]  # (n,) tokens since its piece's BOS, which is 0
    norm: NDArray[np.float32]  # (n,)
    kind: NDArray[np.uint8]  # (n,) see data/store/kinds.py


def open_store(run: Path, was_at: str, identity: str, store: str | None) -> Store:
    """The store that a run was trained from.

    Args:
        was_at: its place then.
        identity: its digest then.
        store: its place now, if it has moved since.

    Raises:
        StoreError: it is not there.
        MismatchError: the store at that place is another one.
    """
    place = place_of(store or was_at)
    if store is None and not manifest.exists(place):
        raise StoreError(
            f"the store of {run} was at {place.name} and is not there now; give its place as store="
        )
    opened = Store.open(place)
    if opened.identity != identity:
        was_is = {"store": (identity, opened.identity)}
        raise MismatchError(f"run {run}", was_is, "Give the store it was trained from as store=.")
    return opened


@dataclass(frozen=True)
class Subject:
    """A trained SAE with everything that its figures depend on."""

    run: Path
    config: dict[str, Any]  # config.yaml of the run
    store: Store
    sae: sae.SAE  # on raw rows
    layer: int
    policy: Policy

    @classmethod
    def open(cls, run: Path, store: str | None, device: torch.device) -> Subject:
        """The subject of a finished run.

        Args:
            store: where the store is now, if it has moved since.

        Raises:
            StoreError: the run is missing or unfinished, or its store is not there.
            MismatchError: the store at that place is another one.
        """
        config = read_config(run)
        if not (run / sae_file.FILE).is_file():
            raise StoreError(
                f"run {run} is not finished: {sae_file.FILE} is missing; run its `python -m train` again"
            )
        settings = config["settings"]
        opened = open_store(run, str(config["store_path"]), settings["store"]["identity"], store)
        policy = Policy(**settings["policy"])
        return cls(
            run,
            config,
            opened,
            sae_file.load(run / sae_file.FILE, device),
            settings["layer"],
            policy,
        )

    def beside(self, run: str) -> Subject:
        """Another run on the same store, to compare with.

        Raises:
            SettingError: it is this one.
            StoreError: it is missing, unfinished, or of another store.
        """
        if Path(run).resolve() == self.run.resolve():
            raise SettingError(f"{run} is the run itself; name another one to compare it with")
        try:
            return Subject.open(Path(run), self.store.name, self.device)
        except MismatchError as error:
            raise StoreError(
                f"{run} is of another store than {self.run}, {self.store.name}: runs are compared on the same rows"
            ) from error

    @property
    def device(self) -> torch.device:
        return self.sae.b_dec.device

    @cached_property
    def digest(self) -> str:
        """Of the SAE's file: what studies are told apart by."""
        return durable.digest_file(self.run / sae_file.FILE).xxh3_128

    def model_path(self, asked: str | None) -> str:
        """Where the language model is: as asked, else where the store's own record leads."""
        recorded = str(self.store.manifest["model"]["id"])
        return asked or (EMBEDDED if recorded == "tiny" else recorded)

    @cached_property
    def moments(self) -> Moments:
        """The training rows' mean and variance, as training used them."""
        require_complete(self.store, self.layer)
        return summary.read(self.store, self.layer).of(split.TRAINING, self.policy.kinds)

    def held_out(self, limit: int) -> Iterator[Unit]:
        """Held-out units, until at least `limit` rows were given."""
        given = 0
        for number in held_out_units(self.store):
            unit = self.unit(number)
            yield unit
            given += len(unit.rows)
            if given >= limit:
                return

    def unit(self, number: int) -> Unit:
        """Unit `number`, held out or not."""
        kind = self.store.kinds(self.layer, number)
        finite = np.flatnonzero(kind != NON_FINITE)
        local = self.store.permutation(number)[finite]
        bits = torch.from_numpy(self.store.residuals(self.layer, number)[finite])
        starts = self.store.piece_starts(number).ravel()
        at = np.arange(len(starts))
        since = at - np.maximum.accumulate(np.where(starts, at, 0))
        return Unit(
            number=number,
            rows=bits.view(torch.bfloat16).to(self.device).float(),
            local=local,
            document=self.store.document(number).ravel()[local],
            position=since[local],
            norm=self.store.norms(self.layer, number)[finite],
            kind=kind[finite],
        )
