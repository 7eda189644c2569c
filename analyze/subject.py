"""What a study measures: a finished run's SAE, and the held-out rows of the run's store.

`Subject.rows` yields the held-out rows unit by unit. `Subject.firings` also encodes them.

Shapes: n rows of a unit, d the width that is read, d_out the width that is written, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.analyze import kept
from residual_saes.analyze.latents.encoding import Firings, Pairs, Unit, encode, positive, taken
from residual_saes.analyze.parts import NOWHERE, Parts
from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.foreign import reading
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.rows import statistics
from residual_saes.data.rows.rounds import KeptRows
from residual_saes.data.rows.source import Source
from residual_saes.data.rows.split import Policy, held_out_units, training_units
from residual_saes.data.site import RESID_POST, HookPoint
from residual_saes.data.store import manifest, model_folder
from residual_saes.data.store.kinds import BOS, NON_FINITE
from residual_saes.data.store.moments import Moments
from residual_saes.data.store.place import Place, place_of
from residual_saes.data.store.store import Store
from residual_saes.train import product
from residual_saes.train.kernels import Kept
from residual_saes.train.ports import Port, Ports, recorded_ports
from residual_saes.train.run import CONFIG, read_config, sae_of, ways_in
from residual_saes.train.sae import SAE
from residual_saes.train.ways import PRODUCT

# Operations of encoding a unit on a CPU from which its latents are kept: 20 s of a core.
SLOW_UNIT = 1e12
ENCODED_VERSION = 1  # of those: raise it when the same rows give other ones


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
    place = place_of(store) if store else _found(run, recorded_place)
    if store is None and not manifest.exists(place):
        raise StoreError(
            f"the store of {run} was at {place.name} and is not there now; give its place as store="
        )
    opened = Store.open(place)
    if opened.identity != identity:
        unequal = {"store": (identity, opened.identity)}
        raise MismatchError(f"run {run}", unequal, "Give the store it was trained from as store=.")
    return opened


def _found(run: Path, recorded: str) -> Place:
    """The place of a run's store; a relative one is from where training began, above the run."""
    place = place_of(recorded)
    above = [] if "://" in recorded else [*run.resolve().parents][:4]
    for folder in above if not manifest.exists(place) else []:
        if manifest.exists(place_of(folder / recorded)):
            return place_of(folder / recorded)
    return place


def recorded_stores(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Place and identity of each store of a run, as its config.yaml has them."""
    of_store = config["settings"]["store"]
    places = config.get("store_paths", [config["store_path"]])
    identities = of_store.get("identities", [of_store["identity"]])
    pairs = zip(places, identities, strict=True)
    return [(str(place), str(identity)) for place, identity in pairs]


def places_of(store: Any) -> list[str] | None:
    """The stores that store= names: one, or a list of both that a crosscoder reads."""
    if not store:
        return None
    return [str(place) for place in store] if isinstance(store, list | tuple) else [str(store)]


def open_stores(
    run: Path, recorded: Sequence[tuple[str, str]], asked: Sequence[str] | str | None
) -> tuple[Store, ...]:
    """The stores that a run was trained from, in their order.

    Args:
        recorded: see `recorded_stores`.
        asked: where they are now, if they have moved since.

    Raises:
        SettingError: another number of stores is given.
        StoreError, MismatchError: see `open_store`.
    """
    named = [asked] if isinstance(asked, str) else asked
    if named is not None:
        require_each(run, named, recorded)
    opened = []
    for number, (place, identity) in enumerate(recorded):
        opened.append(open_store(run, place, identity, named[number] if named else None))
    return tuple(opened)


def place_of_writes(ports: Ports) -> int | str:
    """What is written, in records and files: the layer where that is resid_post, else names."""
    if len(ports.writes) == 1 and not ports.writes[0].store:
        return ports.writes[0].point.recorded
    return "+".join(port.name.replace("/", "_") for port in ports.writes)


def require_each(run: Path, named: Sequence[str], recorded: Sequence[Any]) -> None:
    """Raise SettingError unless as many stores are named as a run was trained from."""
    if len(named) != len(recorded):
        raise SettingError(
            f"store={','.join(named)} names {len(named)}, and {run} was trained from "
            f"{len(recorded)}: give each in its order, as store=[A,B] where there are two"
        )


@dataclass(frozen=True)
class Subject:
    """A trained dictionary with everything that its figures depend on.

    It is an SAE, a transcoder or a crosscoder: `ports` says which hook points it reads and which it
    writes (train/ports.py). `Unit.rows` are what it reads and `Unit.targets` what it writes, each
    with the hook points side by side; of an SAE they are the same tensor.
    """

    run: Path
    config: dict[str, Any]  # config.yaml of the run
    stores: tuple[Store, ...]  # by their number in a `Port`; as a rule one
    sae: SAE  # on raw rows
    digest: str  # of the SAE's file. Results carry it.
    ports: Ports
    policy: Policy
    # Whether `rows` gives every unit, not only held-out ones: of a store that was never trained on.
    whole: bool = False

    @classmethod
    def open(cls, run: Path, store: Sequence[str] | str | None, device: torch.device) -> Subject:
        """The subject of a finished run.

        Args:
            store: where the store is now, if it has moved since; of two stores both.

        Raises:
            StoreError: the run is missing, unfinished or damaged, or its store is missing.
            MismatchError: the store at that place is another one.
            SettingError: `store` has another number of stores than the run.
        """
        config = read_config(run)
        sae, digest = sae_of(run, device)
        # As training encoded, where this machine can. Nothing is measured here: a study that is
        # stopped and goes on must come out the same.
        way = ways_in(config["environment"]).get(PRODUCT)
        if way in product.ways(device.type):
            sae = replace(sae, by=way)
        way_out = "restore it, or choose another run="
        with reading(f"{run / CONFIG} is not what training wrote", way_out):
            ports = recorded_ports(config["settings"])
            policy = Policy.of(config["settings"]["policy"])
            recorded = recorded_stores(config)
        stores = open_stores(run, recorded, store)
        subject = cls(run, config, stores, sae, digest, ports, policy)
        for what, mine, their in (
            ("reads", sae.d_model, subject.sources(ports.reads)),
            ("writes", sae.d_out, subject.sources(ports.writes)),
        ):
            width = sum(source.width for source in their)
            if mine != width:
                raise StoreError(
                    f"the {subject.noun} of {run} {what} rows of width {mine}, those of "
                    f"{stores[0].name} have {width}; restore it"
                )
        return subject

    def beside(self, run: str) -> Subject:
        """Another run on the same store, to compare with.

        Raises:
            SettingError: `run` is this run.
            StoreError: `run` is missing, unfinished, or of another store.
        """
        if Path(run).resolve() == self.run.resolve():
            raise SettingError(f"{run} is the run itself; name another one to compare it with")
        try:
            return Subject.open(Path(run), [store.name for store in self.stores], self.device)
        except (MismatchError, SettingError) as error:
            names = ", ".join(store.name for store in self.stores)
            raise StoreError(
                f"{run} is of another store than {self.run}, {names}: "
                "runs are compared on the same rows"
            ) from error

    def on(self, place: str) -> Subject:
        """The same SAE on all of another text's store, of the same model.

        Raises:
            SettingError: it is of two stores.
            StoreError: there is no store, or it lacks a hook point.
            MismatchError: it is of another model.
        """
        if len(self.stores) > 1:
            raise SettingError(
                f"{self.run} reads two stores, and {place} is one; a crosscoder of one store can "
                "be put on another text"
            )
        store = Store.open(place_of(place))
        unequal = {}
        for key in ("weights", "tokenizer"):
            mine = self.store.manifest["model"][key]
            if store.manifest["model"][key] != mine:
                unequal[key] = (mine, store.manifest["model"][key])
        if unequal:
            raise MismatchError(f"store {store.name}", unequal, "Harvest it with the run's model.")
        moved = replace(self, stores=(store,), whole=True)
        moved.require_complete()
        return moved

    @property
    def device(self) -> torch.device:
        return self.sae.b_dec.device

    # -- what it reads and writes ------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """Its only store, or the first: tokens, documents and units are the same in both."""
        return self.stores[0]

    @property
    def noun(self) -> str:
        """What messages and pages call it: SAE, transcoder or crosscoder."""
        if not self.ports.is_autoencoder:
            return "transcoder"
        return "SAE" if len(self.ports.writes) == 1 else "crosscoder"

    @property
    def is_sae(self) -> bool:
        """Whether it writes the one hook point that it reads."""
        return self.noun == "SAE"

    @property
    def point(self) -> HookPoint | None:
        """The hook point that it reads; None of a crosscoder, which reads several."""
        return self.ports.reads[0].point if len(self.ports.reads) == 1 else None

    @property
    def target(self) -> HookPoint | None:
        """The hook point that it writes; None of a crosscoder, which writes several."""
        return self.ports.writes[0].point if len(self.ports.writes) == 1 else None

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """All hook points that it reads, in the order of `states`."""
        return tuple(port.point for port in self.ports.reads)

    @property
    def only_layer(self) -> int | None:
        """The layer of all its hook points; None if they are of several."""
        layers = {port.point.layer for port in self.ports.every}
        return layers.pop() if len(layers) == 1 else None

    @property
    def layer(self) -> int:
        """The same.

        Raises:
            SettingError: they are of several layers.
        """
        if self.only_layer is None:
            raise SettingError(
                f"the crosscoder of {self.run} is of {self.where}; give the run of one layer"
            )
        return self.only_layer

    @property
    def place(self) -> int | str:
        """See `place_of_writes`."""
        return place_of_writes(self.ports)

    @property
    def where(self) -> str:
        """Its hook points in words, such as `layer 21` or `mlp_in of layer 21 to mlp_out ...`."""
        reads = " and ".join(map(str, self.ports.reads))
        if self.ports.is_autoencoder:
            return reads
        return f"{reads} to {' and '.join(map(str, self.ports.writes))}"

    @property
    def label(self) -> str:
        """Its hook points in names of files: `L21`, `mlp_out_21`, `mlp_in_21-mlp_out_21`."""
        if self.is_resid_post:
            return f"L{self.layer}"
        return "-".join(port.name.replace("/", "_") for port in self.ports.every)

    @property
    def is_resid_post(self) -> bool:
        """Whether it is an SAE of a layer's output."""
        return self.is_sae and self.ports.reads[0].point.site == RESID_POST

    @property
    def recorded(self) -> dict[str, Any]:
        """What results follow from: its layer; of anything but an SAE of resid_post its ports."""
        if self.is_resid_post:
            return {"layer": self.layer, "store": self.store.identity}
        return {
            "reads": [port.name for port in self.ports.reads],
            "writes": [port.name for port in self.ports.writes],
            "store": self.store.identity,
            **{f"store_{i}": store.identity for i, store in enumerate(self.stores) if i},
        }

    def sources(self, ports: Sequence[Port]) -> list[Source]:
        """Where the rows of some ports are."""
        return [Source(self.stores[port.store], port.point) for port in ports]

    def columns(self, port: Port) -> slice:
        """A written port's columns in `Unit.targets`, W_dec and b_dec."""
        widths = [source.width for source in self.sources(self.ports.writes)]
        number = self.ports.writes.index(port)
        start = sum(widths[:number])
        return slice(start, start + widths[number])

    @cached_property
    def scales(self) -> dict[str, float]:
        """By the name of a written port of a crosscoder: its scale over that of the latents.

        Training scales each hook point by itself. Multiplied by these, the columns of W_dec have
        norm 1 together in each latent, and no target counts for more than another because its rows
        are longer. A single target has 1.

        Raises:
            StoreError: config.yaml lacks the scales.
        """
        names = [port.name for port in self.ports.writes]
        if len(names) == 1:
            return dict.fromkeys(names, 1.0)
        way_out = "restore it, or choose another run="
        with reading(f"{self.run / CONFIG} is not what training wrote", way_out):
            scales = {name: float(self.config["scales"][name]) for name in names}
            mean = math.exp(sum(map(math.log, scales.values())) / len(names))
        return {name: scale / mean for name, scale in scales.items()}

    def read_columns(self, ports: Sequence[Port]) -> list[int]:
        """The columns of `Unit.rows` that some of its read ports have."""
        columns: list[int] = []
        start = 0
        of_port = {}
        for port, source in zip(self.ports.reads, self.sources(self.ports.reads), strict=True):
            of_port[port] = range(start, start + source.width)
            start += source.width
        for port in ports:
            columns += of_port[port]
        return columns

    def states(self, taken: Mapping[HookPoint, Tensor]) -> Tensor:
        """(t, d) float32 rows that it reads, of a language model's states (t, width) by point."""
        rows = [taken[point].float() for point in self.points]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)

    def scaled(self, targets: Tensor) -> Tensor:
        """Written rows or directions (..., d_out), each port's columns times its `scales`."""
        if len(self.ports.writes) == 1:
            return targets
        factors = targets.new_empty(targets.shape[-1])
        for port in self.ports.writes:
            factors[self.columns(port)] = self.scales[port.name]
        return targets * factors

    def decoder_norms(self) -> Tensor:
        """(F, written ports) norm of each latent's direction at each target, in scaled rows.

        Of a crosscoder, a latent is shared by targets where its norms are alike, and one target's
        own where the others' are near 0 (Lindsey et al., "Sparse Crosscoders", 2024: relative
        decoder norms).
        """
        scaled = self.scaled(self.sae.W_dec)
        norms = [scaled[:, self.columns(port)].norm(dim=1) for port in self.ports.writes]
        return torch.stack(norms, 1)

    # -- rows --------------------------------------------------------------------------------------

    def model_path(self, asked: str | None, store: int = 0) -> str:
        """Where the language model is: as asked, else as the store's manifest records it.

        Args:
            store: the number of the store.
        """
        if asked:
            return asked
        source = self.stores[store]
        recorded = model_folder.recalled(source.place, source.manifest)
        return EMBEDDED if recorded == "tiny" else recorded

    def require_complete(self) -> None:
        """Raise StoreError unless the stores have every unit of its hook points."""
        for source in self.sources(self.ports.every):
            source.require_complete()

    def moments_of(self, policy: Policy) -> Moments:
        """Mean and variance of the training rows that are written and that a policy keeps."""
        self.require_complete()
        kept = KeptRows(self.sources(self.ports.every), policy)
        found = statistics.of_kept(kept, training_units(self.store))
        of_port = dict(zip(self.ports.every, found, strict=True))
        return _together([of_port[port].moments for port in self.ports.writes])

    @cached_property
    def moments(self) -> Moments:
        """Mean and variance (d_out,) of the training rows that are written, as training used
        them.
        """
        return self.moments_of(self.policy)

    @cached_property
    def mean(self) -> Tensor:
        """(d_out,) float64 mean of the training rows that are written."""
        return torch.from_numpy(self.moments.mean).to(self.device)

    def about_mean(self, targets: Tensor) -> Tensor:
        """(n,) float64 |y - mu|^2 of raw rows y (n, d_out), those of a crosscoder scaled.

        Variance explained is a share of it.
        """
        return self.scaled(targets.double() - self.mean).square().sum(1)

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
        """Where encodings of what it reads by `sae` are kept, if that is worth it.

        Args:
            name: tells `sae` from others, given this run.
        """
        is_slow = 2 * self.store.unit_tokens * sae.d_model * sae.d_sae > SLOW_UNIT
        if sae.b_dec.is_cuda or not is_slow:
            return NOWHERE
        follows = {"sae": self.digest, **self.recorded}
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

    def kinds_of(self, number: int, policy: Policy | None = None) -> NDArray[np.uint8]:
        """(n,) the kind of each of a unit's rows, as `Policy.kinds_of` has it.

        A row of several hook points is what the least usual of them is.
        """
        policy = policy or self.policy
        return policy.kinds_in(self.sources(self.ports.every), number)

    def norms_of(self, number: int) -> NDArray[np.float32]:
        """(n,) norm of each of a unit's rows as they are written; of a crosscoder scaled."""
        sources = self.sources(self.ports.writes)
        norms = [source.norms(number) for source in sources]
        if len(norms) == 1:
            return norms[0]
        scaled = np.stack(norms, 1) * list(self.scales.values())
        lengths: NDArray[np.float32] = np.linalg.norm(scaled, axis=1).astype(np.float32)
        return lengths

    def unit(self, number: int) -> Unit:
        """Unit `number`, held out or not."""
        kind = self.kinds_of(number)
        finite = np.flatnonzero(kind != NON_FINITE)
        local = self.store.permutation(number)[finite]
        read = self._rows_of(self.ports.reads, number, finite)
        written = read
        if not self.ports.is_autoencoder:
            written = self._rows_of(self.ports.writes, number, finite)
        starts = self.store.piece_starts(number).ravel()
        index = np.arange(len(starts))
        since_bos = index - np.maximum.accumulate(np.where(starts, index, 0))
        return Unit(
            number=number,
            rows=read,
            targets=written,
            local=local,
            document=self.store.document(number).ravel()[local],
            position=since_bos[local],
            norm=self.norms_of(number)[finite],
            kind=kind[finite],
        )

    def _rows_of(self, ports: Sequence[Port], number: int, chosen: NDArray[np.int64]) -> Tensor:
        """(chosen, sum of widths) float32 rows of a unit at some ports, side by side."""
        parts = []
        for source in self.sources(ports):
            bits = torch.from_numpy(source.rows(number)[chosen])
            parts.append(bits.view(torch.bfloat16).to(self.device).float())
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _together(parts: Sequence[Moments]) -> Moments:
    """Moments of rows that stand side by side."""
    if len(parts) == 1:
        return parts[0]
    columns = [(part.mean, part.m2) for part in parts]
    mean, m2 = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Moments(parts[0].count, mean, m2)
