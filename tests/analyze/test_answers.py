"""Answers in plain words: none says yes where a study's verdict does not."""

from __future__ import annotations

from typing import Any

import pytest

from residual_saes.analyze.pages.answers import QUESTIONS, answer
from residual_saes.analyze.studies.probes import scoring


def contrasted(found: int, adjusted: int | None) -> dict[str, Any]:
    features = {
        "tested": 99,
        "raw": {"below_5_percent_fdr": found},
        "adjusted": None if adjusted is None else {"below_5_percent_fdr": adjusted},
    }
    return {"features": features, "covariates": ["log length"]}


@pytest.mark.parametrize(
    ("figures", "begins", "named"),
    [
        (contrasted(12, 7), "Yes", ["12", "99", "7", "length"]),
        (contrasted(12, None), "Yes", ["12", "99"]),
        (contrasted(12, 0), "Not shown", ["12", "99", "length"]),
        (contrasted(0, 0), "Not shown", ["99"]),
    ],
)
def test_right_against_wrong(figures: dict[str, Any], begins: str, named: list[str]) -> None:
    said = answer("contrast", figures)
    assert said and said.startswith(begins) and all(name in said for name in named)


def test_yes_is_said_of_what_was_found_alone() -> None:
    positive = {"raises", "pass", scoring.BETTER}
    verdicts = {
        "steering": ["broken", "do nothing", "no effect", "not shown", "raises", "lowers"],
        "intervene": ["broken", "no effect", "not shown", "raises", "lowers"],
        "stage_gate": ["pass", "weak", "fail", "undecided"],
        "rollouts": ["pass", "weak", "fail", "undecided"],
        "stage_gate_2": ["pass", "fail", "undecided"],
        "probes": [scoring.BETTER, scoring.NOT_BETTER, scoring.WORSE, scoring.UNDECIDED],
    }
    for study, words in verdicts.items():
        assert study in QUESTIONS
        for word in words:
            said = answer(study, {"verdict": word})
            assert said and said.startswith("Yes") == (word in positive), (study, word)


def test_other_figures_have_no_answer() -> None:
    assert [answer(study, {}) for study in QUESTIONS] == [None] * len(QUESTIONS)
    assert answer("steering", {"verdict": "of another version"}) is None
    assert answer("cross_layer", {"judged": 0, "predicted": 0, "null": {}}) is None
