"""All arms of a sweep on the same held-out rows: those that every arm's policy keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from residual_saes.analyze.studies.sweep.arms import SEEDS, Arm, common_folder, exact, varying
from residual_saes.analyze.studies.sweep.ranking import Standing, compare
from residual_saes.analyze.studies.sweep.reading import Measured, measure
from residual_saes.analyze.subject import open_stores
from residual_saes.data.rows.split import Policy
from residual_saes.data.store.store import Store

_RECORDED = ("variance_explained", "mse", "dead_share", "coverage", "l0")  # by training
_SIZES = ("sae.d_sae", "sae.k")  # settings by which one SAE is simpler than another
_COMPARED = (
    "variance_explained_95",
    "seeds",
    "setting_mean",
    "behind_best",
    "behind_best_95",
    "first_share",
)


def sweep(
    arms: Sequence[Arm],
    damaged: dict[str, str],
    store: Sequence[str] | None,
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
    opened: tuple[Store, ...] = ()
    if finished:
        opened = open_stores(finished[0].run, finished[0].stores, store)
    keys = varying(arms)
    layers = []
    writes = sorted({arm.ports.writes for arm in arms})
    for written in writes:
        here = [arm for arm in arms if arm.ports.writes == written]
        layer = _layer(here, damaged, opened, keys, limit, device)
        if layer["arms"]:
            layers.append(layer)
    figures: dict[str, Any] = dict.fromkeys(("folder", "store", "identity", "model"))
    figures |= {"settings": keys, "same_in_all": {}, "layers": layers, "damaged": damaged}
    if arms:
        most = max(arms, key=lambda arm: len(arm.settings))
        same = {key: value for key, value in most.settings.items() if key not in keys}
        figures |= {
            "folder": str(common_folder([arm.run for arm in arms]).absolute()),
            "store": opened[0].name if opened else arms[0].stores[0][0],
            "identity": arms[0].identity,
            "same_in_all": same,
        }
    if opened:
        figures["model"] = opened[0].manifest["model"]["id"]
    return figures


def _layer(
    arms: Sequence[Arm],
    damaged: dict[str, str],
    stores: tuple[Store, ...],
    keys: Sequence[str],
    limit: int,
    device: torch.device,
) -> dict[str, Any]:
    """The comparison of the arms that write the same hook points."""
    # The rows that every arm's policy keeps.
    policy = Policy(
        drop_bos=any(arm.policy.drop_bos for arm in arms),
        drop_outliers=any(arm.policy.drop_outliers for arm in arms),
        drop_tokens=tuple(sorted({token for arm in arms for token in arm.policy.drop_tokens})),
    )
    finished = [arm for arm in arms if arm.finished]
    measured = None
    if stores and finished:
        measured = measure(finished, damaged, stores, policy, limit, device)
    standings: dict[str, Standing] = {}
    labels = None
    if measured and measured.squared_error:
        labels = settings_and_seeds([arm for arm in arms if arm.name in measured.squared_error])
        standings = compare(measured, labels)
    units = set((labels or {}).values())
    best = next(iter(standings), None)
    alike = [name for name, standing in standings.items() if not standing.is_told]
    figures = []
    for arm in arms:
        if arm.name not in damaged:
            figures.append(_figures(arm, standings.get(arm.name), measured, keys))
    has_interval = any(standings[name].behind_interval for name in alike if name != best)
    place = {arm.name: number for number, arm in enumerate(arms)}
    simple = {arm.name: [arm.settings.get(key) or 0 for key in _SIZES] for arm in arms}

    def rank(arm: dict[str, Any]) -> tuple[Any, ...]:
        """Arms that cannot be told apart by dead latents, then size, then their place; the others,
        and all where too few documents give intervals, by what their settings explain; unfinished
        ones last.
        """
        name = arm["name"]
        if name in alike and has_interval:
            dead = arm["dead_share"]
            return 0, float("inf") if dead is None else dead, *simple[name], place[name]
        explained = [-(arm[key] or 0) for key in ("setting_mean", "variance_explained")]
        return 1 + (not arm["finished"]), *explained, name

    figures.sort(key=rank)
    return {
        "layer": arms[0].place,
        **_where(arms[0]),
        "rows": measured.rows if measured else 0,
        "documents": len(measured.about_mean) if measured else 0,
        "left_out": measured.left_out if measured else {},
        **policy.recorded(),
        "one_policy": len({arm.policy for arm in arms}) == 1,
        "best": best,
        "not_distinguishable": [name for name in alike if name != best],
        "choice": figures[0]["name"] if best else None,
        "seed_spread": seed_spread(figures),
        "seed_freedom": len(units) - len({setting for setting, _ in units}),
        "arms": figures,
    }


def _where(arm: Arm) -> dict[str, str]:
    """What is written in words, where that is not the resid_post of one layer."""
    return {} if isinstance(arm.place, int) else {"where": " and ".join(map(str, arm.ports.writes))}


def settings_and_seeds(arms: Sequence[Arm]) -> dict[str, tuple[str, str]] | None:
    """Each arm's settings but the seeds, and its seeds; None if no setting has several seeds."""
    labels = {}
    for arm in arms:
        seeds = {key: value for key, value in arm.settings.items() if key in SEEDS}
        others = {key: value for key, value in arm.settings.items() if key not in SEEDS}
        labels[arm.name] = exact(others), exact(seeds)
    several = len(set(labels.values())) > len({setting for setting, _ in labels.values()})
    return labels if several else None


def seed_spread(figures: Sequence[dict[str, Any]]) -> float | None:
    """The largest difference of variance explained between arms that differ in their seeds alone.

    None if no two compared arms do.
    """
    groups: dict[str, dict[str, list[float]]] = {}  # by the other settings, then by the seeds
    for arm in figures:
        if arm["behind_best"] is not None:
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
        "sae": arm.sae,
        "step": arm.step,
        "steps": arm.steps,
        "tokens": arm.step * int(arm.settings["batch"]),
        "tokens_per_s": arm.tokens_per_s,
        **{key: last.get(key) for key in _RECORDED},
        **dict.fromkeys(_COMPARED),
    }
    if standing and measured:
        error = float(measured.squared_error[arm.name].sum())
        figures |= {
            "variance_explained": standing.variance_explained,
            "variance_explained_95": standing.interval,
            "mse": error / measured.rows / measured.width,
            "seeds": standing.seeds,
            "setting_mean": standing.mean,
            "behind_best": standing.behind,
            "behind_best_95": standing.behind_interval,
            "first_share": standing.first_share,
        }
    return figures
