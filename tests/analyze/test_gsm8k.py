"""Problems, prompts, grading, and answers that are generated once."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from residual_saes.analyze import results
from residual_saes.analyze.questions import answering, problems
from residual_saes.analyze.questions.problems import Problem, Solution
from residual_saes.analyze.studies import gsm8k
from residual_saes.analyze.study import Study
from residual_saes.data.errors import (
    Interrupted,
    MismatchError,
    SettingError,
    StopRequest,
    StoreError,
)
from residual_saes.data.tiny.problems import problem as tiny_problem
from residual_saes.harvest.model import ModelConfig
from tests.harvest.models import save_model

SHARED = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="GSM8K's files are not here")


# -- grading ---------------------------------------------------------------------------------------


def test_one_question_has_no_interval() -> None:
    """Two answers to it depend on each other, and resampling it gives it again."""
    assert gsm8k._interval(["q", "q"], np.array([1.0, 0.0])) is None
    assert gsm8k._interval(["q"], np.array([1.0])) is not None  # Wilson's


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("3 + 4 = 7\n#### 7", "7", "7"),
        ("#### 1,234.", "1234", "1234"),
        ("#### -5 and then #### 9", "-5", "9"),  # the first, the last
        ("It costs $12.50.", None, "12.50"),
        ("no number at all", None, None),
        ("####7", None, "7"),  # the space belongs to it
        ("so 7 apples", None, "7"),
        ("#### $18", None, "18"),  # the strict pattern knows no dollar
    ],
)
def test_grades_are_those_of_the_evaluation_harness(
    text: str, strict: str | None, flexible: str | None
) -> None:
    assert problems.strict(text) == strict
    assert problems.flexible(text) == flexible


@shared
def test_gsm8ks_own_solutions_are_all_right() -> None:
    for name, count in (("train", 7473), ("test", 1319)):
        lines = [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text().splitlines()]
        found = problems.read(str(SHARED / f"{name}.jsonl"), count)
        assert len(found) == len({line["question"] for line in lines})
        right = {line["question"]: line["answer"] for line in lines}
        for problem in found:
            assert problems.strict(right[problem.question]) == problem.answer
            assert re.fullmatch(r"-?\d+(\.\d+)?", problem.answer)


@shared
def test_labelled_solutions_are_read_as_they_are() -> None:
    found = problems.read(str(SHARED / "example_model_solutions.jsonl"), 10_000)
    assert len(found) == 5276 and sum(solution.correct for solution in found) == 2001
    graded = [problems.flexible(solution.text) == solution.problem.answer for solution in found]
    assert sum(
        a == solution.correct for a, solution in zip(graded, found, strict=True)
    ) > 0.99 * len(found)
    assert len(problems.read(str(SHARED / "example_model_solutions.jsonl"), 7)) == 28


def test_lines_that_are_no_problems_are_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    good = '{"question": "q", "answer": "1"}\n'
    for line in ("{", "[]", '{"question": "q"}', '{"question": "q", "answer": "none"}'):
        file.write_text(good + line)
        with pytest.raises(StoreError, match=f"{re.escape(str(file))} line 2"):
            problems.read(str(file), 9)
    labelled = '{"question": "r", "answer": "2", "m": {"is_correct": true}}'
    for content in ("", good + labelled):
        file.write_text(content)
        with pytest.raises(StoreError, match=re.escape(str(file))):
            problems.read(str(file), 9)
    with pytest.raises(SettingError, match="problems=nowhere"):
        problems.read("nowhere", 9)


def test_an_id_is_of_the_question_alone_and_the_first_of_equals_counts(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [
        '{"question": "q", "answer": 1}',
        "",
        '{"question": "r", "answer": "2"}',
        '{"question": "q", "answer": 3}',
    ]
    file.write_text("\n".join(lines))
    assert problems.read(str(file), 9) == [problems.problem("q", "1"), problems.problem("r", "2")]
    assert problems.problem("q", "7").id == problems.problem("q", "1").id
    assert problems.read(str(file), 1) == [problems.problem("q", "1")]


# -- answers ---------------------------------------------------------------------------------------


def test_no_tiny_problem_comes_twice() -> None:
    found = problems.read("tiny", 1319)
    assert len(found) == len({problem.id for problem in found}) == 1319
    drawn = list(dict.fromkeys(tiny_problem("heldout", n).question for n in range(1400)))
    assert len(set(drawn[:1319])) < 1400 and [problem.question for problem in found] == drawn[:1319]


def is_loaded(study: Study) -> bool:
    """Whether the study has needed its language model."""
    return bool(study.loaded)


def test_answers_are_kept_and_used_again(tiny_study) -> None:
    study = tiny_study("gsm8k", answers={"questions": 12, "batch": 7})
    first = answering.answers(study)
    assert [answer.problem.question for answer in first] == [
        tiny_problem("heldout", n).question for n in range(12)
    ]
    for number, answer in enumerate(first):
        assert answer.correct == (
            problems.strict(answer.text) == str(tiny_problem("heldout", number).answer)
        )
        assert answer.finished
    assert 4 <= sum(answer.correct for answer in first) < 12
    again = tiny_study("contrast", answers={"questions": 12, "batch": 7})
    assert answering.answers(again) == first
    assert not is_loaded(again)


def test_a_stopped_generation_goes_on_behind_its_last_batch(
    tiny_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study("gsm8k", answers={"questions": 5, "batch": 2, "new_tokens": 8})
    stop = StopRequest()
    generate = study.lm.causal.generate
    batches: list[int] = []

    def counted(**call):
        batches.append(len(call["input_ids"]))
        stop.signum = 15 if len(batches) == 1 else None
        return generate(**call)

    monkeypatch.setattr(study.lm.causal, "generate", counted)
    with pytest.raises(Interrupted):
        answering.answers(study, stop)
    assert batches == [2]
    stopped = answering.answers(study)
    assert batches == [2, 2, 1]
    for folder in (study.subject.run / "studies" / "kept").glob("answers-*"):
        shutil.rmtree(folder)
    assert answering.answers(study) == stopped  # as if it had not been disturbed
    assert len(batches) == 6


def test_other_settings_lose_nothing(tiny_study) -> None:
    folder = tiny_study("gsm8k").subject.run / "studies" / "kept"
    before = {path.parent.name: path.read_bytes() for path in folder.glob("answers-*/*.jsonl")}
    answering.answers(
        tiny_study("gsm8k", answers={"questions": 3, "prompt": "chat", "new_tokens": 4})
    )
    after = {path.parent.name: path.read_bytes() for path in folder.glob("answers-*/*.jsonl")}
    assert len(after) == len(before) + 1
    assert all(after[name] == data for name, data in before.items())


def test_the_limit_truncates(tiny_study) -> None:
    cut = answering.answers(tiny_study("gsm8k", answers={"questions": 3, "new_tokens": 3}))
    assert not any(answer.finished or answer.correct for answer in cut)
    assert all(answer.unparsable and len(answer.ids) == 3 for answer in cut)


def test_labelled_solutions_need_no_generation(
    tiny_study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "solved.jsonl"
    solved = {
        "a": {"solution": "1 + 1 = 2\nA: 2", "is_correct": True},
        "b": {"solution": "3", "is_correct": False},
    }
    file.write_text(json.dumps({"question": "1 + 1?", "ground_truth": "A: 2", **solved}))
    assert problems.read(str(file), 5) == [
        Solution(
            Problem(problems.problem("1 + 1?", "2").id, "1 + 1?", "2"),
            name,
            fields["solution"],
            fields["is_correct"],
        )
        for name, fields in solved.items()
    ]
    study = tiny_study("gsm8k", problems=str(file))
    monkeypatch.setattr(study.lm.causal, "generate", None)
    found = answering.answers(study)
    assert [(answer.correct, answer.source, answer.finished) for answer in found] == [
        (True, "a", True),
        (False, "b", True),
    ]
    cut = answering.answers(tiny_study("gsm8k", problems=str(file), answers={"new_tokens": 3}))
    assert [(len(answer.ids), answer.finished) for answer in cut] == [(3, False), (2, True)]
    assert (
        study.lm.tokenizer.inner.decode(found[0].sequence)
        == "<bos>Question: 1 + 1?\nAnswer: 1 + 1 = 2\nA: 2"
    )
    drawn = tiny_study("gsm8k", problems=str(file), answers={"samples": 8, "temperature": 1})
    with pytest.raises(SettingError, match=r"answers\.samples"):
        answering.answers(drawn)


def test_what_cannot_be_asked_is_one_line(tiny_study) -> None:
    for asked in (
        {"prompt": "cot"},
        {"batch": 0},
        {"new_tokens": 2000},  # more than the model's context
        {"new_tokens": 0.5},
        {"tokens": 5},
    ):
        (name,) = asked
        with pytest.raises(SettingError, match=f"answers.{name}"):
            answering.answers(tiny_study("gsm8k", answers=asked))


# -- the study -------------------------------------------------------------------------------------


def test_the_study_is_done_once_and_read_back_whole(
    tiny_study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study("gsm8k", answers={"questions": 10})
    first = study.perform(gsm8k.DEFINITION)
    right = sum(answer.correct for answer in answering.answers(study))
    assert first.figures["strict"]["count"] == right == len(first.figures["right"])
    assert sorted(first.figures["right"] + first.figures["wrong"]) == sorted(
        answer.problem.id for answer in answering.answers(study)
    )
    again = study.perform(replace(gsm8k.DEFINITION, run=lambda _: pytest.fail("done again")))
    assert again.summary == first.summary
    assert first.summary[0] in (study.folder / "gsm8k.md").read_text()
    (result,) = results.of_study(study.subject.run, "gsm8k")[:1]
    assert result.settings["answers"]["questions"] == 10
    other = tiny_study("gsm8k", answers={"questions": 4})
    assert other.perform(gsm8k.DEFINITION).figures["answers"] == 4


def test_a_torn_result_is_done_again(tiny_study) -> None:
    study = tiny_study("gsm8k", answers={"questions": 4})
    whole = study.perform(gsm8k.DEFINITION)
    path = study.folder / "gsm8k.json"
    path.write_text(path.read_text()[:-30])
    assert study.perform(gsm8k.DEFINITION).summary == whole.summary
    assert json.loads(path.read_bytes())["summary"] == whole.summary


def test_another_model_is_refused(tiny_study, tmp_path: Path) -> None:
    study = replace(
        tiny_study("gsm8k"), model=ModelConfig(str(save_model(tmp_path, "llama")), dtype="float32")
    )
    with pytest.raises(MismatchError, match="weights"):
        _ = study.lm
