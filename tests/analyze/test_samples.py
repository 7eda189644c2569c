"""Several answers to a question, drawn at a temperature; and folders of train and test problems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from residual_saes.analyze.language_model import Sampling, generate, logits
from residual_saes.analyze.questions import answering, problems
from residual_saes.analyze.questions.answering import Asking
from residual_saes.analyze.stats import bootstrap_ratio, wilson
from residual_saes.analyze.studies import gsm8k
from residual_saes.data.errors import Interrupted, SettingError, StopRequest, StoreError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.tiny.problems import problem as tiny_problem
from residual_saes.harvest.model import LanguageModel, ModelConfig, load

DRAWN = {"questions": 4, "samples": 3, "temperature": 3.0, "new_tokens": 8}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(ModelConfig(EMBEDDED, dtype="float32"), head=True)


# -- draws -----------------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_softmax_at_the_temperature(lm: LanguageModel) -> None:
    prompt = [lm.tokenizer.bos, *lm.tokenizer.encode(["Question: Tom has 3"])[0]]
    ((_, of_prompt),) = logits(lm, [prompt])
    rows = 400
    for temperature in (0.7, 3.0):
        expected = (of_prompt[-1].double() / temperature).softmax(0).numpy()
        uniform = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) / rows
        drawn = generate(lm, [prompt] * rows, 1, (), Sampling(temperature, uniform))
        ends = np.array([not row.ids for row in drawn])
        ids = np.array([row.ids[0] for row in drawn if row.ids])
        share = np.bincount(ids, minlength=len(expected)) / rows
        share[lm.tokenizer.inner.eos_token_id] = ends.mean()
        # Evenly spread levels hit each token as often as its probability says, but for one.
        assert np.abs(share - expected).max() <= 1.01 / rows
        assert (share > 0).sum() >= 5


def test_a_draw_depends_on_seed_question_and_sample_alone(tiny_study) -> None:
    def texts(**changed: object) -> dict[tuple[str, int], str]:
        found = answering.answers(tiny_study("gsm8k", answers={**DRAWN, **changed}))
        return {(answer.problem.id, answer.sample): answer.text for answer in found}

    whole = texts(batch=12)
    assert list(whole) == [
        (problem.id, sample) for problem in problems.read("tiny", 4) for sample in range(3)
    ]
    assert len(set(whole.values())) >= 9
    assert texts(batch=5) == whole
    fewer = texts(samples=2, questions=3)
    assert fewer == {key: whole[key] for key in fewer}
    shorter = texts(new_tokens=3)
    assert all(whole[key].startswith(text) for key, text in shorter.items())
    other = texts(seed=1)
    assert sum(other[key] != text for key, text in whole.items()) >= 9


def test_a_stopped_draw_goes_on_as_if_it_had_not_been(tiny_study) -> None:
    asked = {**DRAWN, "seed": 7, "questions": 3, "batch": 4}
    study, stop = tiny_study("gsm8k", answers=asked), StopRequest()
    generated = study.lm.causal.generate

    def stopping(**call: object) -> object:
        stop.signum = 15
        return generated(**call)

    study.lm.causal.generate = stopping
    with pytest.raises(Interrupted):
        answering.answers(study, stop)
    study.lm.causal.generate = generated
    found = answering.answers(study)
    undisturbed = answering.answers(tiny_study("gsm8k", answers={**asked, "batch": 9}))
    assert [answer.text for answer in found] == [answer.text for answer in undisturbed]


def test_what_cannot_be_drawn_is_one_line() -> None:
    for asked in ({"samples": 2}, {"temperature": -1.0}, {"temperature": float("nan")}):
        (name,) = asked
        with pytest.raises(SettingError, match=f"answers.{name}"):
            Asking(**asked)
    with pytest.raises(SettingError, match=r"answers\.samples"):
        Asking(samples=0, temperature=1.0)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("gsm8k", {}, (1, 0.0)),
        ("contrast", {"samples": None, "temperature": None}, (1, 0.0)),
        ("gsm8k", {"samples": 3}, (3, 1.0)),
        ("gsm8k", {"temperature": 0.5}, (1, 0.5)),
        ("stage_gate", {}, (8, 1.0)),
        ("rollouts", {"samples": None, "temperature": None}, (8, 1.0)),
        ("rollouts", {"samples": 4}, (4, 1.0)),
        ("rollouts", {"samples": 1}, (1, 0.0)),
        ("stage_gate", {"temperature": 0.7}, (8, 0.7)),
        ("stage_gate", {"temperature": 0}, (1, 0.0)),
        ("stage_gate", {"samples": 2, "temperature": 0.3}, (2, 0.3)),
    ],
)
def test_what_is_not_given_is_as_the_study_has_it(
    tiny_study, name: str, given: dict, expected: tuple[int, float]
) -> None:
    asking = answering.asking_of(tiny_study(name, answers=given))
    assert (asking.samples, asking.temperature) == expected
    said = tiny_study(name, answers=dict(zip(("samples", "temperature"), expected, strict=True)))
    assert answering.inputs(tiny_study(name, answers=given)) == answering.inputs(said)


def test_what_is_given_is_obeyed_or_refused(tiny_study, labelled: Path) -> None:
    with pytest.raises(SettingError, match=r"answers\.samples"):
        answering.asking_of(tiny_study("rollouts", answers={"samples": 8, "temperature": 0}))
    for name in ("rollouts", "stage_gate", "gsm8k"):
        own = answering.inputs(tiny_study(name, str(labelled)))
        assert own == answering.inputs(tiny_study("gsm8k", str(labelled)))
        assert answering.number_of(tiny_study(name, str(labelled))) == 2
        with pytest.raises(SettingError, match=r"answers\.temperature"):
            answering.inputs(tiny_study(name, str(labelled), {"samples": 8}))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    solution = {"solution": "3 + 4 = 7", "is_correct": True}
    line = {"question": "What is 3 + 4?", "ground_truth": "7", "a": solution, "b": solution}
    path = tmp_path / "labelled.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return path


def test_answers_kept_before_are_found_again() -> None:
    before = {"prompt": "lm_eval", "questions": 1319, "new_tokens": 512, "batch": 32}
    assert Asking().record() == before
    assert Asking(temperature=0.5).record() == {**before, "temperature": 0.5}


# -- the study's interval --------------------------------------------------------------------------


def test_copies_of_an_answer_make_no_interval_narrower() -> None:
    rng = np.random.default_rng(0)
    has = (rng.random(60) < 0.4).astype(np.float64)
    question = [str(number) for number in range(60)]
    alone = gsm8k._interval(question, has)
    copies = gsm8k._interval(question * 8, np.tile(has, 8))
    assert alone == wilson(int(has.sum()), 60)
    # `sums_by` sorts the questions, which are resampled by their place.
    by_name = has[np.argsort(question)]
    assert copies == bootstrap_ratio(by_name, np.ones(60))
    width = copies.high - copies.low
    assert width > 2 * np.subtract(*wilson(8 * int(has.sum()), 480)[::-1])
    assert gsm8k._interval(question * 8, np.ones(480)) == wilson(60, 60)


def test_the_study_says_how_many_questions_answers_are_of(tiny_study) -> None:
    outcome = tiny_study("gsm8k", answers=DRAWN).perform(gsm8k.DEFINITION)
    assert (outcome.figures["answers"], outcome.figures["questions"]) == (12, 4)
    assert "12 answers to 4 questions" in outcome.summary[0]
    assert "Wilson" not in outcome.summary[0]


# -- folders ---------------------------------------------------------------------------------------


def write(path: Path, numbers: range) -> None:
    drawn = [tiny_problem("heldout", number) for number in numbers]
    lines = [json.dumps({"question": item.question, "answer": item.answer}) for item in drawn]
    path.write_text("\n".join(lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", range(5))
    write(tmp_path / "test.jsonl", range(10, 14))
    return tmp_path


def test_a_folder_has_train_and_test_problems(folder: Path) -> None:
    found = problems.read(str(folder), 3)
    assert [item.part for item in found] == ["train"] * 3 + ["test"] * 3
    (alone, *_) = problems.read(str(folder / "test.jsonl"), 3)
    assert alone.part is None and alone.id == found[3].id
    assert "part" not in alone.record() and found[3].record()["part"] == "test"


def test_answers_of_a_folder_are_those_of_its_files(tiny_study, folder: Path) -> None:
    few = {"questions": 4, "new_tokens": 24}
    both = answering.answers(tiny_study("gsm8k", problems=str(folder), answers=few))
    assert [answer.problem.part for answer in both] == ["train"] * 4 + ["test"] * 4
    alone = tiny_study("gsm8k", problems=str(folder / "test.jsonl"), answers=few)
    found = answering.answers(alone)
    assert not alone.loaded  # kept for both
    assert [answer.text for answer in found] == [answer.text for answer in both[4:]]
    outcome = tiny_study("gsm8k", problems=str(folder), answers=few).perform(gsm8k.DEFINITION)
    assert outcome.figures["answers"] == 4
    asked = outcome.figures["right"] + outcome.figures["wrong"]
    assert set(asked) == {answer.problem.id for answer in found}


def test_a_folder_that_cannot_be_split_is_refused(folder: Path) -> None:
    write(folder / "train.jsonl", range(12))
    with pytest.raises(StoreError, match=r"test\.jsonl"):
        problems.read(str(folder), 99)
    problems.read(str(folder), 5)  # none of these is asked twice
    solved = {"question": "1 + 1?", "ground_truth": 2, "a": {"solution": "2", "is_correct": True}}
    (folder / "train.jsonl").write_text(json.dumps(solved))
    with pytest.raises(StoreError, match="labelled"):
        problems.read(str(folder), 99)
    (folder / "train.jsonl").unlink()
    with pytest.raises(SettingError, match=r"train\.jsonl"):
        problems.read(str(folder), 99)
