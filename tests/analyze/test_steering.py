"""The study of steering: planted outcomes, its verdict, and the study from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from residual_saes.analyze import results
from residual_saes.analyze.changes.intervention import Steer, intervened
from residual_saes.analyze.changes.replies import Reply, Row
from residual_saes.analyze.changes.sweeps import Sweeps, greedy
from residual_saes.analyze.language_model import generate
from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.questions.answering import Answer, Asking, answers, completions
from residual_saes.analyze.questions.problems import problem
from residual_saes.analyze.questions.split import split_of
from residual_saes.analyze.studies.steering import study as steering
from residual_saes.analyze.studies.steering import words
from residual_saes.analyze.studies.steering.outcomes import Findings, nulls, overlaps
from residual_saes.analyze.studies.steering.study import Options
from residual_saes.analyze.study import Study
from residual_saes.data import digests
from residual_saes.data.errors import Interrupted, SettingError, StopRequest
from residual_saes.data.journal import Progress
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import HookPoint
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.data.tiny.problems import problems as tiny_problems
from residual_saes.harvest import model as models
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import tap
from residual_saes.train.publish.release import prepare

# -- the table -------------------------------------------------------------------------------------


def replies(right: str, ids: Sequence[int] = (1, 2), **more: Any) -> list[Reply]:
    """One reply per letter: `1` right, `0` wrong, `-` unparsable."""
    return [
        Reply(f"q{at}", list(ids), letter == "1", letter == "-", True, **more)
        for at, letter in enumerate(right)
    ]


V = Steer("v", np.eye(3)[0], 5.0, "all")


def row(right: str, unsteered: str, kind: str = "v", scale: float = 5.0, **more: Any) -> Row:
    effect = {"kl": 0.0, "norm": 30.0, "relative": 0.1} if kind != "unsteered" else {}
    changes = {"ids": (1, 3)} if kind not in ("unsteered", "scale 0") else {}
    given = None if kind == "unsteered" else V._replace(kind=kind, scale=scale, **more)
    return Row.of(given, replies(right, **changes, **effect), replies(unsteered))


def test_a_row_counts_what_was_planted() -> None:
    unsteered = replies("1100-", (1, 2, 3))
    found = Row.of(V, replies("10-11", (4,), kl=6.0, norm=20.0, relative=0.25), unsteered)
    assert (found.right, found.gained, found.lost, found.net) == (3, ["q3", "q4"], ["q1"], 1)
    assert found.p == pytest.approx(1.0) and found.discordant == pytest.approx(3 / 5)
    assert (found.unparsable, found.truncated, found.length, found.changed) == (1, 0, 1.0, 5)
    assert found.kl == pytest.approx(5 * 6 / 15) and (found.norm, found.relative) == (20.0, 0.25)
    assert np.isnan(Row.of(None, unsteered, unsteered).kl)
    assert (
        Row.of(V, [reply._replace(finished=False) for reply in unsteered], unsteered).changed == 5
    )


def test_the_references_own_figures() -> None:
    """Scale +15 gains 3 and loses 9 of 50: p = .146.

    +10 and -5 recover 5 of 25 each, 3 of them in common: p = .038.
    """
    half = "1" * 25 + "0" * 25
    assert row("0" * 9 + "1" * 16 + "1" * 3 + "0" * 22, half).p == pytest.approx(0.146, abs=5e-4)

    def recovering(*numbers: int) -> Row:
        """Right are the first half of the questions and these."""
        letters = ["1" if number < 25 or number in numbers else "0" for number in range(50)]
        return row("".join(letters), half)

    scales = [recovering(30, 36, 43, 49, 48), recovering(30, 36, 43, 26, 25)]
    (found,) = overlaps(scales, 25)
    assert (len(found.shared), found.recovered) == (3, (5, 5))
    assert found.p == pytest.approx(0.038, abs=5e-4)
    assert found.p_holm == found.p


def test_nulls_are_found_out() -> None:
    exact, moved = (
        row("1100", "1100", "scale 0", 0.0),
        row("1100", "1100", "positions", positions="prompt"),
    )
    assert [null.held for null in nulls([exact, moved], 5, 6)] == [True]
    assert [null.held for null in nulls([exact, moved], 6, 6)] == [True, False]
    assert [null.held for null in nulls([replace(exact, kl=1e-9), row("11", "11")], 5, 6)] == [
        False
    ]


def findings(v: str, unsteered: str, random: Sequence[str], **more: Any) -> Findings:
    rows = [row(unsteered, unsteered, "unsteered"), row(unsteered, unsteered, "scale 0", 0.0)]
    rows += [row(v, unsteered), row(unsteered, unsteered, scale=-5.0)]
    rows += [row(right, unsteered, kind) for kind in ("random", "shuffled") for right in random]
    ids = {"train": ["a"], "dev": ["b", "c"], "test": [f"q{at}" for at in range(len(v))]}
    given = {
        "best": 5.0,
        "dev": {0.0: 1, 5.0: 2, -5.0: 0},
        "ids": ids,
        "answers": (3, 4),
        "layer": 5,
    }
    return Findings(rows, **{**given, "inert_from": 6, "seed": 0, **more})


def test_the_verdict_needs_a_change_that_chance_directions_do_not_make() -> None:
    none, some, full = "0" * 20, "1" * 10 + "0" * 10, "1" * 20
    given = {
        "raised": findings(full, some, [some] * 20),
        "lowered": findings(none, some, [some] * 20),
        "as chance": findings(full, some, [full] * 20),
        "few controls": findings(full, some, [some] * 3),
        "hardly changed": findings("1" * 12 + "0" * 8, some, [some] * 20),
    }
    verdicts = {name: words.verdict(found) for name, found in given.items()}
    assert verdicts == {
        "raised": "raises",
        "lowered": "lowers",
        "as chance": "not shown",
        "few controls": "not shown",
        "hardly changed": "no effect",
    }
    sentences = {words.summary(found)[0] for found in given.values()}
    assert len(sentences) == len(given)  # each verdict reads otherwise, and so do too few controls
    whole = given["raised"]
    scale_0 = replace(whole.rows[1], changed=2)
    broken = replace(whole, rows=[whole.rows[0], scale_0, *whole.rows[2:]])
    assert words.verdict(broken) == "broken"
    assert words.summary(broken)[0] not in sentences


@pytest.mark.parametrize("right_on_dev", [0, 1, 2])
def test_where_no_scale_beats_unsteered_on_dev_the_choice_is_to_do_nothing(
    right_on_dev: int,
) -> None:
    """Whatever the test questions say: here v breaks the model, and then it answers all."""
    some = "1" * 10 + "0" * 10
    for v, then in (("0" * 20, "lowers"), ("1" * 20, "raises")):
        found = findings(v, some, [some] * 20, dev={0.0: 2, 5.0: right_on_dev, -5.0: 0})
        assert (words.verdict(found), words.effect(found)) == ("do nothing", then)
        assert (found.chosen, found.best) == (0.0, 5.0)
        outcome = words.outcome(found)
        assert (outcome.figures["verdict"], outcome.figures["chosen_scale"]) == ("do nothing", 0.0)
        assert outcome.summary[0].startswith("Do nothing") and "best of" not in outcome.summary[2]
        assert "do nothing" in outcome.tables[2].caption


def test_a_direction_that_costs_as_much_as_v_gains_counts_against_v() -> None:
    some = "1" * 10 + "0" * 10
    found = findings("1" * 20, some, ["0" * 20] * 20)  # 10 gained; each of the others loses 10
    rank = found.ranks["random"]
    assert (rank.as_high, rank.as_low, rank.as_far) == (0, 20, 20)
    assert rank.p == 1 and rank.p_high == pytest.approx(1 / 21)
    assert words.verdict(found) == "not shown"
    part = findings("1" * 20, some, ["0" * 20] * 3 + ["1" * 9 + "0" * 11] * 17).ranks["random"]
    assert (part.as_far, part.p) == (3, pytest.approx(4 / 21))


def test_recovered_and_lost_questions_are_named() -> None:
    rows = [row("11100", "11000", "unsteered"), row("11100", "11000", "scale 0", 0.0)]
    rows += [row("01110", "11000"), row("10101", "11000", scale=-5.0)]
    rows += [row("11000", "11000", kind) for kind in ("random", "shuffled")]
    found = replace(findings("11000", "11000", ["11000"]), rows=rows)
    _, recovery, _, overlap, _ = words.outcome(found).tables
    assert recovery.rows == [("5", "q2 q3", "q0"), ("-5", "q2 q4", "q1")]
    assert overlap.rows[0][:5] == ("5 and -5", "2", "2", "1", "q2")
    as_json = found.figures()
    assert [shown["gained"] for shown in as_json["rows"][2:4]] == [["q2", "q3"], ["q2", "q4"]]
    assert as_json["overlaps"][0]["shared"] == ["q2"]
    tipped = [row("11100", "11000", "random"), row("00000", "11000", "random")]
    assert replace(found, rows=[*rows[:4], *tipped]).gained_by_chance == 0.5  # q2 of q2 and q3


def test_scales_without_controls_are_said_to_have_none() -> None:
    some = "1" * 10 + "0" * 10
    found = findings(some, some, [some] * 20)
    lost = [row("0" * 20, some, scale=-5.0) if one.scale == -5 else one for one in found.rows]
    for with_loss, said in ((replace(found, rows=lost), True), (found, False)):
        assert ("+5 alone" in " ".join(words.summary(with_loss))) == said


def test_gains_that_may_be_of_form_alone_are_counted() -> None:
    assert (row("1111", "1-0-").mended, row("1-1-", "1111").mended) == (2, 0)
    unparsable = findings("1" * 20, "1" * 10 + "-" * 10, ["1" * 10 + "0" * 10] * 20)
    parsable = findings("1" * 20, "1" * 10 + "0" * 10, ["1" * 10 + "0" * 10] * 20)
    sentences = ["####" in " ".join(words.summary(found)) for found in (unparsable, parsable)]
    assert sentences == [True, False]


def test_a_page_states_rank_holm_and_what_could_be_seen() -> None:
    found = findings(
        "1" * 20, "1" * 10 + "0" * 10, ["1" * 20, "1" * 5 + "0" * 15, "1" * 9 + "0" * 11]
    )
    assert found.ranks["random"][:3] == (3, 1, 3) and found.ranks["random"].p_high == pytest.approx(
        2 / 4
    )
    assert found.best_row.p == pytest.approx(2 * 0.5**10) and found.holm[5.0] == pytest.approx(
        4 * 0.5**10
    )
    outcome = words.outcome(found)
    assert "100.0% [83.9%, 100.0%]" in " ".join(outcome.summary)
    assert len(outcome.tables[0].rows) == 4
    assert "<svg" in outcome.pictures["steering"].svg


# -- the study -------------------------------------------------------------------------------------


def test_questions_keep_their_part_whoever_else_is_asked() -> None:
    every = [
        Answer(problem(drawn.question, "1"), "generated", [2], [3], "", True, "1", "1", True)
        for drawn, _ in zip(tiny_problems("heldout"), range(600), strict=False)
    ]
    split = split_of([*every, *every], 0.3, 0.2)
    parts = [
        set(split.train),
        {answer.problem.id for answer in split.dev},
        {answer.problem.id for answer in split.test},
    ]
    assert (
        sum(map(len, parts))
        == len(set.union(*parts))
        == len({answer.problem.id for answer in every})
    )
    assert [len(part) / 600 for part in parts] == pytest.approx([0.3, 0.2, 0.5], abs=0.06)
    fewer = split_of(every[300:], 0.3, 0.2)
    assert set(fewer.train) < parts[0] and {answer.problem.id for answer in fewer.test} < parts[2]


def test_train_questions_of_a_folder_never_judge_and_its_test_questions_do_nothing_else() -> None:
    every = []
    for drawn, part in zip(tiny_problems("heldout"), ["train", "test"] * 200, strict=False):
        asked = replace(problem(drawn.question, "1"), part=part)
        every.append(Answer(asked, "generated", [2], [3], "", True, "1", "1", True))
    split = split_of(every, 0.3, 0.2)
    by_part = {"train": {*split.train}, "dev": {answer.problem.id for answer in split.dev}}
    given = {part: {a.problem.id for a in every if a.problem.part == part} for part in ("train",)}
    assert by_part["train"] | by_part["dev"] == given["train"]
    assert not by_part["train"] & by_part["dev"]
    assert len(by_part["train"]) / len(given["train"]) == pytest.approx(0.6, abs=0.1)
    assert all(answer.problem.part == "test" for answer in split.test) and len(split.test) > 150


def test_sweeps_are_greedy_whatever_made_the_vector() -> None:
    sampled = Asking(samples=8, temperature=0.7, seed=3, new_tokens=9)
    assert greedy(sampled) == Asking(seed=3, new_tokens=9)
    found = findings("1100", "1100", ["1100"], samples=8)
    assert "greedy" in " ".join(words.summary(found))
    assert "greedy" not in " ".join(words.summary(replace(found, samples=1)))


def test_directions_are_unit_and_v_points_from_wrong_to_right() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(400) < 0.5
    hidden = rng.normal(size=(400, 16)) + 3 * np.outer(correct, np.eye(16)[4])
    found = steering.directions(hidden, correct, Options(n_random=7, n_shuffled=4))
    assert {kind: len(each) for kind, each in found.items()} == {
        "v": 1,
        "orthogonal": 1,
        "shuffled": 4,
        "random": 7,
    }
    assert np.allclose([np.linalg.norm(vector) for each in found.values() for vector in each], 1)
    v, across = found["v"][0], found["orthogonal"][0]
    assert v[4] > 0.97 and abs(v @ across) < 1e-12 and across @ found["random"][0] > 0.5
    assert (
        all(abs(vector @ v) < 0.9 for vector in found["shuffled"])
        and len({vector[0] for vector in found["random"]}) == 7
    )


def test_the_scale_is_the_best_on_dev_and_the_smallest_of_equals() -> None:
    tried = [V._replace(scale=scale) for scale in (10.0, -5.0, 5.0, 15.0)]
    assert steering.best_of(tried, {0.0: 9, 10.0: 4, -5.0: 4, 5.0: 4, 15.0: 3}).scale == 5.0
    assert steering.best_of(tried, {0.0: 9, 10.0: 4, -5.0: 4, 5.0: 3, 15.0: 6}).scale == 15.0


def test_controls_are_at_the_best_scale() -> None:
    vectors = {kind: [np.eye(3)[1]] * 2 for kind in ("orthogonal", "shuffled", "random")}
    tried = [V._replace(scale=scale) for scale in (2.0, 5.0)]
    found = [
        (steer.kind, steer.scale, steer.positions)
        for steer in steering.steers(tried, tried[1], vectors)
    ]
    assert found[:4] == [
        ("scale 0", 0.0, "all"),
        ("v", 2.0, "all"),
        ("v", 5.0, "all"),
        ("opposite", -5.0, "all"),
    ]
    assert found[4:6] == [("positions", 5.0, "prompt"), ("positions", 5.0, "generated")]
    assert {control[1:] for control in found[6:]} == {(5.0, "all")} and len(found) == 12
    assert "opposite" not in [
        steer.kind for steer in steering.steers([*tried, V._replace(scale=-5.0)], tried[1], vectors)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "end"},
        {"scales": [5, 0]},
        {"scales": [5, 5.0]},
        {"scales": []},
        {"scales": 5},
        {"scales": ["a"]},
        {"n_random": 0},
        {"train": 0.6, "dev": 0.4},
    ],
)
def test_options_that_cannot_be_right_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"study.{next(iter(options))}"):
        Options(**options)


Tiny = Callable[..., Study]


@pytest.fixture
def small(tiny_study: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """At layer 8, on 16 problems of one step, whose answers are short."""
    easy = [
        drawn
        for drawn, _ in zip(tiny_problems("heldout"), range(99), strict=False)
        if drawn.kind in ("add", "multiply")
    ]
    path = tmp_path_factory.mktemp("easy") / "easy.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question": drawn.question, "answer": str(drawn.answer)}) + "\n"
            for drawn in easy
        )
    )
    asked = {"questions": 16, "new_tokens": 20, "batch": 8}
    chosen = {"layer": 8, "scales": [20, -20], "n_random": 1, "n_shuffled": 1, "train": 0.4}
    return tiny_study("steering", str(path), asked, **chosen)


class Counted:
    """Counts the batches that a model generates, by their sizes, and may stop before one."""

    def __init__(self, lm: LanguageModel) -> None:
        self.batches: list[int] = []
        self.stop_at: int | None = None  # batches after which generation is interrupted
        self._generate = lm.causal.generate

    def __call__(self, **call: Any) -> Any:
        if len(self.batches) == self.stop_at:
            raise Interrupted(2)
        self.batches.append(len(call["input_ids"]))
        return self._generate(**call)


@pytest.fixture
def counted(small: Study, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Of the batches that `small` generates."""
    counted = Counted(small.lm)
    monkeypatch.setattr(small.lm.causal, "generate", counted)
    return counted


def test_the_study_end_to_end_stopped_and_continued(small: Study, counted: Counted) -> None:
    answers(small)
    counted.batches.clear()
    counted.stop_at = 5
    with pytest.raises(Interrupted):
        steering.steering(small)
    counted.stop_at = None
    found = steering.steering(small)
    figures, rows = found.figures, found.figures["rows"]
    size = figures["questions"]
    assert counted.batches == [size["dev"]] * 3 + [size["test"]] * 9  # not one sweep again
    assert dumped(asdict(steering.steering(small))) == dumped(asdict(found))
    assert len(counted.batches) == 12
    kinds = [
        "unsteered",
        "scale 0",
        "v",
        "v",
        "positions",
        "positions",
        "orthogonal",
        "shuffled",
        "random",
    ]
    assert [row["kind"] for row in rows] == kinds
    assert [(null["kind"], null["positions"], null["held"]) for null in figures["nulls"]] == [
        ("scale 0", "all", True),
        ("positions", "prompt", True),  # layer 8 is above those that make keys and values
    ]
    assert all(row["kl"] > 0 for row in rows[2:4]) and any(row["changed"] for row in rows[2:4])
    assert figures["mean_norm"] == pytest.approx(20 / rows[2]["of_mean_norm"])
    unsteered = {answer.problem.id: answer.correct for answer in answers(small)}
    assert rows[0]["right"] == sum(unsteered[question] for question in figures["ids"]["test"])


def test_a_sweep_goes_on_behind_its_last_batch(small: Study, counted: Counted) -> None:
    asked, asking = answers(small)[:7], Asking(new_tokens=3, batch=2)
    given = V._replace(vector=np.eye(small.lm.d_model)[3], scale=30.0)

    def run(*rest: Any, **changes: Any) -> list[Reply]:
        sweeps = Sweeps(small, 3, replace(asking, **changes), StopRequest(), Progress())
        return sweeps.run(asked, given, "some", *rest)

    batches = counted.batches
    batches.clear()
    counted.stop_at = 2
    with pytest.raises(Interrupted):
        run()
    counted.stop_at = None
    kept = run()
    assert batches == [2, 2, 2, 1]
    assert [reply.id for reply in kept] == [answer.problem.id for answer in asked]
    assert run() == kept and len(batches) == 4
    # With effects, which the kept replies do not have, it is another sweep.
    assert [reply.ids for reply in run(kept)] == [reply.ids for reply in kept]
    assert len(batches) == 8
    run(new_tokens=4)
    assert len(batches) == 12
    with pytest.raises(SettingError, match=r"answers\.new_tokens"):
        run(new_tokens=small.lm.max_context)


def test_a_row_of_the_study_is_a_steered_generation(small: Study) -> None:
    """The row at scale -20, made again from the vector of the train answers' own residuals."""
    study, found = small, steering.steering(small).figures
    lm, every = study.lm, answers(study)
    means: dict[bool, list[Tensor]] = {True: [], False: []}
    for answer in every:
        if answer.problem.id in found["ids"]["train"]:
            with torch.inference_mode(), tap(lm, [8]) as taken:
                lm.decoder(input_ids=torch.tensor([answer.sequence]), use_cache=False)
            means[answer.correct].append(
                taken[HookPoint(8)][0, len(answer.prompt_ids) :].double().mean(0)
            )
    v = torch.stack(means[True]).mean(0) - torch.stack(means[False]).mean(0)
    right = []
    for answer in every:
        if answer.problem.id in found["ids"]["test"]:
            by = Steer("v", (v / v.norm()).numpy(), -20.0, "all")
            with intervened(lm, 8, by, [len(answer.prompt_ids)]):
                (alone,) = completions(
                    lm, [(answer.problem, answer.prompt_ids)], Asking(new_tokens=20)
                )
            right.append(alone.correct)
    assert sum(right) == next(
        row["right"] for row in found["rows"] if row["kind"] == "v" and row["scale"] == -20
    )
    # It is the vector that is shipped.
    shipped = torch.load(study.folder / "steering_vec_L8.pt", weights_only=True)
    torch.testing.assert_close(shipped, (v / v.norm()).float(), rtol=0, atol=1e-6)
    about = json.loads((study.folder / "steering_vec_L8.json").read_text())
    assert about["questions"] == found["ids"]["train"]
    assert not {*about["questions"]} & {*found["ids"]["dev"], *found["ids"]["test"]}
    assert (about["layer"], about["site"]) == (8, "resid_post")
    assert (about["answers"]["right"], about["answers"]["wrong"]) == tuple(
        len(means[label]) for label in (True, False)
    )


def labelled(path: Path, count: int, right: Callable[[int], bool]) -> str:
    lines = []
    for at, drawn in zip(range(count), tiny_problems("heldout"), strict=False):
        solution = {"solution": f"{drawn.steps}\n#### {drawn.answer}", "is_correct": right(at)}
        lines.append(
            json.dumps(
                {
                    "question": drawn.question,
                    "ground_truth": str(drawn.answer),
                    "a": solution,
                    "b": solution,
                }
            )
        )
    path.write_text("\n".join(lines))
    return str(path)


def test_labelled_solutions_make_the_vector_and_the_model_answers(
    tiny_study: Tiny, tmp_path: Path
) -> None:
    source = labelled(tmp_path / "some.jsonl", 16, lambda at: at % 2 == 0)
    asked = {"questions": 16, "new_tokens": 3, "batch": 16}
    found = steering.steering(
        tiny_study(
            "steering", source, asked, scales=[5], n_random=1, n_shuffled=1, positions="prompt"
        )
    ).figures
    assert sum(found["answers_of_the_vector"].values()) == 2 * found["questions"]["train"]
    assert (
        sum(found["questions"].values()) == 16
        and found["rows"][0]["truncated"] == found["questions"]["test"]
    )
    with pytest.raises(SettingError, match=r"answers\.questions"):
        steering.steering(
            tiny_study("steering", labelled(tmp_path / "none.jsonl", 16, lambda _: False), asked)
        )


def test_no_other_layer_overwrites_a_vector(tiny_study: Tiny, tmp_path: Path) -> None:
    source = labelled(tmp_path / "some.jsonl", 8, lambda at: at % 2 == 0)
    asked = {"questions": 8, "new_tokens": 2, "batch": 8}
    few = {"scales": [5], "n_random": 1, "n_shuffled": 1, "train": 0.5}
    vectors = {}
    for layer in (8, 3, 8):
        study = tiny_study("steering", source, asked, layer=layer, **few)
        study.perform(steering.DEFINITION)
        shipped = torch.load(study.folder / f"steering_vec_L{layer}.pt", weights_only=True)
        assert torch.equal(vectors.setdefault(layer, shipped), shipped)
    every = study.folder.parent.glob("steering*/steering_vec_L*.pt")
    assert sorted(path.name for path in every) == ["steering_vec_L3.pt", "steering_vec_L8.pt"]


def test_the_cards_code_steers_as_the_study_does(
    tiny_study: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very block of the card, but for shorter answers, beside the study's own hook."""
    source = labelled(tmp_path / "some.jsonl", 8, lambda at: at % 2 == 0)
    asked = {"questions": 8, "new_tokens": 2, "batch": 8}
    few = {"scales": [5], "n_random": 1, "n_shuffled": 1, "train": 0.5}
    study = tiny_study("steering", source, asked, layer=3, **few)
    study.perform(steering.DEFINITION)
    exactly = {"dtype": torch.float32}  # bfloat16 rounds otherwise with a mask than without
    for auto, given in (
        (transformers.AutoModelForCausalLM, exactly),
        (transformers.AutoTokenizer, {}),
    ):
        of_folder = partial(auto.from_pretrained, MODEL_DIR, **given)
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, of=of_folder, **__: of())
    published = tmp_path / "publish"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: published / file)
    lm = models.load(models.ModelConfig(EMBEDDED, dtype="float32"), head=True)
    about = study.folder / "steering_vec_L3.json"
    provenance = json.loads(about.read_text())
    answered = set()
    for positions, scale in (("all", 30.0), ("generated", -30.0), ("prompt", 60.0), ("all", 0.0)):
        changed = {"positions": positions, "chosen_scale": scale, "best_scale_but_0": 1e-9}
        about.write_text(json.dumps(provenance | changed))
        results.seal(study.folder, digests.read(study.folder, "").about)
        files = prepare(study.subject.run, "somebody/an-sae", published)
        assert "studies/steering/steering_vec_L3.pt" in files
        card = (published / "README.md").read_text()
        assert ("chose 0" in card) == (scale == 0)
        blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
        code = next(block for block in blocks if "steering_vec" in block)
        found: dict[str, Any] = {}
        exec(code.replace("=256", "=6"), found)
        prompt = found["ids"][0].tolist()
        by = Steer("v", found["v"].double().numpy(), scale, positions)
        with intervened(lm, 3, by, [len(prompt)]):
            (written,) = generate(lm, [prompt], 6)
        answer = found["answer"][0, len(prompt) :].tolist()
        assert answer[: len(written.ids)] == written.ids and len(written.ids) > 3
        answered.add(tuple(answer))
    assert len(answered) == 4  # each edit has an effect of its own


def test_a_layer_that_is_not_there_is_refused(tiny_study: Tiny) -> None:
    study = tiny_study("steering", layer=12)
    with pytest.raises(SettingError, match=r"study\.layer"):
        steering.steering(study)
    assert not study.loaded  # before the model is loaded
