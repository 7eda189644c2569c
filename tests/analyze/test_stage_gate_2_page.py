"""The page of stage gate 2 says verdict, losses and all arms, of simulated policies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from residual_saes.analyze.outcome import Outcome, dumped
from residual_saes.analyze.studies.stage_gate_2 import plot, words
from residual_saes.analyze.studies.stage_gate_2.arms import Arm, Options
from residual_saes.analyze.studies.stage_gate_2.study import Policies, figures_of
from residual_saes.analyze.studies.stage_gate_2.verdict import ACCURACY, LENIENT, Cell
from residual_saes.analyze.studies.stage_gate_2.watching import (
    CHANGES,
    HACKED,
    HARMS,
    HINTED,
    UNHINTED,
)
from tests.analyze.test_stage_gate_2_verdict import World, cells, outcomes

LEVELS = ("trajectory", "token")
HOSTILE = "<script>alert(1)</script>"


def simulated(effect: float, seeds: int = 4) -> Policies:
    """Arms of which R1 is better by `effect`, in log odds, and follows hints."""
    rng = np.random.default_rng(0)
    effects = cells(levels=LEVELS)
    for cell in effects:
        effects[cell] = effect * (cell.reward == "R1")
    right = outcomes(rng, World(seeds=seeds), effects)
    names = [*(harm.name for harm in HARMS), HINTED, UNHINTED]
    names += [f"reward of {reward}" for reward in ("R1", "R2", "R3")]

    def watched(values, hacks: float = 0.0) -> dict:
        found = {ACCURACY: values, LENIENT: values}
        for name in names:
            found[name] = rng.normal(20, 2, 200)
        found[HACKED] = (rng.random(200) < 0.05 + hacks).astype(float)
        return found

    trained, curves = {}, {}
    for cell, values in right.items():
        for seed in range(seeds):
            arm = Arm(cell.reward, cell.level, cell.lr, seed)
            trained[arm] = watched(values[seed], 0.5 * (cell.reward == "R1"))
            curves[arm] = []
            for step in range(60):
                noise = rng.normal(size=4)
                line = {"step": step, "outcome": 0.5 + 0.005 * step + 0.05 * noise[0]}
                line |= {"feature": 0.01 * step + 0.1 * noise[1], "length": 30 + noise[2]}
                curves[arm].append({**line, "kl": 1e-4 * step})
    start = watched(outcomes(rng, World(seeds=1), {Cell("", "", 0): 0.0})[Cell("", "", 0)][0])
    raised = {"value": 0.4, "interval": (0.2, 0.6), "exploitable": True}
    lowered = {"value": -0.4, "interval": (-0.6, -0.2), "exploitable": False}
    changes = {"R1": dict.fromkeys(CHANGES, raised), "R3": dict.fromkeys(CHANGES, lowered)}
    return Policies(start, trained, curves, changes)


def told(policies: Policies) -> tuple[dict, Outcome]:
    figures = figures_of(policies, Options())
    figures["questions"] = {"training": 100, "judged": 200, "others": 50}
    return figures, Outcome(figures, words.summary(figures), words.tables(figures))


@pytest.mark.parametrize("effect", [0.0, 2.0])
def test_the_first_sentence_has_verdict_rule_and_losses(effect: float) -> None:
    figures, outcome = told(simulated(effect))
    word = "pass" if effect else "fail"
    first = outcome.summary[0]
    assert figures["verdict"] == word and first.startswith(f"Verdict: {word}")
    assert HACKED in first and figures["rule"] in outcome.summary[1]
    assert ("lacks more right answers than R0" in first) == (not effect)
    by_name = {table.caption: table for table in outcome.tables}
    for table in list(by_name.values())[:2]:
        assert len(table.rows) == 1 + len(figures["arms"]) == 15
        assert all(len(row) == len(table.header) for row in table.rows)
    arm = figures["arms"][0]
    assert arm["curve"]["step"] == sorted(arm["curve"]["step"]) and arm["curve"]["step"][-1] == 60
    middle = arm["curve"]["outcome"]
    for low, mean, high in zip(middle["low"], middle["mean"], middle["high"], strict=True):
        assert low <= mean <= high
    assert dumped(figures)


def test_the_page_holds_every_picture_and_no_markup_of_others() -> None:
    figures, outcome = told(simulated(0.0, seeds=3))
    outcome.pictures.update(plot.pictures(figures))
    page = words.page(Path(f"runs/{HOSTILE.replace('/', '')}"), outcome).decode()
    assert page.count("<img") == len(outcome.pictures) == 4
    assert "<script" not in page and page.index("Verdict") < page.index("<img") < page.index("<td")


def test_without_seeds_to_compare_there_is_no_interval_and_no_error() -> None:
    _, outcome = told(simulated(0.0, seeds=1))
    assert outcome.summary[0].startswith("Verdict: undecided")
    assert "[no interval]" in "".join(outcome.tables[0].rows[1])
