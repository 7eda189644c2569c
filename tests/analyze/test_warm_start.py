"""study=warm_start: the tokens that a fresh run needs to explain as much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from residual_saes.analyze.studies.warm_start import Point, Reached, compare, reached
from residual_saes.data.errors import MismatchError, SettingError
from residual_saes.train.loop import train
from tests.train.test_warm import CPU, Moved, arm, settings

CURVE = [Point(100, 0.5), Point(400, 0.7), Point(1600, 0.6), Point(6400, 0.9)]


@pytest.mark.parametrize(
    ("explained", "tokens", "after", "by"),
    [
        (0.4, None, 0, 100),  # before its first evaluation
        (0.6, 200.0, 100, 400),  # half way, in the logarithm
        (0.7, 400.0, 100, 400),
        (0.75, 3200.0, 1600, 6400),  # a curve that fell in between
        (0.95, None, 6400, None),
    ],
)
def test_tokens_are_interpolated_where_a_curve_passes(
    explained: float, tokens: float | None, after: int, by: int | None
) -> None:
    found = reached(CURVE, explained)
    assert (found.after, found.by) == (after, by)
    assert found.tokens == (tokens if tokens is None else pytest.approx(tokens))


def test_of_no_evaluation_nothing_is_reached() -> None:
    assert reached([], 0.5) == Reached(None, 0, None)


def test_a_run_beside_a_fresh_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few: dict[str, Any] = {"steps": 12, "eval_every": 3}
    train(arm(Path("base"), settings(), **few), CPU)
    few["reader"] = Moved(2.0, 0.5)
    train(arm(Path("fresh"), settings(), **few), CPU)
    train(arm(Path("warm"), settings(), "base", **few), CPU)

    def compared(run: str, other: str | None) -> None:
        study = {"name": "warm_start", "other": other}
        compare({"run": run, "out": None, "study": study})

    compared("warm", "fresh")
    figures = json.loads(Path("warm/warm_start.json").read_text())["figures"]
    assert [point["tokens"] for point in figures["curve"]] == [0, 192, 384, 576, 768]
    assert figures["as_is"]["variance_explained"] < 0
    assert "made right for these rows" in capsys.readouterr().out
    for run, other, named in (
        ("warm", None, "study.other"),
        ("fresh", "base", "run=fresh"),
        ("warm", "warm", "study.other=warm"),
    ):
        with pytest.raises(SettingError, match=named):
            compared(run, other)
    with pytest.raises(MismatchError, match=r"store\.identity|store"):
        compared("warm", "base")
