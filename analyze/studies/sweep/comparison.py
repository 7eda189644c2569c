"""Which arm of a sweep is best on held-out rows, and which arms cannot be told from the best.

All arms of a layer read the same held-out rows: those that every arm's policy keeps. E_a and T are
sums over the rows of each document: E_a of |e_a|^2, the squared error of arm a, and T of
|x - mu|^2. w is how often each document was drawn.

    variance explained of a      1 - (w . E_a) / (w . T)
    behind the best arm b        (w . (E_a - E_b)) / (w . T)

The difference is paired: what makes a document hard for all arms cancels.

Intervals are percentiles over resampled documents. All arms have the same draws, those of
`analyze.stats`. The best arm has the largest variance explained on all documents. The share of
resamples in which an arm is first says how sure its place is.

Shapes: D documents, A arms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analyze.stats import sums_by
from analyze.studies.quality import BATCH_ROWS
from analyze.studies.sweep.arms import SEEDS, Arm, common_folder, exact, varying
from analyze.subject import Subject, Unit, open_store
from data import durable
from data.device import free_bytes
from data.errors import StoreError
from data.journal import Progress
from data.rows.split import Policy, held_out_units
from data.store.store import Store
from train import sae_file
from train.sae import SAE

_DRAWS = 1000
_TIE = 1e-12  # of variance explained: arms nearer than this are first together
_MEMORY_SHARE = 0.5  # of the free memory, for the SAEs that are measured in one reading
_MEMORY_UNKNOWN = 4 << 30  # bytes, where the system does not report free memory
_RECORDED = ("variance_explained", "mse", "dead_share", "coverage", "l0")  # by training
_COMPARED = ("variance_explained_95", "behind_best", "behind_best_95", "first_share")


@dataclass(frozen=True)
class Measured:
    """Sums over the held-out rows of each document."""

    rows: int
    about_mean: NDArray[np.float64]  # (D,) |x - mu|^2
    squared_error: dict[str, NDArray[np.float64]]  # (D,) |e|^2, by the arm's name


class Standing(NamedTuple):
    """One arm's figures beside the best arm's."""

    variance_explained: float
    interval: list[float]  # low, high
    behind: float  # by how much the best arm explains more
    behind_interval: list[float]
    first_share: float  # of the resamples in which the arm is first


def sweep(
    arms: Sequence[Arm],
    damaged: dict[str, str],
    store: str | None,
    limit: int,
    device: torch.device,
) -> dict[str, Any]:
    """Every figure, as plain JSON; each layer's arms in order, the best first.

    Args:
        damaged: the error of each arm that could not be read, by name. Arms whose SAE turns out to
            be damaged are added.
        store: where the store is now, if it has moved since.
        limit: held-out rows to measure on, in whole units.
    """
    finished = [arm for arm in arms if arm.finished]
    opened = None
    if finished:
        first = finished[0]
        opened = open_store(first.run, first.store_path, first.identity, store)
    keys = varying(arms)
    layers = []
    for number in sorted({arm.layer for arm in arms}):
        here = [arm for arm in arms if arm.layer == number]
        layer = _layer(here, damaged, opened, keys, limit, device)
        if layer["arms"]:
            layers.append(layer)
    figures: dict[str, Any] = dict.fromkeys(("folder", "store", "identity", "model"))
    figures |= {"settings": keys, "same_in_all": {}, "layers": layers, "damaged": damaged}
    if arms:
        same = {key: value for key, value in arms[0].settings.items() if key not in keys}
        figures |= {
            "folder": str(common_folder([arm.run for arm in arms]).absolute()),
            "store": opened.name if opened else arms[0].store_path,
            "identity": arms[0].identity,
            "same_in_all": same,
        }
    if opened:
        figures["model"] = opened.manifest["model"]["id"]
    return figures


def _layer(
    arms: Sequence[Arm],
    damaged: dict[str, str],
    store: Store | None,
    keys: Sequence[str],
    limit: int,
    device: torch.device,
) -> dict[str, Any]:
    """The comparison of one layer's arms."""
    # The rows that every arm's policy keeps.
    policy = Policy(
        drop_bos=any(arm.policy.drop_bos for arm in arms),
        drop_outliers=any(arm.policy.drop_outliers for arm in arms),
        drop_tokens=tuple(sorted({token for arm in arms for token in arm.policy.drop_tokens})),
    )
    finished = [arm for arm in arms if arm.finished]
    measured = None
    if store and finished:
        measured = measure(finished, damaged, store, policy, limit, device)
    standings = compare(measured) if measured and measured.squared_error else {}
    figures = []
    for arm in arms:
        if arm.name not in damaged:
            figures.append(_figures(arm, standings.get(arm.name), measured, store, keys))
    figures.sort(key=_rank)
    best = next(iter(standings), None)
    alike = []
    for name, standing in standings.items():
        if name != best and standing.behind_interval[0] <= 0:
            alike.append(name)
    return {
        "layer": arms[0].layer,
        "rows": measured.rows if measured else 0,
        "documents": len(measured.about_mean) if measured else 0,
        **policy.recorded(),
        "one_policy": len({arm.policy for arm in arms}) == 1,
        "best": best,
        "not_distinguishable": alike,
        "seed_spread": seed_spread(figures),
        "arms": figures,
    }


def _rank(arm: dict[str, Any]) -> tuple[bool, float, str]:
    """Sort key: finished arms first, by falling variance explained, equal ones by name."""
    return not arm["finished"], -(arm["variance_explained"] or 0), arm["name"]


def seed_spread(figures: Sequence[dict[str, Any]]) -> float | None:
    """The largest difference of variance explained between arms that differ in their seeds alone.

    None if no two compared arms do.
    """
    groups: dict[str, dict[str, list[float]]] = {}  # by the other settings, then by the seeds
    for arm in figures:
        if arm["variance_explained_95"] is not None:
            seeds = {key: value for key, value in arm["settings"].items() if key in SEEDS}
            others = {key: value for key, value in arm["settings"].items() if key not in SEEDS}
            group = groups.setdefault(exact(others), {})
            group.setdefault(exact(seeds), []).append(arm["variance_explained"])
    spreads = []
    for group in groups.values():
        if len(group) > 1:
            values = np.concatenate(list(group.values()))
            spreads.append(float(values.max() - values.min()))
    return max(spreads, default=None)


def _figures(
    arm: Arm,
    standing: Standing | None,
    measured: Measured | None,
    store: Store | None,
    keys: Sequence[str],
) -> dict[str, Any]:
    """One arm's figures.

    Variance explained and MSE of a finished arm are measured here. The rest is as training recorded
    it.
    """
    last = arm.last_held_out
    figures: dict[str, Any] = {
        "name": arm.name,
        "run": str(arm.run),
        "settings": {key: arm.settings.get(key) for key in keys},
        "finished": arm.finished,
        "sae": durable.digest_file(arm.run / sae_file.FILE).xxh3_128 if arm.finished else None,
        "step": arm.step,
        "steps": arm.steps,
        "tokens": arm.step * int(arm.settings["batch"]),
        "tokens_per_s": arm.tokens_per_s,
        **{key: last.get(key) for key in _RECORDED},
        **dict.fromkeys(_COMPARED),
    }
    if standing and measured and store:
        error = float(measured.squared_error[arm.name].sum())
        figures |= {
            "variance_explained": standing.variance_explained,
            "variance_explained_95": standing.interval,
            "mse": error / measured.rows / store.d_model,
            "behind_best": standing.behind,
            "behind_best_95": standing.behind_interval,
            "first_share": standing.first_share,
        }
    return figures


# -- the pass --------------------------------------------------------------------------------------


def measure(
    arms: Sequence[Arm],
    damaged: dict[str, str],
    store: Store,
    policy: Policy,
    limit: int,
    device: torch.device,
) -> Measured | None:
    """Read each held-out unit once for as many arms as fit into memory, as a rule all of them.

    Arms whose SAE cannot be read, or reconstructs no finite rows, are added to `damaged`. None if
    no arm's SAE can be read.
    """
    measured: Measured | None = None
    squared_error: dict[str, NDArray[np.float64]] = {}
    budget = int((free_bytes(device) or _MEMORY_UNKNOWN) * _MEMORY_SHARE)
    for group in groups(arms, budget):
        saes = dict(_load(group, damaged, store, device))
        if not saes:
            continue
        arm = next(arm for arm in group if arm.name in saes)
        # With the policy of all arms, they also share the mean that variance is about.
        subject = Subject(arm.run, {}, store, saes[arm.name], arm.layer, policy)
        measured = _read(subject, saes, limit)
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
    arms: Sequence[Arm], damaged: dict[str, str], store: Store, device: torch.device
) -> Iterator[tuple[str, SAE]]:
    for arm in arms:
        path = arm.run / sae_file.FILE
        try:
            loaded = sae_file.load(path, device)
            shape = (loaded.d_model, loaded.d_sae)
            wanted = (store.d_model, arm.settings.get("sae.d_sae"))
            if shape != wanted:
                raise StoreError(
                    f"{path} has width and latents {shape}, the store and config.yaml say {wanted}"
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


def _read(subject: Subject, saes: Mapping[str, SAE], limit: int) -> Measured:
    """One reading of the held-out units. Only the sums of each document are kept."""
    rows = 0
    documents: list[NDArray[np.uint32]] = []
    sums: list[list[NDArray[np.float64]]] = []  # unit by unit: |x - mu|^2, then |e|^2 of each SAE
    units = len(held_out_units(subject.store))
    progress = Progress()
    for unit in subject.rows(limit):
        chosen = np.flatnonzero(unit.of_kinds(subject.policy.kinds))
        if len(chosen):
            document = unit.document[chosen]
            documents.append(np.unique(document))
            sums.append(sums_by(document, *_squares(subject, saes, unit, chosen)))
            rows += len(chosen)
        count = len(sums)
        progress.show(
            f"layer {subject.layer}: held-out unit {count}/{units} for {len(saes)} arms",
            last=count == units,
        )
    if not sums:
        raise StoreError(
            f"no held-out row of {subject.store.name} passes the runs' policy {subject.policy}"
        )
    # A document that goes on in the next unit has sums in both.
    columns = [np.concatenate(column) for column in zip(*sums, strict=True)]
    about_mean, *errors = sums_by(np.concatenate(documents), *columns)
    return Measured(rows, about_mean, dict(zip(saes, errors, strict=True)))


def _squares(
    subject: Subject, saes: Mapping[str, SAE], unit: Unit, chosen: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """(n,) each: |x - mu|^2 of the chosen rows, then |x - x_hat|^2 of each SAE."""
    columns: list[list[NDArray[np.float64]]] = [[] for _ in range(1 + len(saes))]
    for start in range(0, len(chosen), BATCH_ROWS):
        batch = torch.from_numpy(chosen[start : start + BATCH_ROWS]).to(subject.device)
        rows = unit.rows[batch]
        x = rows.double()
        columns[0].append(subject.about_mean(x).cpu().numpy())
        for column, sae in zip(columns[1:], saes.values(), strict=True):
            column.append((x - sae(rows).double()).square().sum(1).cpu().numpy())
    return [np.concatenate(column) for column in columns]


# -- the comparison --------------------------------------------------------------------------------


def compare(measured: Measured, draws: int = _DRAWS) -> dict[str, Standing]:
    """Each arm's standing, the best arm first; equal arms by name."""
    total = measured.about_mean.sum()
    unexplained = {}
    for name, error in measured.squared_error.items():
        unexplained[name] = float(error.sum() / total)
    names = sorted(unexplained, key=lambda name: (unexplained[name], name))
    best = measured.squared_error[names[0]]
    # Differences first, then sums: between equal arms the sum is exactly 0.
    behind_sums = np.stack([measured.squared_error[name] - best for name in names])
    best_draws, behind_draws = resample(best, behind_sums, measured.about_mean, draws)
    lead = behind_draws <= behind_draws.min(1, keepdims=True) + _TIE
    first = (lead / lead.sum(1, keepdims=True)).mean(0)
    explained = np.quantile(1 - best_draws[:, None] - behind_draws, [0.025, 0.975], axis=0)
    behind = np.quantile(behind_draws, [0.025, 0.975], axis=0)
    standings = {}
    for i, name in enumerate(names):
        standings[name] = Standing(
            variance_explained=1 - unexplained[name],
            interval=explained[:, i].tolist(),
            behind=float(behind_sums[i].sum() / total),
            behind_interval=behind[:, i].tolist(),
            first_share=float(first[i]),
        )
    return standings


def resample(
    best: NDArray[np.float64],
    behind: NDArray[np.float64],
    total: NDArray[np.float64],
    draws: int,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ratios to `total` over resampled documents: of `best` (draws,), and of `behind` (draws, A).

    The draws are those of `analyze.stats.bootstrap_ratio`, so an arm has the interval that
    study=quality gives it.

    Args:
        best: (D,) sums of each document.
        behind: (A, D) likewise.
        total: (D,) likewise.
    """
    rng = np.random.default_rng(seed)
    n = len(total)
    of_best = np.empty(draws)
    of_behind = np.empty((draws, len(behind)))
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        whole = times @ total
        of_best[draw] = (times @ best) / whole
        of_behind[draw] = (behind @ times) / whole
    return of_best, of_behind
