"""What a run gained by start=: the tokens that a fresh run needs to explain as much.

Both curves are those of the runs' own held-out evaluations, on the same rows. Where the fresh run
passes a value between two evaluations, the tokens are interpolated, linearly in variance explained
and in the logarithm of tokens, and stand with those two evaluations. A run evaluates every
`eval_every` steps. A learning rate falls along a run, so a run in its middle explains less than one
that ends there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from residual_saes.analyze import outcome as outcomes
from residual_saes.analyze.outcome import Outcome, Table, printed
from residual_saes.analyze.study import Definition
from residual_saes.data import durable
from residual_saes.data.errors import MismatchError, SettingError
from residual_saes.data.journal import show, tell
from residual_saes.data.settings import build
from residual_saes.train.run import metrics_of, named_or_newest, read_config

_SAME_ROWS = ("store", "layer", "site", "stores", "policy")  # settings by which rows are the same
_ROWS = 12  # of the table


@dataclass(frozen=True)
class Options:
    """Settings of conf/study/warm_start.yaml."""

    other: str | None = None  # directory of the fresh run, on the same rows

    def __post_init__(self) -> None:
        if not self.other:
            raise SettingError(
                "study.other is missing; give a run on the same rows that began fresh, as "
                "study.other="
            )


class Point(NamedTuple):
    """A held-out evaluation."""

    tokens: int
    explained: float  # variance explained


class Reached(NamedTuple):
    """When a curve first explains as much as a value."""

    tokens: float | None  # interpolated; None: it does not, or did before its first evaluation
    after: int  # tokens of its evaluation before; 0: there is none
    by: int | None  # tokens of its first evaluation that explains as much; None: none does


def reached(curve: Sequence[Point], explained: float) -> Reached:
    """When a curve of ascending tokens first explains as much as `explained`."""
    before: Point | None = None
    for point in curve:
        if point.explained >= explained:
            if before is None or before.tokens == 0:
                return Reached(None, 0, point.tokens)
            share = (explained - before.explained) / (point.explained - before.explained)
            logs = math.log(before.tokens), math.log(point.tokens)
            tokens = math.exp(logs[0] + share * (logs[1] - logs[0]))
            return Reached(tokens, before.tokens, point.tokens)
        before = point
    return Reached(None, before.tokens if before else 0, None)


def compare(settings: Mapping[str, Any]) -> None:
    """Print what a run gained, and write it into the run's directory, or out=.

    Raises:
        SettingError: study.other= is missing, or run= did not begin with start=, or the other did.
        MismatchError: the runs are of other rows.
        StoreError: a run is missing or damaged.
    """
    options = {key: value for key, value in settings["study"].items() if key != "name"}
    other = Path(build(Options, "study", options).other or "")
    run = named_or_newest(settings["run"])
    found = gained(run, other)
    show(*printed(found))
    out = Path(settings["out"] or run)
    durable.make_directory(out)
    outcomes.write(out, "warm_start", {}, found)
    tell(f"wrote warm_start.json and warm_start.md into {out}")


def gained(run: Path, other: Path) -> Outcome:
    """The run's held-out evaluations, each with the tokens that the other needs for as much."""
    ours, theirs = read_config(run)["settings"], read_config(other)["settings"]
    if "start" not in ours:
        raise SettingError(f"run={run} did not begin with start=; give one that did")
    if "start" in theirs:
        raise SettingError(f"study.other={other} began with start=; give one that did not")
    unequal = {}
    for name in _SAME_ROWS:
        if ours.get(name) != theirs.get(name):
            unequal[name] = (theirs.get(name), ours.get(name))
    if unequal:
        raise MismatchError(f"run {other}", unequal, "Give a run on the same rows as study.other=")
    as_is = metrics_of(run)[0]["variance_explained_as_is"]
    curve, fresh = _curve(run), _curve(other)
    needed = [(point, reached(fresh, point.explained)) for point in curve]
    rows = [("the start as it is", f"{as_is:.4f}", _said(reached(fresh, as_is), fresh))]
    for point, need in _few(needed):
        name = f"{point.tokens:,}" if point.tokens else "0, made right for these rows"
        rows.append((name, f"{point.explained:.4f}", _said(need, fresh)))
    summary = [
        f"The start explains {as_is:.4f} of the held-out variance as it is, "
        f"{curve[0].explained:.4f} made right for these rows, and {curve[-1].explained:.4f} after "
        f"{curve[-1].tokens:,} tokens.",
        f"Tokens that the fresh run needs for as much: {_said(needed[-1][1], fresh)}.",
    ]
    figures = {
        "as_is": {"variance_explained": as_is, "fresh": reached(fresh, as_is)._asdict()},
        "curve": [{**point._asdict(), "fresh": need._asdict()} for point, need in needed],
        "fresh": [point._asdict() for point in fresh],
    }
    header = ("tokens", "held-out variance explained", "tokens of the fresh run for as much")
    return Outcome(figures, summary, [Table("What the start is worth", header, rows)])


def _curve(run: Path) -> list[Point]:
    records = [record for record in metrics_of(run) if record["split"] == "held_out"]
    return [Point(record["tokens"], record["variance_explained"]) for record in records]


def _few(points: Sequence[tuple[Point, Reached]]) -> list[tuple[Point, Reached]]:
    """At most _ROWS of them, the first and the last included."""
    step = max(1, math.ceil((len(points) - 1) / (_ROWS - 1)))
    return [*points[:-1:step], points[-1]]


def _said(need: Reached, fresh: Sequence[Point]) -> str:
    if need.by is None:
        best = max(point.explained for point in fresh)
        return f"not reached in {fresh[-1].tokens:,} (best {best:.4f})"
    if need.tokens is None:
        return f"at most {need.by:,}"
    return f"{need.tokens:,.0f} (between {need.after:,} and {need.by:,})"


DEFINITION = Definition(compare=compare, options=Options)
