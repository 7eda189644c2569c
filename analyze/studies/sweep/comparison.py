"""Which arm of a sweep is best on rows that none was trained on, and which ones cannot be told from
it.

All arms of a layer see the same held-out rows: those that every arm's policy keeps. With e_a the
error of arm a, E_a and T its sums of |e_a|^2 and of |x - mu|^2 over the rows of each document, and
w how often a document was drawn:

    variance explained of a      1 - (w . E_a) / (w . T)
    behind the best arm b        (w . (E_a - E_b)) / (w . T): paired, so what makes a document hard for all cancels

Intervals are percentiles over resampled documents, the same draws for all arms and as in
`analyze.stats`. The best arm is the one with the largest figure on all documents; how often it is
first among the resamples says what that is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from analyze.stats import sums_by
from analyze.studies.quality import BATCH_ROWS
from analyze.studies.sweep.arms import SEEDS, Arm, common_folder, exact, varying
from analyze.subject import Subject, open_store
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
_MEMORY_SHARE = 0.5  # of what is free, for the SAEs that are measured in one reading
_MEMORY_UNKNOWN = 4 << 30  # bytes, where the system does not say


@dataclass(frozen=True)
class Measured:
    """Sums over the held-out rows of each document (D of them), by arm's name."""

    rows: int
    about_mean: NDArray[np.float64]  # (D,) |x - mu|^2
    squared_error: dict[str, NDArray[np.float64]]  # (D,) |e|^2 of each arm


class Standing(NamedTuple):
    """Where one arm stands."""

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
    """Every figure, as plain JSON; arms are in order, the best of each layer first.

    Args:
        damaged: what is wrong with each arm that could not be read, by name; arms whose SAE is
            found damaged join it.
        store: where the store is now, if it has moved since.
        limit: held-out rows to measure on, in whole units.
    """
    finished = [arm for arm in arms if arm.finished]
    any_run = finished[0] if finished else None
    opened = (
        open_store(any_run.run, any_run.store_path, any_run.identity, store) if any_run else None
    )
    keys = varying(arms)
    layers = [
        _layer(layer, arms, damaged, opened, keys, limit, device)
        for layer in sorted({a.layer for a in arms})
    ]
    return {
        "folder": str(common_folder([arm.run for arm in arms]).absolute()) if arms else None,
        "store": opened.name if opened else arms[0].store_path if arms else None,
        "identity": arms[0].identity if arms else None,
        "model": opened.manifest["model"]["id"] if opened else None,
        "settings": keys,
        "same_in_all": {key: value for key, value in arms[0].settings.items() if key not in keys}
        if arms
        else {},
        "layers": [layer for layer in layers if layer["arms"]],
        "damaged": damaged,
    }


def _layer(
    layer: int,
    arms: Sequence[Arm],
    damaged: dict[str, str],
    store: Store | None,
    keys: Sequence[str],
    limit: int,
    device: torch.device,
) -> dict[str, Any]:
    """The comparison of one layer's arms."""
    here = [arm for arm in arms if arm.layer == layer]
    finished = [arm for arm in here if arm.finished]
    policy = Policy(
        *(any(getattr(a.policy, name) for a in here) for name in ("drop_bos", "drop_outliers"))
    )
    measured = (
        measure(finished, damaged, store, policy, limit, device) if store and finished else None
    )
    standings = compare(measured) if measured and measured.squared_error else {}
    figures = [
        _figures(arm, standings.get(arm.name), measured, store, keys)
        for arm in here
        if arm.name not in damaged
    ]
    figures.sort(
        key=lambda one: (not one["finished"], -(one["variance_explained"] or 0), one["name"])
    )
    best = next(iter(standings), None)
    return {
        "layer": layer,
        "rows": measured.rows if measured else 0,
        "documents": len(measured.about_mean) if measured else 0,
        "drop_bos": policy.drop_bos,
        "drop_outliers": policy.drop_outliers,
        "one_policy": len({arm.policy for arm in here}) == 1,
        "best": best,
        "not_distinguishable": [
            name
            for name, standing in standings.items()
            if name != best and standing.behind_interval[0] <= 0
        ],
        "seed_spread": seed_spread(figures),
        "arms": figures,
    }


def seed_spread(figures: Sequence[dict[str, Any]]) -> float | None:
    """By how much variance explained differs at most between compared arms that differ in their
    seeds alone.
    """
    groups: dict[str, list[tuple[str, float]]] = {}
    for arm in figures:
        if arm["variance_explained_95"] is not None:
            seeds = {key: value for key, value in arm["settings"].items() if key in SEEDS}
            others = {key: value for key, value in arm["settings"].items() if key not in SEEDS}
            groups.setdefault(exact(others), []).append((exact(seeds), arm["variance_explained"]))
    repeated = [
        [explained for _, explained in group]
        for group in groups.values()
        if len({s for s, _ in group}) > 1
    ]
    return max((max(group) - min(group) for group in repeated), default=None)


def _figures(
    arm: Arm,
    standing: Standing | None,
    measured: Measured | None,
    store: Store | None,
    keys: Sequence[str],
) -> dict[str, Any]:
    """One arm: of a finished one variance explained and MSE as measured here, the rest as training
    recorded it.
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
        **{
            key: last.get(key)
            for key in ("variance_explained", "mse", "dead_share", "coverage", "l0")
        },
        **dict.fromkeys(("variance_explained_95", "behind_best", "behind_best_95", "first_share")),
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

    None if no arm's SAE can be read; each that cannot joins `damaged`.
    """
    found: Measured | None = None
    for group in _groups(arms, int((free_bytes(device) or _MEMORY_UNKNOWN) * _MEMORY_SHARE)):
        saes = dict(_load(group, damaged, store, device))
        if not saes:
            continue
        one = next(arm for arm in group if arm.name in saes)
        # With the policy of all arms, the mean about which variance is taken is theirs in common
        # too.
        subject = Subject(one.run, {}, store, saes[one.name], one.layer, policy)
        new = _read(subject, saes, limit)
        for name in [
            name for name, error in new.squared_error.items() if not np.isfinite(error).all()
        ]:
            damaged[name] = (
                f"the reconstruction of {name} is not finite: {sae_file.FILE} is damaged, or training diverged"
            )
            del new.squared_error[name]
        found = Measured(
            new.rows,
            new.about_mean,
            {**(found.squared_error if found else {}), **new.squared_error},
        )
    return found


def _load(
    arms: Sequence[Arm], damaged: dict[str, str], store: Store, device: torch.device
) -> Iterator[tuple[str, SAE]]:
    for arm in arms:
        path = arm.run / sae_file.FILE
        try:
            loaded = sae_file.load(path, device)
            shape, wanted = (
                (loaded.d_model, loaded.d_sae),
                (store.d_model, arm.settings.get("sae.d_sae")),
            )
            if shape != wanted:
                raise StoreError(
                    f"{path} has width and latents {shape}, the store and config.yaml say {wanted}"
                )
        except StoreError as error:
            damaged[arm.name] = str(error)
        else:
            yield arm.name, loaded


def _groups(arms: Sequence[Arm], budget: int) -> Iterator[list[Arm]]:
    """Arms in order, as many at a time as `budget` bytes hold, and at least one."""
    group, used = list[Arm](), 0
    for arm in arms:
        size = (arm.run / sae_file.FILE).stat().st_size  # float32, as in memory
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(arm)
        used += size
    if group:
        yield group


def _read(subject: Subject, saes: Mapping[str, SAE], limit: int) -> Measured:
    """One reading of the held-out units; only each document's sums stay."""
    rows, parts = 0, list[tuple[NDArray[np.uint32], list[NDArray[np.float64]]]]()
    progress, units = Progress(), len(held_out_units(subject.store))
    for unit in subject.rows(limit):
        mask = np.flatnonzero(unit.of_kinds(subject.policy.kinds))
        columns = [list[NDArray[np.float64]]() for _ in range(1 + len(saes))]
        for chosen in (mask[at : at + BATCH_ROWS] for at in range(0, len(mask), BATCH_ROWS)):
            x = unit.rows[torch.from_numpy(chosen).to(subject.device)]
            exact = x.double()
            columns[0].append(subject.about_mean(exact).cpu().numpy())
            for column, one in zip(columns[1:], saes.values(), strict=True):
                column.append((exact - one(x).double()).square().sum(1).cpu().numpy())
        rows += len(mask)
        if len(mask):
            document = unit.document[mask]
            parts.append((np.unique(document), sums_by(document, *map(np.concatenate, columns))))
        count = len(parts)
        progress.show(
            f"layer {subject.layer}: held-out unit {count}/{units} for {len(saes)} arms",
            last=count == units,
        )
    if not parts:
        raise StoreError(
            f"no held-out row of {subject.store.name} passes the runs' policy {subject.policy}"
        )
    document = np.concatenate(
        [part[0] for part in parts]
    )  # one that goes on in the next unit occurs twice
    about_mean, *errors = sums_by(
        document, *(np.concatenate(c) for c in zip(*(p[1] for p in parts), strict=True))
    )
    return Measured(rows, about_mean, dict(zip(saes, errors, strict=True)))


# -- the comparison --------------------------------------------------------------------------------


def compare(measured: Measured, draws: int = _DRAWS) -> dict[str, Standing]:
    """Each arm's standing, the best arm first; equal ones by name."""
    total = measured.about_mean.sum()
    unexplained = {
        name: float(error.sum() / total) for name, error in measured.squared_error.items()
    }
    names = sorted(unexplained, key=lambda name: (unexplained[name], name))
    best = measured.squared_error[names[0]]
    # Differences first, then sums: of equal arms it is 0 to the last bit.
    behind_sums = np.stack([measured.squared_error[name] - best for name in names])
    best_draws, behind_draws = resample(best, behind_sums, measured.about_mean, draws)
    lead = behind_draws <= behind_draws.min(1, keepdims=True) + _TIE
    first = (lead / lead.sum(1, keepdims=True)).mean(0)
    explained = np.quantile(1 - best_draws[:, None] - behind_draws, [0.025, 0.975], axis=0)
    behind = np.quantile(behind_draws, [0.025, 0.975], axis=0)
    return {
        name: Standing(
            variance_explained=1 - unexplained[name],
            interval=explained[:, i].tolist(),
            behind=float(behind_sums[i].sum() / total),
            behind_interval=behind[:, i].tolist(),
            first_share=float(first[i]),
        )
        for i, name in enumerate(names)
    }


def resample(
    best: NDArray[np.float64],
    behind: NDArray[np.float64],
    total: NDArray[np.float64],
    draws: int,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ratios over resampled documents: (draws,) of `best` (D,) and (draws, A) of `behind` (A, D),
    both to `total` (D,).

    The draws are those of `analyze.stats.bootstrap_ratio`, so an arm has the interval that
    study=quality gives it.
    """
    rng, n = np.random.default_rng(seed), len(total)
    of_best, of_behind = np.empty(draws), np.empty((draws, len(behind)))
    for draw in range(draws):
        times = np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64)
        whole = times @ total
        of_best[draw], of_behind[draw] = (times @ best) / whole, (behind @ times) / whole
    return of_best, of_behind
