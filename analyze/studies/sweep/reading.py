"""The squared errors of a sweep's arms on the held-out rows, in as few readings as memory allows.

Shapes: n rows, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.analyze.latents.encoding import Unit
from residual_saes.analyze.reconstruction import BATCH_ROWS
from residual_saes.analyze.stats import sums_by
from residual_saes.analyze.studies.sweep.arms import Arm
from residual_saes.analyze.subject import Subject
from residual_saes.data.device import free_bytes
from residual_saes.data.errors import StoreError
from residual_saes.data.journal import Progress
from residual_saes.data.rows.split import Policy, held_out_units
from residual_saes.data.rows.statistics import Tally
from residual_saes.data.store.store import Store
from residual_saes.train import sae_file
from residual_saes.train.ports import Ports
from residual_saes.train.sae import SAE

_MEMORY_SHARE = 0.5  # of the free memory, for the SAEs that are measured in one reading
_MEMORY_UNKNOWN = 4 << 30  # bytes, where the system does not report free memory


@dataclass(frozen=True)
class Measured:
    """Sums over the held-out rows of each document."""

    rows: int
    about_mean: NDArray[np.float64]  # (D,) |x - mu|^2
    squared_error: dict[str, NDArray[np.float64]]  # (D,) |e|^2, by the arm's name
    left_out: dict[str, dict[str, float]] = field(default_factory=dict)  # see `Tally.left_out`
    width: int = 1  # of a row


def measure(
    arms: Sequence[Arm],
    damaged: dict[str, str],
    stores: tuple[Store, ...],
    policy: Policy,
    limit: int,
    device: torch.device,
) -> Measured | None:
    """Read each held-out unit once for as many arms as fit into memory, as a rule all of them.

    Arms whose SAE cannot be read, or reconstructs no finite rows, are added to `damaged`. None if
    no arm's SAE can be read.
    """
    # Rows are kept or left out by all that any arm reads, so that all have the same rows.
    reads = tuple(dict.fromkeys(port for arm in arms for port in arm.ports.reads))
    measured: Measured | None = None
    squared_error: dict[str, NDArray[np.float64]] = {}
    budget = int((free_bytes(device) or _MEMORY_UNKNOWN) * _MEMORY_SHARE)
    for group in groups(arms, budget):
        saes = dict(_load(group, damaged, stores, device))
        if not saes:
            continue
        readable = [arm for arm in group if arm.name in saes]
        arm = readable[0]
        # With the policy of all arms, they also share the mean that variance is about.
        ports = Ports(reads, arm.ports.writes)
        sae = saes[arm.name]
        subject = Subject(arm.run, dict(arm.config), stores, sae, arm.sae or "", ports, policy)
        columns = {}
        for one in readable:
            if one.ports.reads != reads:
                columns[one.name] = subject.read_columns(one.ports.reads)
        measured = _read(subject, saes, columns, limit)
        for name, error in measured.squared_error.items():
            if np.isfinite(error).all():
                squared_error[name] = error
            else:
                damaged[name] = (
                    f"the reconstruction of {name} is not finite: {sae_file.FILE} is damaged, "
                    "or training diverged"
                )
    return measured and replace(measured, squared_error=squared_error)


def _load(
    arms: Sequence[Arm], damaged: dict[str, str], stores: Sequence[Store], device: torch.device
) -> Iterator[tuple[str, SAE]]:
    for arm in arms:
        path = arm.run / sae_file.FILE
        try:
            loaded = sae_file.load(path, device)
            shape = (loaded.d_model, loaded.d_out, loaded.d_sae)
            d_in, d_out = (
                sum(stores[port.store].d_model for port in ports)
                for ports in (arm.ports.reads, arm.ports.writes)
            )
            wanted = (d_in, d_out, arm.settings.get("sae.d_sae"))
            if shape != wanted:
                raise StoreError(
                    f"{path} has widths and latents {shape}, the store and config.yaml say {wanted}"
                )
        except StoreError as error:
            damaged[arm.name] = str(error)
        else:
            yield arm.name, loaded


def groups(arms: Sequence[Arm], budget: int) -> Iterator[list[Arm]]:
    """Arms in order, as many at a time as `budget` bytes hold, and at least one."""
    group: list[Arm] = []
    used = 0
    for arm in arms:
        size = (arm.run / sae_file.FILE).stat().st_size  # float32, as in memory
        if group and used + size > budget:
            yield group
            group = []
            used = 0
        group.append(arm)
        used += size
    if group:
        yield group


def _read(
    subject: Subject, saes: Mapping[str, SAE], columns: Mapping[str, list[int]], limit: int
) -> Measured:
    """One reading of the held-out units. Only the sums of each document are kept.

    Args:
        columns: by arm, those of the rows that it reads, where it does not read all.
    """
    rows = 0
    documents: list[NDArray[np.uint32]] = []
    sums: list[list[NDArray[np.float64]]] = []  # unit by unit: |x - mu|^2, then |e|^2 of each SAE
    units = len(held_out_units(subject.store))
    said = " and ".join(map(str, subject.ports.writes))
    progress = Progress()
    tally = Tally()
    for unit in subject.rows(limit):
        tally.add(unit.kind, np.square(unit.norm, dtype=np.float64))
        chosen = np.flatnonzero(unit.of_kinds(subject.policy.kinds))
        if len(chosen):
            document = unit.document[chosen]
            documents.append(np.unique(document))
            sums.append(sums_by(document, *_squares(subject, saes, columns, unit, chosen)))
            rows += len(chosen)
        count = len(sums)
        progress.show(
            f"{said}: held-out unit {count}/{units} for {len(saes)} arms",
            last=count == units,
        )
    if not sums:
        raise StoreError(
            f"no held-out row of {subject.store.name} passes the runs' policy {subject.policy}"
        )
    # A document that goes on in the next unit has sums in both.
    whole = [np.concatenate(column) for column in zip(*sums, strict=True)]
    about_mean, *errors = sums_by(np.concatenate(documents), *whole)
    by_name = dict(zip(saes, errors, strict=True))
    left_out = tally.left_out(subject.policy)
    return Measured(rows, about_mean, by_name, left_out, subject.sae.d_out)


def _squares(
    subject: Subject,
    saes: Mapping[str, SAE],
    read: Mapping[str, list[int]],
    unit: Unit,
    chosen: NDArray[np.int64],
) -> list[NDArray[np.float64]]:
    """(n,) each: |x - mu|^2 of the chosen rows, then |x - x_hat|^2 of each SAE."""
    columns: list[list[NDArray[np.float64]]] = [[] for _ in range(1 + len(saes))]
    for start in range(0, len(chosen), BATCH_ROWS):
        batch = torch.from_numpy(chosen[start : start + BATCH_ROWS]).to(subject.device)
        rows = unit.rows[batch]
        x = unit.targets[batch].double()
        columns[0].append(subject.about_mean(x).cpu().numpy())
        for column, (name, sae) in zip(columns[1:], saes.items(), strict=True):
            own = rows[:, read[name]] if name in read else rows
            error = subject.scaled(x - sae(own).double())
            column.append(error.square().sum(1).cpu().numpy())
    return [np.concatenate(column) for column in columns]
