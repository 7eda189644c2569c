"""Right against wrong answers: what is averaged, compared, found and written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy import sparse

from residual_saes.analyze.questions import answering
from residual_saes.analyze.questions.problems import problem
from residual_saes.analyze.questions.split import in_discovery
from residual_saes.analyze.studies.contrast import choice
from residual_saes.analyze.studies.contrast import study as contrast
from residual_saes.analyze.studies.contrast.findings import figures
from residual_saes.analyze.studies.contrast.means import Means, answer_means, caa
from residual_saes.analyze.studies.contrast.study import Options, compare
from residual_saes.analyze.studies.contrast.words import summary
from residual_saes.analyze.study import Study
from residual_saes.data.errors import Interrupted, SettingError, StopRequest, StoreError
from residual_saes.data.tiny import problems as tiny

LAYERS, D, F = 4, 20, 60


def made_up(n: int = 90, *, seed: int = 0, each: int = 1) -> Means:
    """Answers that say nothing of their labels, `each` to a question."""
    rng = np.random.default_rng(seed)
    return Means(
        hidden=rng.normal(size=(n, LAYERS, D)).astype(np.float32),
        features=sparse.csr_array(
            (rng.random((n, F)) * (rng.random((n, F)) < 0.3)).astype(np.float32)
        ),
        length=rng.integers(20, 200, n),
        finished=rng.random(n) < 0.9,
        correct=rng.random(n) < 0.6,
        question=np.repeat([f"q{i}" for i in range(-(-n // each))], each)[:n],
    )


def compared(means: Means, **options: int):
    stop = StopRequest()
    return compare(
        means, ["generated"] * len(means.correct), Options(**{"permutations": 199, **options}), stop
    )


# -- means -----------------------------------------------------------------------------------------


@pytest.fixture
def study(tiny_study) -> Study:
    return tiny_study("contrast", permutations=99)


@pytest.fixture
def answers(study: Study) -> list[answering.Answer]:
    found = answering.answers(study)
    return [*found, replace(found[3], ids=[], text="")]


def test_means_are_those_of_each_answer_read_alone(
    study: Study, answers: list[answering.Answer]
) -> None:
    found = answer_means(study, answers, StopRequest())
    lm, sae, layer = study.lm, study.subject.sae, study.subject.layer
    assert found.hidden.shape == (65, lm.n_layers, lm.d_model)
    for number in (0, 3, 17, 64):
        answer = answers[number]
        with torch.no_grad():
            states = lm.decoder(
                torch.tensor([answer.sequence]), output_hidden_states=True
            ).hidden_states
        # The last entry has gone through the final norm.
        alone = (
            torch.stack(states[1:-1])[:, 0, len(answer.prompt_ids) :]
            if answer.ids
            else torch.stack(states[1:-1])[:, 0, -1:]
        )
        np.testing.assert_allclose(found.hidden[number, :-1], alone.mean(1), rtol=1e-3, atol=1e-4)
        dense = torch.zeros(alone.shape[1], sae.d_sae)
        kept = sae.encode(alone[layer])
        dense[kept.rows, kept.indices] = kept.values
        np.testing.assert_allclose(
            found.features[[number]].toarray()[0], dense.mean(0), rtol=1e-3, atol=1e-3
        )
    assert (found.correct == [answer.correct for answer in answers]).all()
    assert (found.length == [len(answer.ids) for answer in answers]).all()
    assert found.question[64] == found.question[3] == answers[3].problem.id


def test_every_answer_is_read_once_and_never_again(
    study: Study, answers: list[answering.Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = replace(study, loaded={})  # its own model, to be counted
    read: list[int] = []
    study.lm.decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    kept = study.subject.run / "studies" / "kept"
    for folder in kept.glob("means-*"):
        shutil.rmtree(folder)
    first = answer_means(study, answers, StopRequest())
    assert sum(read) == len(answers)
    again = answer_means(study, answers, StopRequest())
    assert sum(read) == len(answers)
    assert (again.hidden == first.hidden).all() and (again.features != first.features).nnz == 0
    torch.from_numpy(again.hidden[:, 2])  # without a warning that it cannot be written to

    answer_means(study, answers[:5], StopRequest())  # other answers
    assert sum(read) == len(answers) + 5
    next(kept.glob("means-*/features.npz")).write_bytes(b"damaged")
    for some in (answers, answers[:5]):
        assert answer_means(study, some, StopRequest()).hidden.shape[0] == len(some)
    assert sum(read) in (2 * len(answers) + 5, len(answers) + 10)


def test_means_of_nothing_and_of_too_long_answers_are_refused(
    study: Study, answers: list[answering.Answer]
) -> None:
    with pytest.raises(SettingError, match=r"answers\.questions"):
        answer_means(study, [], StopRequest())
    with pytest.raises(SettingError, match=r"answers\.new_tokens"):
        answer_means(
            study, [replace(answers[0], ids=[5] * (study.lm.max_context + 1))], StopRequest()
        )


def test_a_request_to_stop_is_heard(study: Study, answers: list[answering.Answer]) -> None:
    stop = StopRequest()
    stop.signum = 15
    with pytest.raises(Interrupted):
        answer_means(study, answers[:7], stop)
    with pytest.raises(Interrupted):
        compare(made_up(), ["generated"] * 90, Options(), stop)


def test_caa_is_the_difference_of_means_with_norm_one() -> None:
    means = made_up()
    x = means.hidden[:, 1].astype(np.float64)
    expected = x[means.correct].mean(0) - x[~means.correct].mean(0)
    found = caa(means.hidden[:, 1], means.correct)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected))


def test_equal_means_give_no_direction() -> None:
    with pytest.raises(StoreError, match="problems"):
        caa(np.ones((4, 3)), np.array([True, True, False, False]))


# -- what is compared ------------------------------------------------------------------------------


def test_answers_without_tokens_and_questions_without_both_labels_are_left_out() -> None:
    means = made_up(60)
    means.length[7] = 0
    kept, paired = contrast.comparable(means)
    assert not paired and set(range(60)) - set(kept) == {7}

    means = made_up(60, each=3)
    means.correct[:] = np.tile([True, False, True], 20)
    means.correct[3:6] = True
    means.length[7] = 0  # the only wrong one of its question
    kept, paired = contrast.comparable(means)
    assert paired and set(range(60)) - set(kept) == {3, 4, 5, 6, 7, 8}


def test_too_few_of_a_kind_are_refused() -> None:
    means = made_up(60)
    means.correct[:] = np.arange(60) < 56
    with pytest.raises(SettingError, match=r"answers\.questions"):
        compared(means)
    means.correct[:] = True
    with pytest.raises(SettingError, match=r"answers\.questions"):
        compared(means)


def chosen_of(means: Means) -> tuple[choice.Choice, dict]:
    rows = np.arange(len(means.correct))
    permuting = {"paired": False, "shuffles": 99, "seed": 0}
    found = choice.choose(means, rows, 0.5, 5, permuting, StopRequest().check)
    return found, choice.figures(found, means)


def test_the_labels_of_one_part_choose_and_those_of_the_other_judge() -> None:
    means = made_up(160)
    means.hidden[:, 2, 3] += 2 * means.correct
    side = in_discovery(means.question, 0.5)
    part = np.where(side, "train", "test")
    for given in (means, means._replace(part=part)):
        chosen = chosen_of(given)[1]
        assert set(chosen["ids"]) == set(means.question[side])
        flipped = given._replace(correct=np.where(side, given.correct, ~given.correct))
        second = chosen_of(flipped)[1]
        for key in ("dimensions", "helpful", "harmful"):
            for row, other in zip(chosen[key], second[key], strict=True):
                assert row | {"d": 0, "p": 0, "q": 0} == other | {"d": 0, "p": 0, "q": 0}
                assert row["d"] == pytest.approx(-other["d"])
    # In one file, what chooses nothing is of all questions; in two, all is of the test questions.
    in_parts = figures(compared(means._replace(part=part), permutations=19))
    assert set(in_parts["questions"]) == set(means.question[~side])
    in_one = figures(compared(means, permutations=19))
    assert (in_parts["answers"], in_one["answers"]) == ((~side).sum(), 160)


def test_what_chance_chose_has_no_effect_where_it_is_judged() -> None:
    p = []
    for seed in range(20):
        chosen = chosen_of(made_up(120, seed=seed))[1]
        p += [chosen[key]["p"] for key in ("dimensions_carried", "helpful_carried")]
        where_chosen = np.mean([row["d_where_chosen"] for row in chosen["helpful"]])
        assert where_chosen > 0.3 > abs(chosen["helpful_carried"]["d"])
    assert np.sum(np.array(p) <= 0.05) <= 6  # of 40; P(more | 5 %) = 0.003


@pytest.mark.parametrize("option", ["permutations", "min_firing", "seed", "discovery"])
def test_options_that_cannot_be_are_refused(option: str) -> None:
    with pytest.raises(SettingError, match=f"study.{option}=-1"):
        Options(**{option: -1})


# -- what is found ---------------------------------------------------------------------------------


def test_a_planted_direction_and_planted_features_are_found_where_they_are() -> None:
    means = made_up(200)
    means.hidden[:, 2, [3, 11]] += 2 * means.correct[:, None]
    dense = means.features.toarray()
    dense[means.correct, 5] += 1
    dense[~means.correct, 8] += 1
    means = means._replace(features=sparse.csr_array(dense))
    found = compared(means)
    measured = figures(found)
    for kind in ("raw", "adjusted"):
        peak = measured[kind]["peak"]
        assert peak["layer"] == 2 and peak["p"] == 1 / 200
        assert list(measured[kind]["dimensions_below_5_percent"]) == [0, 0, 2, 0]
        assert measured[kind]["p_of_layer"][2] == 1 / 200
        assert measured["features"][kind]["p"] == 1 / 200
    assert tuple(measured["peak_rank"]["rank_interval"]) == (1, 1)
    assert measured["peak_rank"]["share_of_peaks"][2] > 0.95
    chosen = choice.figures(found.choice, means)
    assert (chosen["helpful"][0]["feature"], chosen["harmful"][0]["feature"]) == (5, 8)
    assert chosen["peak_layer"] == 2
    assert {row["dimension"] for row in chosen["dimensions"][:2]} == {3, 11}
    for row in (*chosen["dimensions"][:2], chosen["helpful"][0], chosen["harmful"][0]):
        assert row["p"] == 1 / 200 and row["q"] <= 0.05 and abs(row["d"]) > 1
    rest = chosen["dimensions"][2:]  # too large where they were chosen, and nothing elsewhere
    assert min(abs(row["d_where_chosen"]) for row in rest) > 0.1
    assert abs(np.mean([np.sign(row["d_where_chosen"]) * row["d"] for row in rest])) < 0.15
    assert chosen["dimensions_carried"]["p"] == 1 / 200


def test_with_shuffled_labels_nothing_is_found() -> None:
    measured = figures(compared(made_up(200, seed=3)))
    assert measured["raw"]["peak"]["p"] > 0.05 and measured["features"]["raw"]["p"] > 0.05
    assert abs(measured["halves"][0]["carried"]) < 0.2
    low, high = measured["peak_rank"]["rank_interval"]
    assert (low, high) != (1, 1)


def test_what_length_explains_is_gone_at_equal_length() -> None:
    means = made_up(200)
    longer = np.log(means.length) - np.log(means.length).mean()
    means = means._replace(correct=longer + np.random.default_rng(0).normal(0, 0.5, 200) > 0)
    means.hidden[:, 1] += longer[:, None].astype(np.float32)
    measured = figures(compared(means))
    assert measured["raw"]["peak"]["p"] <= 0.01 < 0.05 < measured["adjusted"]["peak"]["p"]
    assert (
        measured["covariates"]["log length"]["d"] > 1
        and measured["covariates"]["log length"]["p"] <= 0.01
    )


def test_what_questions_explain_is_gone_within_them() -> None:
    """Questions differ by how many answers are right; answers to one question do not differ."""
    means, rng = made_up(240, each=4), np.random.default_rng(0)
    rights = rng.integers(1, 4, 60)
    means.correct[:] = np.concatenate([rng.permutation(np.arange(4) < right) for right in rights])
    means.hidden[:, 1] += 3 * np.repeat(rights, 4)[:, None]
    within, across = (
        figures(compared(labelled))
        for labelled in (means, means._replace(question=np.arange(240).astype(str)))
    )
    assert within["within_questions"] and not across["within_questions"]
    assert across["raw"]["peak"]["p"] == 1 / 200
    assert min(within[kind]["peak"]["p"] for kind in ("raw", "adjusted")) > 0.05
    means.hidden[:, 3, 4] += means.correct
    assert figures(compared(means))["adjusted"]["peak"]["layer"] == 3


def test_covariates_are_what_differs() -> None:
    means = made_up(60)._replace(finished=np.ones(60, bool))
    writers = ["a", "b", "c"] * 20
    found = compare(means, writers, Options(permutations=19), StopRequest())
    assert list(found.covariates) == ["log length", "by b", "by c"]
    assert found.covariates["by b"].tolist() == [0, 1, 0] * 20


def test_features_that_hardly_fire_are_not_tested() -> None:
    means = made_up()
    dense = means.features.toarray()
    dense[:, 10:] = 0
    dense[:4, 20] = dense[:5, 21] = 1
    found = compared(means._replace(features=sparse.csr_array(dense)))
    assert found.features.ids.tolist() == [*range(10), 21]
    none = compared(means._replace(features=sparse.csr_array((90, F), dtype=np.float32)))
    assert figures(none)["features"]["tested"] == 0 and figures(none)["features"]["raw"] is None
    of_choice = choice.figures(none.choice, means)
    assert of_choice["helpful"] == of_choice["harmful"] == []
    assert len(summary(figures(none) | {"chosen": of_choice})) == 7  # there are words for it, too


# -- the whole study -------------------------------------------------------------------------------


def performed(study: Study):
    return study.perform(contrast.DEFINITION)


def test_the_study_leaves_lists_and_pictures(study: Study) -> None:
    outcome = performed(study)
    means = answer_means(study, answering.answers(study), StopRequest())
    side = in_discovery(means.question, 0.5)
    assert not list(study.folder.glob("steering_vec*"))  # study=steering ships vectors
    d = np.load(study.folder / "cohens_d.npy")
    for layer in range(study.lm.n_layers):
        assert outcome.figures["raw"]["top_d"][layer] == pytest.approx(
            np.sort(np.abs(d[layer]))[-10:].mean(), rel=1e-5
        )
    written = json.loads(
        (study.folder / f"contrastive_features_L{study.subject.layer}.json").read_text()
    )
    assert written["layer"] == study.subject.layer
    assert set(written["ids"]) == set(means.question[side])
    assert not set(written["ids"]) & set(written["judged_by"]["ids"])
    for key, sign in (("helpful", 1), ("harmful", -1)):
        values = [sign * feature["d_where_chosen"] for feature in written[key]]
        assert values == sorted(values, reverse=True) and values[-1] > 0
    assert pq.read_table(study.folder / "features.parquet").num_rows > 10
    assert set(outcome.pictures) == {"contrast", "contrast_adjusted"}
    assert all(picture.svg.startswith("<svg") for picture in outcome.pictures.values())
    json.loads((study.folder / "contrast.json").read_text())

    before = (study.folder / "contrast.json").read_bytes()
    (study.folder / "contrast.json").unlink()
    performed(study)
    assert (study.folder / "contrast.json").read_bytes() == before


def test_labelled_solutions_are_compared_within_questions(tiny_study, tmp_path: Path) -> None:
    lines = []
    for drawn, _ in zip(tiny.problems("heldout"), range(12), strict=False):
        right, wrong = tiny.solution(drawn), f"{drawn.steps}\n#### {drawn.answer + 1}"
        labelled = {
            "a": {"solution": right, "is_correct": True},
            "b": {"solution": wrong, "is_correct": False},
        }
        labelled |= {"c": {"solution": wrong + "0", "is_correct": False}}
        lines.append(
            json.dumps({"question": drawn.question, "ground_truth": str(drawn.answer), **labelled})
        )
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(lines))
    study = tiny_study("contrast", str(path), permutations=99)
    outcome = performed(study)
    assert outcome.figures["within_questions"]
    assert (outcome.figures["answers"], outcome.figures["right"]) == (36, 12)
    assert outcome.figures["adjusted"] is None  # who wrote it says whether it is right
    assert set(outcome.pictures) == {"contrast"}

    # In two files, the first chooses, and all figures are of the second.
    for name, part in (("train", lines[:6]), ("test", lines[6:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    parted = performed(tiny_study("contrast", str(tmp_path), permutations=99)).figures
    ids = [problem(json.loads(line)["question"], "0").id for line in lines]
    assert set(parted["chosen"]["ids"]) == set(ids[:6])
    assert set(parted["questions"]) == set(parted["chosen"]["judged_by"]["ids"]) == set(ids[6:])
