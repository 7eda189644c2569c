"""study=intervene: planted outcomes, null data, its verdict, its choices, and a planted latent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residual_saes.analyze.changes.intervention import LatentChange
from residual_saes.analyze.changes.replies import Reply, Row
from residual_saes.analyze.language_model import residuals
from residual_saes.analyze.latents.chosen import GATE
from residual_saes.analyze.latents.directions import gain
from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.questions.answering import answers
from residual_saes.analyze.questions.split import split_of
from residual_saes.analyze.stats import hedges_g
from residual_saes.analyze.studies.contrast.means import answer_means, caa
from residual_saes.analyze.studies.intervene import choosing, words
from residual_saes.analyze.studies.intervene import study as intervene
from residual_saes.analyze.studies.intervene.outcomes import (
    CHOSEN,
    CONTROLS,
    NOTHING,
    Attribution,
    Dose,
    Findings,
    Measured,
    best_of,
    share_kept,
)
from residual_saes.analyze.studies.intervene.probability import (
    Text,
    firing,
    first_order,
    log_probabilities,
    of_number,
    whole,
)
from residual_saes.analyze.studies.intervene.study import Options, correlated
from residual_saes.analyze.study import Study
from residual_saes.analyze.subject import Subject
from residual_saes.data import durable
from residual_saes.data.errors import Interrupted, SettingError, StopRequest, StoreError
from residual_saes.data.site import HookPoint
from residual_saes.data.tiny.problems import problems as tiny_problems
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.site import tap
from residual_saes.train.ports import recorded_ports
from residual_saes.train.sae import SAE
from tests.analyze.test_reward import write_gate
from tests.analyze.test_steering import Counted

Tiny = Callable[..., Study]
ABLATE, ADD = Dose("ablate", 0.0), Dose("add", 3.0)


class Shown:
    """The parts of a `Swept` that rows read."""

    def __init__(self, kind: str, dose: Dose) -> None:
        self.kind, self.scale, self.positions = kind, dose.scale, "all"


def row(right: Sequence[bool], before: Sequence[bool], kind: str, dose: Dose) -> Row:
    """One reply per question; what is unchanged has the tokens of before."""

    def replies(given: Sequence[bool], ids: int, **effect: float) -> list[Reply]:
        return [
            Reply(str(at), [ids], bool(own), False, True, **effect) for at, own in enumerate(given)
        ]

    unsteered = replies(before, 1)
    kl = 0.0 if kind == NOTHING else 0.5
    after = replies(right, 1 if kind == NOTHING else 2, kl=kl, norm=30.0, relative=0.1)
    return Row.of(Shown(kind, dose), after, unsteered)


def findings(
    before: Sequence[bool],
    chosen: dict[Dose, Sequence[bool]],
    controls: dict[Dose, Sequence[Sequence[bool]]],
    dev: dict[Dose, Sequence[int]] | None = None,
    dev_right: int = 10,
) -> Findings:
    """Of outcomes by dose; each kind of control has the same."""
    unsteered = Row.of(
        None, *[[Reply(str(at), [1], bool(own), False, True) for at, own in enumerate(before)]] * 2
    )
    measured = [Measured(NOTHING, Dose("add", 0.0), row(before, before, NOTHING, ADD))]
    for dose, right in chosen.items():
        measured.append(Measured(CHOSEN, dose, row(right, before, CHOSEN, dose)))
        for kind in CONTROLS:
            for other in controls[dose]:
                measured.append(Measured(kind, dose, row(other, before, kind, dose)))
    latents = [{"feature": 7, "score": 1.5, "density": 0.1, "mean": 3.0}]
    return Findings(
        unsteered=unsteered,
        measured=measured,
        dev=dev or {dose: [8 + (at > 0)] for at, dose in enumerate(chosen)},
        dev_right=dev_right,
        latents=latents,
        controls=[(3,)],
        attribution=attribution(),
        selection={"by": "contrast", "side": "helpful", "of": 30, "positions": "all"},
        ids={"train": ["a"], "dev": ["b"], "test": [str(at) for at in range(len(before))]},
        layer=5,
        seed=0,
    )


@cache  # 0.5 s
def attribution() -> Attribution:
    return correlated([7, 8, 9], [0.1, 0.2, 0.3], [0.1, 0.25, 0.2], 5)


def mask(right: int, of: int = 40) -> list[bool]:
    return [at < right for at in range(of)]


# -- the verdict -----------------------------------------------------------------------------------


def test_the_verdict_needs_more_than_what_controls_do() -> None:
    given = {
        "lowers": (5, [25] * 20),
        "raises": (40, [25] * 20),
        "not shown": (5, [25] * 10 + [4] * 10),
        "no effect": (24, [25] * 20),
    }
    sentences = set()
    for word, (right, others) in given.items():
        found = findings(mask(25), {ADD: mask(right)}, {ADD: [mask(other) for other in others]})
        assert found.verdict == word
        assert found.figures()["verdict"] == word
        summary = words.summary(found)
        assert summary[1] == words.RULE
        sentences.add(summary[0])
    assert len(sentences) == len(given)
    outcome = words.outcome(found)
    assert outcome.figures["rule"] == words.RULE and "<svg" in outcome.pictures["intervene"].svg
    few = findings(mask(25), {ADD: mask(5)}, {ADD: [mask(25)] * 3})
    assert few.verdict == "not shown" and "too few" in words.summary(few)[0]


def test_controls_that_gain_what_the_latents_lose_count_against_them() -> None:
    found = findings(mask(20), {ADD: mask(5)}, {ADD: [mask(36)] * 20})
    assert found.ranks[CONTROLS[0]].as_far == 20 and found.verdict == "not shown"


def test_either_kind_of_control_can_keep_a_verdict_back() -> None:
    before, after = mask(25), mask(5)
    for kind in CONTROLS:
        whole_set = findings(before, {ADD: after}, {ADD: [before] * 20})
        rows = [
            one._replace(row=row(after, before, kind, ADD)) if one.kind == kind else one
            for one in whole_set.measured
        ]
        assert (whole_set.verdict, replace(whole_set, measured=rows).verdict) == (
            "lowers",
            "not shown",
        )


def test_holm_is_over_all_doses() -> None:
    doses = [Dose("add", float(scale)) for scale in range(1, 9)]
    one = {ADD: mask(19)}  # six lost: p = .031
    assert findings(mask(25), one, {ADD: [mask(25)] * 20}).verdict == "lowers"
    many = {
        ADD: mask(19),
        **dict.fromkeys(doses[:2], mask(25)),
        **dict.fromkeys(doses[3:], mask(25)),
    }
    found = findings(mask(25), many, {dose: [mask(25)] * 20 for dose in many})
    assert found.best == ADD and found.holm[ADD] == pytest.approx(8 * 2 * 0.5**6)
    assert found.verdict == "no effect"


def test_a_hook_that_changes_something_with_nothing_to_add_is_broken() -> None:
    found = findings(mask(25), {ADD: mask(5)}, {ADD: [mask(25)] * 20})
    changed = found.measured[0]._replace(row=replace(found.measured[0].row, kl=1e-9))
    broken = replace(found, measured=[changed, *found.measured[1:]])
    assert broken.verdict == "broken"
    assert "trusted" in words.summary(broken)[0]


def test_the_dose_is_the_strongest_that_controls_bear() -> None:
    doses = Options().rows
    shares = [1.0, 0.95, 0.9, 0.8, 0.8, 0.3, 0.1]
    assert best_of(dict(zip(doses, shares, strict=True))) == doses[3]  # the first of equals
    assert best_of(dict(zip(doses, [0.1, 0.7, *[0.2] * 5], strict=True))) == doses[1]
    assert share_kept([8, 6], 10) == pytest.approx(0.7) and share_kept([0, 0], 0) == 1.0
    strong = findings(
        mask(25),
        dict.fromkeys(doses, mask(5)),
        {dose: [mask(25)] * 20 for dose in doses},
        {dose: [2, 4] for dose in doses},
    )
    assert "study.doses" in " ".join(words.summary(strong))


# -- null data -------------------------------------------------------------------------------------


def shares_of_verdicts(kind: str, sets: int, seed: int, strength: float = 0.0) -> dict[str, float]:
    """Verdicts of planted data sets: 80 test and 32 dev questions, 7 doses, 20 controls each.

    Args:
        kind: `flips`: each change turns answers over at random, as many gained as lost expected.
            `breaks`: each set of latents or direction costs answers by a strength of its own,
            drawn alike for chosen ones and controls, so that most doses change accuracy.
            `breaks at a dose`: the same, with another strength at each dose.
        strength: by how much more the chosen ones break answers.
    """
    rng = np.random.default_rng(seed)
    doses = Options().rows
    counts: dict[str, int] = {}
    for _ in range(sets):
        before = {"dev": rng.random(32) < 0.63, "test": rng.random(80) < 0.63}
        # Of the chosen ones, of two times 20 controls, and of four others for dev, by dose.
        own = rng.gamma(0.5, size=(45, len(doses) if kind == "breaks at a dose" else 1))
        own[0] += strength
        own = np.broadcast_to(own, (45, len(doses)))

        def after(part: str, place: int, dose: Dose, before=before, own=own) -> Any:
            right = before[part]
            if kind == "flips":
                share = 0.1 * (1 + dose.scale)
                odds = np.where(right, 1, right.mean() / (1 - right.mean()))
                return right ^ (rng.random(len(right)) < odds * share)
            rate = 0.3 * own[place, doses.index(dose)] * (0.3 + dose.scale)
            return right & (rng.random(len(right)) < np.exp(-rate))

        dev = {dose: [int(after("dev", at, dose).sum()) for at in range(41, 45)] for dose in doses}
        found = findings(before["test"], {}, {}, dev, int(before["dev"].sum()))
        nothing = row(before["test"], before["test"], NOTHING, ADD)
        measured = [Measured(NOTHING, Dose("add", 0.0), nothing)]
        for dose in doses:
            own_row = row(after("test", 0, dose), before["test"], CHOSEN, dose)
            measured.append(Measured(CHOSEN, dose, own_row))
        for start, control in ((1, CONTROLS[0]), (21, CONTROLS[1])):
            for place in range(start, start + 20):
                right = after("test", place, found.best)
                control_row = row(right, before["test"], control, found.best)
                measured.append(Measured(control, found.best, control_row))
        verdict = replace(found, measured=measured).verdict
        counts[verdict] = counts.get(verdict, 0) + 1
    return {word: count / sets for word, count in counts.items()}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["flips", "breaks", "breaks at a dose"])
def test_null_data_seldom_pass_for_a_change(kind: str) -> None:
    shares = shares_of_verdicts(kind, 200, 0)
    assert (
        shares.get("raises", 0) + shares.get("lowers", 0) <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5
    )
    assert shares_of_verdicts("breaks", 50, 1, strength=10.0)["lowers"] > 0.8


def test_a_few_null_data_sets_do_not_pass() -> None:
    assert shares_of_verdicts("breaks", 2, 0).get("lowers", 0) == 0
    assert shares_of_verdicts("breaks", 2, 1, strength=20.0)["lowers"] == 1


# -- probabilities of given answers ----------------------------------------------------------------


@pytest.fixture
def study(tiny_study: Tiny) -> Study:
    return tiny_study("intervene", "tiny", {"questions": 24, "new_tokens": 48, "batch": 24})


def right_texts(study: Study, count: int) -> list[Text]:
    right = [answer for answer in answers(study) if answer.correct]
    return [whole(answer.prompt_ids, answer.ids) for answer in right[:count]]


def test_probabilities_are_those_of_whole_passes(study: Study) -> None:
    lm, sae = study.lm, study.subject.sae
    texts = [text._replace(first=3, last=9) for text in right_texts(study, 3)]
    change = LatentChange(sae, "add", (5,), 4.0, "generated")
    plain = log_probabilities(lm, texts, 5, None, StopRequest())
    moved = log_probabilities(lm, texts, 5, change, StopRequest())
    for place, text in enumerate(texts):
        ids = torch.tensor([text.sequence])
        start = len(text.prompt)
        asked = torch.arange(start + 3, start + 9)
        with torch.inference_mode():
            log_p = lm.causal(ids, use_cache=False).logits[0].double().log_softmax(-1)
        assert plain[place] == pytest.approx(float(log_p[asked - 1, ids[0, asked]].sum()), abs=1e-3)
    assert (np.abs(moved - plain) > 1e-5).all()


def test_the_number_is_where_it_is_first_written(study: Study) -> None:
    tokenizer = study.lm.tokenizer
    given = {
        " There were 13 + 6 = 19 coins.\n#### 19": "19",
        " 6 + 56 = 62. 62\n#### 62": "62",
        " nothing\n#### 7": "7",
        " it is 250 or 25": "25",  # 250 begins with it
    }
    for text, number in given.items():
        ids = tokenizer.encode([text])[0]
        ids = ids[1:] if ids[0] == tokenizer.bos else ids
        found = of_number(tokenizer, [2], ids)
        assert found is not None
        inner = tokenizer.inner
        assert inner.decode(ids[found.first : found.last]).strip() == number
        before = inner.decode(ids[: found.first])
        assert not before[-1:].isdigit() and number not in before.replace("250", "")
    assert of_number(tokenizer, [2], tokenizer.encode([" no number"])[0]) is None


class Scaled:
    """A small part of a change, for differences."""

    def __init__(self, change: LatentChange, part: float) -> None:
        self.change, self.part, self.positions = change, part, change.positions

    def delta(self, _: LanguageModel) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda states: (self.part * self.change.exact(states)).to(states)


@pytest.mark.parametrize("positions", ["all", "generated", "prompt"])
def test_first_order_effects_are_differences_of_small_changes(study: Study, positions: str) -> None:
    lm, sae = study.lm, study.subject.sae
    texts = right_texts(study, 4)
    found = first_order(lm, sae, 5, texts, positions, StopRequest())
    largest = np.argsort(-np.abs(found.ablating))[:3].tolist()
    for feature in largest:
        for name, change in (("ablating", "ablate"), ("adding", "add")):
            whole_change = LatentChange(sae, change, (feature,), 1.0, positions)
            sides = [
                log_probabilities(lm, texts, 5, Scaled(whole_change, part), StopRequest()).sum()
                for part in (0.01, -0.01)
            ]
            slope = (sides[0] - sides[1]) / 0.02
            assert getattr(found, name)[feature] == pytest.approx(slope, rel=0.05, abs=2e-3)
    assert np.abs(found.ablating[largest]).min() > 0.01


def test_firing_is_counted(study: Study) -> None:
    lm, sae = study.lm, study.subject.sae
    sequences = [answer.sequence for answer in answers(study)[:3]]
    found = firing(lm, sae, 5, sequences, StopRequest())
    dense = []
    for ids in sequences:
        with torch.inference_mode(), tap(lm, [5]) as taken:
            lm.decoder(input_ids=torch.tensor([ids]), use_cache=False)
        rows = taken[HookPoint(5)][0, 1:].float()
        kept = sae.encode(rows)
        dense.append(
            torch.zeros(len(rows), sae.d_sae).index_put((kept.rows, kept.indices), kept.values)
        )
    values = torch.cat(dense).double().numpy()
    assert found.density == pytest.approx((values > 0).mean(0), abs=1e-3)
    fires = found.density > 0.05
    by_hand = values.sum(0) / np.maximum((values > 0).sum(0), 1)
    assert found.mean[fires] == pytest.approx(by_hand[fires], rel=0.05)


def test_a_correlation_of_nothing_is_not_significant() -> None:
    rng = np.random.default_rng(0)
    p = [correlated(range(20), *rng.normal(size=(2, 20)).tolist(), 9).p for _ in range(2)]
    assert min(p) > 0.05
    same = correlated(range(20), [*range(20)], [at**3 for at in range(20)], 9)
    assert (same.rho, same.p) == (pytest.approx(1.0), pytest.approx(1 / 1001))
    constant = correlated([1, 2, 3], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0], 9)
    assert np.isnan(constant.rho) and constant.p == 1.0


# -- which latents ---------------------------------------------------------------------------------


def test_confidence_chooses_what_moves_right_answers_most(study: Study) -> None:
    lm, sae = study.lm, study.subject.sae
    train = answers(study)[:12]
    fires = firing(lm, sae, 5, [answer.sequence for answer in train], StopRequest())
    chosen = {
        side: choosing.by_confidence(study, train, fires, "all", side, 2, 6, StopRequest())
        for side in choosing.SIDES
    }
    texts = [whole(answer.prompt_ids, answer.ids) for answer in train if answer.correct]
    plain = log_probabilities(lm, texts, 5, None, StopRequest())
    for side, choice in chosen.items():
        for feature, score in zip(choice.features, choice.scores or (), strict=True):
            change = LatentChange(sae, "add", (feature,), float(fires.mean[feature]), "all")
            gain = (log_probabilities(lm, texts, 5, change, StopRequest()) - plain).mean()
            assert score == pytest.approx(gain, abs=1e-6)
            assert (score > 0) == (side == "helpful")
        assert list(choice.scores or ()) == sorted(choice.scores or (), key=lambda x: -abs(x))
    assert not {*chosen["helpful"].features} & {*chosen["harmful"].features}


def test_contrast_chooses_by_train_answers_alone(study: Study) -> None:
    train = answers(study)[:16]
    sides = {
        side: choosing.by_contrast(study, train, side, 3, 2, StopRequest())
        for side in choosing.SIDES
    }
    assert min(sides["helpful"].scores or (0,)) > 0 > max(sides["harmful"].scores or (0,))
    right = [answer for answer in train if answer.correct]
    with pytest.raises(SettingError, match=r"answers\.questions"):
        choosing.by_contrast(study, right, "helpful", 3, 2, StopRequest())


def test_the_gates_latents_are_judged_by_no_question_that_chose_them(
    study: Study, tmp_path: Path
) -> None:
    copied = replace(study.subject, run=tmp_path / "run")
    shutil.copytree(study.subject.run, copied.run)
    other = replace(study, subject=copied)
    options = Options(select="gate")
    with pytest.raises(StoreError, match=GATE):
        choosing.gate_of(other)
    split = split_of(answers(study), options.train, options.dev)
    chose = [split.dev[0].problem.id, *(answer.problem.id for answer in split.test[:3])]
    listed = {"helpful": [{"feature": 9}, {"feature": 4}], "harmful": [{"feature": 3}]}
    write_gate(copied.run, discovery={"ids": chose}, layer_of_features=5, **listed)
    choice = choosing.by_gate(other, "helpful", 1)
    assert (choice.features, choice.of) == ((9,), 2)
    left = intervene._without_choosers(other, options, split)
    assert [len(left.dev), len(left.test)] == [len(split.dev) - 1, len(split.test) - 3]
    assert intervene._without_choosers(other, Options(), split) == split
    gate = {"select": "gate"}
    assert intervene.DEFINITION.inputs(replace(other, options=gate))["gate"]
    assert [*intervene.DEFINITION.reads(replace(other, options=gate))] == [(copied.run, GATE)]
    assert not [*intervene.DEFINITION.reads(other)]


@pytest.mark.parametrize(
    "options",
    [
        {"select": "all"},
        {"side": "left"},
        {"positions": "end"},
        {"n_features": 0},
        {"n_random": 0},
        {"changes": []},
        {"changes": "ablate"},
        {"changes": ["cut"]},
        {"doses": [0]},
        {"doses": [1, 1.0]},
        {"doses": 3},
        {"doses": ["a"]},
        {"features": []},
        {"features": [1.5]},
        {"features": 7},
        {"train": 0.6, "dev": 0.4},
    ],
)
def test_options_that_cannot_be_right_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=f"study.{next(iter(options))}"):
        Options(**options)


def test_doses_are_tried_from_the_weakest() -> None:
    shown = [str(dose) for dose in Options(changes=["add", "ablate"], doses=[5, -1]).rows]
    assert shown == ["ablate", "add -1", "add 5"]


# -- the study -------------------------------------------------------------------------------------


def easy(path: Path) -> str:
    """Problems of one step, whose answers are short."""
    lines = []
    for drawn, _ in zip(tiny_problems("heldout"), range(400), strict=False):
        if drawn.kind in ("add", "multiply"):
            line = {"question": drawn.question, "answer": str(drawn.answer)}
            lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return str(path)


def test_the_study_end_to_end_stopped_and_continued(
    tiny_study: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {"questions": 16, "new_tokens": 12, "batch": 16}
    chosen = {"features": [4, 40], "changes": ["ablate", "add"], "doses": [2], "n_random": 1}
    small = tiny_study("intervene", easy(tmp_path / "easy.jsonl"), asked, train=0.4, **chosen)
    answers(small)
    counted = Counted(small.lm)
    monkeypatch.setattr(small.lm.causal, "generate", counted)
    counted.stop_at = 5
    with pytest.raises(Interrupted):
        intervene.intervene(small)
    counted.stop_at = None
    found = intervene.intervene(small)
    # On dev 1 + 2 doses of 4; on test 1 + nothing added + 2 doses of 3: not one sweep again.
    assert len(counted.batches) == 9 + 8
    assert dumped(asdict(intervene.intervene(small))) == dumped(asdict(found))
    assert len(counted.batches) == 17
    figures = found.figures
    assert [latent["feature"] for latent in figures["latents"]] == [4, 40]
    assert not {4, 40} & {*figures["controls"][0]}
    rows = figures["rows"]
    assert rows[0]["kind"] == NOTHING and not rows[0]["changed"] and rows[0]["kl"] == 0
    ids = figures["ids"]
    assert not {*ids["train"]} & {*ids["dev"], *ids["test"]} and not {*ids["dev"]} & {*ids["test"]}
    # A random direction is as long as what it stands for; a random latent gets the same values.
    by_kind = {(row["kind"], row["change"]): row["relative"] for row in rows}
    for change in ("ablate", "add"):
        own = by_kind[CHOSEN, change]
        assert by_kind[CONTROLS[1], change] == pytest.approx(own, rel=0.05)
    assert by_kind[CONTROLS[0], "add"] == pytest.approx(by_kind[CHOSEN, "add"], rel=0.5)
    sequences = [answer.sequence for answer in answers(small)]
    fires = firing(small.lm, small.subject.sae, 5, sequences, StopRequest())
    silent = int(np.flatnonzero(fires.density == 0)[0])
    with pytest.raises(SettingError, match=r"study\.features"):
        intervene.intervene(replace(small, options={**small.options, "features": [silent]}))


# -- a planted latent, and a bystander -------------------------------------------------------------


TOP = 11  # the last layer: what is written there is what the head reads


def planted(study: Study) -> Subject:
    """An SAE of the last layer whose latents 0 and 1 fire alike, by how right an answer looks.

    They read along the direction from wrong to right answers. Latent 0 writes along the mean of the
    digits' unembeddings, latent 1 along the direction that moves logits least. The others are the
    run's own, with thresholds.
    """
    lm, own = study.lm, study.subject.sae
    means = answer_means(study, answers(study), StopRequest())
    read = torch.from_numpy(caa(means.hidden[:, TOP], means.correct)).float()
    texts = right_texts(study, 16)
    rows = []
    for number, taken in residuals(lm, [text.sequence for text in texts], [TOP]):
        rows.append(taken[TOP][len(texts[number].prompt) - 1 :].float())
    states = torch.cat(rows)
    head = lm.causal.get_output_embeddings().weight.detach() * gain(
        lm.final_norm, lm.d_model, "cpu"
    )
    head = head - head.mean(0)
    digits = [lm.tokenizer.encode([f" {digit}"])[0][-1] for digit in range(10)]
    causal = torch.nn.functional.normalize(head[digits].mean(0), dim=0)
    inert = torch.linalg.eigh(head.T @ head).eigenvectors[:, 0]

    along = states @ read
    factor = (
        0.3 * float(states.norm(dim=1).mean()) / float((along - along.quantile(0.1)).relu().mean())
    )
    W_enc = torch.cat([read[:, None].repeat(1, 2) * factor, own.W_enc[:, :60]], 1)
    W_dec = torch.cat([causal[None], inert[None], own.W_dec[:60]])
    b_enc = torch.cat([-factor * along.quantile(0.1).repeat(2), torch.zeros(60)])
    threshold = (states @ W_enc + b_enc).quantile(0.3, dim=0).clamp_min(0)
    threshold[:2] = 0
    sae = SAE.of(W_enc, W_dec, b_enc, torch.zeros(lm.d_model), 8, threshold)
    ports = recorded_ports({**study.subject.config["settings"], "layer": TOP})
    digest = durable.digest(sae.W_dec.numpy().tobytes())
    return replace(study.subject, sae=sae, digest=digest, ports=ports)


@pytest.mark.long
def test_a_planted_causal_latent_changes_answers_and_a_bystander_does_not(
    tiny_study: Tiny, tmp_path: Path
) -> None:
    asked = {"questions": 80, "new_tokens": 20, "batch": 80}
    given = {"changes": ["ablate"], "positions": "generated", "dev": 0.1}
    study = tiny_study("intervene", easy(tmp_path / "easy.jsonl"), asked)
    subject = planted(study)
    found = {}
    for name, options in {
        "causal": {"features": [0]},
        "bystander": {"features": [1]},
    }.items():
        whole_study = replace(study, subject=subject, options={**given, **options})
        found[name] = intervene.intervene(whole_study)
    figures = {name: outcome.figures for name, outcome in found.items()}
    assert figures["causal"]["verdict"] == "lowers"
    assert figures["bystander"]["verdict"] == "no effect"
    # They fire alike, and both tell right answers from wrong ones.
    (causal,), (bystander,) = figures["causal"]["latents"], figures["bystander"]["latents"]
    assert causal["density"] == bystander["density"] and causal["mean"] == bystander["mean"]
    means = answer_means(whole_study, answers(whole_study), StopRequest())
    g = hedges_g(means.features[:, [0, 1]].toarray(), means.correct)
    assert g[0] == g[1] > 0.3
    # To first order too.
    (read, *_), (unread, *_) = (
        figures[name]["attribution"]["measured"] for name in ("causal", "bystander")
    )
    assert read < 10 * -abs(unread)
