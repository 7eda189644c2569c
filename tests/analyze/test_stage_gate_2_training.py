"""Training of stage gate 2: arms, advantages, rewards, TRL's loss, resume at every moment."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residual_saes.analyze.latents.chosen import ChosenFeatures
from residual_saes.analyze.latents.reward import read_alone
from residual_saes.analyze.questions.answering import asking_of, problems_of, prompts_of
from residual_saes.analyze.questions.problems import Problem
from residual_saes.analyze.studies.stage_gate_2 import rollouts as rollouts_module
from residual_saes.analyze.studies.stage_gate_2.advantages import of_tokens, of_trajectories
from residual_saes.analyze.studies.stage_gate_2.arms import TOKEN, TRAJECTORY, Arm, Options, arms
from residual_saes.analyze.studies.stage_gate_2.rewards import Rewards, Worth
from residual_saes.analyze.studies.stage_gate_2.rollouts import Rollouts, asked_in
from residual_saes.analyze.studies.stage_gate_2.training import policy, trained
from residual_saes.analyze.study import Study
from residual_saes.data import durable
from residual_saes.data.errors import Interrupted, SettingError, StopRequest

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the extra `grpo` is not installed"
)
SMALL = {"steps": 3, "batch": 1, "rollouts": 2, "lr": [1e-3], "seeds": 2, "checkpoint": 2}
DRAWN = {"temperature": 1, "samples": 2, "questions": 20, "new_tokens": 24}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of features of the tiny run's SAE, as study=contrast leaves it."""
    path = tmp_path_factory.mktemp("features") / "features.json"
    helpful, harmful = range(0, 40, 2), range(1, 40, 2)
    sides = {"helpful": helpful, "harmful": harmful}
    lists = {name: [{"feature": number} for number in side] for name, side in sides.items()}
    path.write_text(json.dumps(lists))
    return str(path)


@pytest.fixture
def study(tiny_study: Callable[..., Study]) -> Study:
    return tiny_study("stage_gate_2", answers=DRAWN)


def training(study: Study) -> list[Problem]:
    return [item for item in problems_of(study, asking_of(study)) if isinstance(item, Problem)]


# -- arms ------------------------------------------------------------------------------------------


def test_every_arm_has_all_rates_and_seeds() -> None:
    options = Options(lr=[1e-6, 3e-6], seeds=3)
    every = arms(options)
    assert len({arm.name for arm in every}) == len(every) == 9 * 2 * 3
    tables = {(arm.reward, arm.level): set() for arm in every}
    for arm in every:
        tables[arm.reward, arm.level].add((arm.lr, arm.seed))
    assert len(tables) == 9
    assert all(runs == tables["R0", "trajectory"] for runs in tables.values())
    # The table is whole for each seed before the next one begins.
    assert [arm.seed for arm in every] == sorted(arm.seed for arm in every)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rewards", ["R7"]),
        ("rewards", []),
        ("levels", "token"),
        ("lr", [0.0]),
        ("lr", [1e-6, 1e-6]),
        ("lr", 1e-6),
        ("rollouts", 1),
        ("steps", 0),
        ("seeds", 0),
        ("weight", float("nan")),
        ("beta", -1.0),
        ("together", 3),
        ("lora", 0),
        ("checkpoint", 0),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"study.{setting}="):
        Options(**{setting: value})


@pytest.mark.parametrize(("library", "more"), [("trl", {}), ("peft", {"lora": 4})])
def test_a_missing_library_is_refused_before_anything_is_read(
    study: Study, monkeypatch: pytest.MonkeyPatch, library: str, more: dict[str, int]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    if library != "trl":
        monkeypatch.setitem(sys.modules, "trl", sys)  # whether it is there or not
    with pytest.raises(SettingError, match=f"{library}.* pip install"), StopRequest() as stop:
        Rewards.of(study, Options(**more), [], stop)


def test_greedy_rollouts_are_refused(tiny_study: Callable[..., Study], features: str) -> None:
    greedy = tiny_study("stage_gate_2", answers={"temperature": 0})
    with pytest.raises(SettingError, match=r"answers\.temperature=0"), StopRequest() as stop:
        Rewards.of(greedy, Options(features=features), training(greedy), stop)


def test_arms_of_a_seed_have_the_same_questions_in_the_same_order(study: Study) -> None:
    problems = training(study)
    asked = [asked_in(problems, 0, step, 4) for step in range(10)]
    again = [asked_in(problems, 0, step, 4) for step in range(10)]
    other = [asked_in(problems, 1, step, 4) for step in range(10)]
    assert asked == again != other
    # All are asked once before any is asked again.
    flat = [item.id for questions in asked for item in questions]
    assert sorted(flat[:20]) == sorted(item.id for item in problems) == sorted(flat[20:])
    assert flat[:20] != flat[20:]


# -- advantages ------------------------------------------------------------------------------------


def test_advantages_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=5).astype(np.float32)
    trajectories = of_trajectories(torch.from_numpy(rewards)).numpy()
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(trajectories, expected, rtol=1e-5)

    outcomes = np.array([1.0, 0.0, 0.0, 1.0], np.float32)
    z = [rng.normal(size=size).astype(np.float32) for size in (3, 1, 4, 2)]
    mean = np.concatenate(z).mean()
    base = (outcomes - outcomes.mean()) / (outcomes.std(ddof=1) + 1e-4)
    for own, values, level in zip(
        of_tokens(torch.from_numpy(outcomes), [some.tolist() for some in z], 0.3),
        z,
        base,
        strict=True,
    ):
        np.testing.assert_allclose(own.numpy(), level + 0.3 * (values - mean), rtol=1e-4, atol=1e-6)


def test_a_token_without_a_value_has_the_outcome_alone() -> None:
    nan = float("nan")
    found = of_tokens(torch.tensor([1.0, 0.0]), [[2.0, nan], [0.0, nan]], 0.5)
    base = of_trajectories(torch.tensor([1.0, 0.0]))
    assert [float(own[1]) for own in found] == base.tolist()
    assert [float(own[0]) for own in found] == [float(base[0]) + 0.5, float(base[1]) - 0.5]
    assert of_tokens(None, [[], [nan]], 1.0)[1].tolist() == [0.0]


def test_an_equal_outcome_leaves_r0_still_and_what_is_added_is_scaled_up() -> None:
    """What advantages.py says of questions that are all right or all wrong."""
    assert of_trajectories(torch.ones(4)).abs().max() == 0
    z = torch.tensor([1.0, -1.0, 0.5, 0.0])
    small, large = of_trajectories(1 + 0.1 * z), of_trajectories(1 + 1.0 * z)
    torch.testing.assert_close(small, large, rtol=1e-2, atol=1e-2)
    tokens = of_tokens(torch.ones(4), [[float(value)] for value in z], 0.1)
    assert max(float(own.abs()) for own in tokens) < 0.12


# -- rewards ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewards_of(features: str) -> Callable[[Study], Rewards]:
    made: dict[str, Rewards] = {}

    def of(study: Study) -> Rewards:
        key = json.dumps(study.answers, sort_keys=True)
        if key not in made:
            options = Options(**SMALL, features=features)
            with StopRequest() as stop:
                made[key] = Rewards.of(study, options, training(study), stop)
        return made[key]

    return of


def test_rewards_are_in_units_of_the_untrained_models_answers(
    study: Study, rewards_of: Callable[[Study], Rewards]
) -> None:
    from residual_saes.analyze.questions.answering import answers

    rewards = rewards_of(study)
    own = [answer for answer in answers(study) if answer.ids]
    for reward in ("R1", "R2", "R3", "R4"):
        arm = Arm(reward, "trajectory", 1e-3, 1)
        worth = [rewards.worth(arm, answer.prompt_ids, answer.ids) for answer in own]
        z = np.array([some.z for some in worth])
        assert abs(z.mean()) < 1e-5 and abs(z.std(ddof=1) - 1) < 1e-5
        tokens = np.concatenate([some.tokens for some in worth])
        assert abs(tokens.mean()) < 1e-5 and abs(tokens.std(ddof=1) - 1) < 1e-5
        # A mean over tokens, in its own units: the same order as the means of z by token.
        means = [np.mean(some.tokens) for some in worth]
        assert np.corrcoef(means, z)[0, 1] > 1 - 1e-9
    empty = rewards.worth(Arm("R1", "token", 1e-3, 0), own[0].prompt_ids, [])
    assert empty == Worth(0.0, 0.0, [])


def test_random_latents_are_as_dense_and_differ_by_seed(
    study: Study, rewards_of: Callable[[Study], Rewards]
) -> None:
    rewards = rewards_of(study)
    chosen: ChosenFeatures = rewards.chosen
    first, second = rewards.fitted["random"]
    every = {*chosen.helpful, *chosen.harmful}
    assert first != second and len(set(first)) == len(every)
    assert not every & {*first, *second}
    weights = rewards.of_arm(Arm("R3", "token", 1e-3, 0)).reward.weights
    assert weights.sum() == 0 and weights.abs().sum() == len(every)
    assert weights[first[: len(chosen.helpful)]].tolist() == [1.0] * len(chosen.helpful)


def test_the_direction_is_from_wrong_to_right_within_questions(
    study: Study, rewards_of: Callable[[Study], Rewards]
) -> None:
    from residual_saes.analyze.questions.answering import answers

    by_question: dict[str, list[tuple[bool, np.ndarray]]] = {}
    for answer in answers(study):
        rows = read_alone(study.lm, study.subject.layer, answer.prompt_ids, answer.ids)
        pair = (answer.correct, rows.double().mean(0).numpy())
        by_question.setdefault(answer.problem.id, []).append(pair)
    right, wrong = [], []
    for pairs in by_question.values():
        if len({correct for correct, _ in pairs}) == 2:
            middle = np.mean([row for _, row in pairs], axis=0)
            for correct, row in pairs:
                (right if correct else wrong).append(row - middle)
    direction = np.mean(right, axis=0) - np.mean(wrong, axis=0)
    found = np.array(rewards_of(study).fitted["direction"])
    np.testing.assert_allclose(found, direction / np.linalg.norm(direction), atol=1e-5)


# -- the loss of TRL -------------------------------------------------------------------------------


def made(study: Study, rewards: Rewards, arm: Arm, folder: Path, **more: Any) -> Rollouts:
    asking = asking_of(study)
    problems = training(study)
    prompts = prompts_of(study, problems, asking)
    options = Options(**{**SMALL, **more})
    return Rollouts(arm, options, asking, rewards, problems, prompts, folder, StopRequest())


@needs_trl
@pytest.mark.parametrize("level", [pytest.param(TRAJECTORY, marks=pytest.mark.long), TOKEN])
def test_trls_loss_is_that_of_a_plain_loop(
    study: Study, rewards_of: Callable[[Study], Rewards], tmp_path: Path, level: str
) -> None:
    """Loss and gradient of TRL's trainer on our inputs, in two backward passes of a step."""
    from residual_saes.analyze.studies.stage_gate_2 import trainer as trainers
    from residual_saes.analyze.studies.stage_gate_2.training import _fresh

    arm = Arm("R1", level, 1e-3, 0)
    several = made(
        study, rewards_of(study), arm, tmp_path / "steps", batch=2, together=2, weight=0.5
    )
    lm, model = _fresh(study, None)
    with torch.no_grad():  # a policy that has moved, so that there is a KL
        noise = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=noise)
    own = several.of(0, lm)
    told = trainers.config(tmp_path / "out", arm, several.options, 1.0, "cpu")
    trainer = trainers.Trainer(model, lm.tokenizer.inner, told, lambda _: several.inputs(own))
    trainer.current_gradient_accumulation_steps = 2
    model.train()
    total = 0.0
    for _ in range(2):
        inputs = trainer._prepare_inputs(None)
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        total += float(loss.detach())
        trainer._step += 1
    found = {name: value.grad.clone() for name, value in model.named_parameters()}

    model.zero_grad()
    expected = torch.tensor(0.0)
    tokens = sum(len(rollout.written) for rollout in own)
    for rollout, advantages in zip(own, several.advantages(own), strict=True):
        prompt = several.prompts[rollout.question]
        ids = torch.tensor([prompt + rollout.written])
        log_p, reference = (
            some.causal(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(1)
            for some in (lm, study.lm)
        )
        chosen = torch.tensor(rollout.written)[:, None]
        log_p, reference = log_p.gather(1, chosen)[:, 0], reference.gather(1, chosen)[:, 0].detach()
        ratio = (log_p - log_p.detach()).exp()
        kl = (reference - log_p).exp() - (reference - log_p) - 1
        gained = ratio * (advantages - several.options.beta * kl)
        expected = expected - gained.sum() / tokens
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-6)
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-5)


# -- resume ----------------------------------------------------------------------------------------


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "policy.safetensors").read_bytes()).hexdigest()


def train(
    study: Study, rewards: Rewards, arm: Arm, stop: StopRequest | None = None, **more: Any
) -> Path:
    options = Options(**{**SMALL, **more})
    return trained(study, arm, options, rewards, training(study), stop or StopRequest()).folder


class Killed(BaseException):
    """As a kill: what handles exceptions does not handle it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int | None) -> list[str]:
    """The names of the files that are written durably from now on; before that `number` it ends."""
    seen: list[str] = []
    write = durable.write

    def counted(path: Path, parts: Any) -> None:
        if len(seen) == number:
            raise Killed
        seen.append(path.name)
        write(path, parts)

    monkeypatch.setattr(durable, "write", counted)
    return seen


@pytest.fixture
def slow(tiny_study: Callable[..., Study]) -> Study:
    """Half of a step's rollouts are written at a time."""
    return tiny_study("stage_gate_2", answers={**DRAWN, "batch": 1})


@pytest.fixture
def kept(slow: Study) -> Iterator[Callable[[], None]]:
    """Removes what training keeps of the run, before and after."""

    def remove() -> None:
        for folder in (slow.subject.run / "studies" / "kept").glob("stage_gate_2_training-*"):
            shutil.rmtree(folder)

    remove()
    yield remove
    remove()


ARM = Arm("R1", "token", 1e-3, 0)
WRITES = ["000000.jsonl", "000000.jsonl", "000001.jsonl", "000001.jsonl", "digests.json"]
WRITES += ["000002.jsonl", "000002.jsonl", "digests.json", "policy.safetensors", "curve.jsonl"]
WRITES += ["digests.json"]


@needs_trl
@pytest.mark.long
def test_a_training_killed_at_any_moment_ends_as_one_that_was_not(
    slow: Study,
    rewards_of: Callable[[Study], Rewards],
    kept: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_kills(slow, rewards_of(slow), kept, monkeypatch, range(len(WRITES)))


def check_kills(
    study: Study,
    rewards: Rewards,
    kept: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    numbers: Any,
    **more: Any,
) -> None:
    drawn: list[int] = []
    generate = rollouts_module.generate

    def counted(lm: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        drawn.append(len(prompts))
        return generate(lm, prompts, *rest, **more)

    monkeypatch.setattr(rollouts_module, "generate", counted)
    with monkeypatch.context() as whole:
        seen = kill_at(whole, None)
        expected = digest(train(study, rewards, ARM, **more))
        assert seen == WRITES
    assert sum(drawn) == 3 * 2
    for number in numbers:
        kept()
        drawn.clear()
        with monkeypatch.context() as killed:
            kill_at(killed, number)
            with pytest.raises(Killed):
                train(study, rewards, ARM, **more)
        assert digest(train(study, rewards, ARM, **more)) == expected
        # What is drawn again is what was not on the disk: one at most.
        assert 6 <= sum(drawn) <= 7
    # What is there is not trained again.
    drawn.clear()
    assert digest(train(study, rewards, ARM, **more)) == expected and not drawn


@needs_trl
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_adapters_are_trained_loaded_and_resumed(
    slow: Study,
    rewards_of: Callable[[Study], Rewards],
    kept: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards = rewards_of(slow)
    check_kills(slow, rewards, kept, monkeypatch, [6], lora=2)
    options = Options(**SMALL, lora=2)
    done = trained(slow, ARM, options, rewards, training(slow), StopRequest())
    lm = policy(slow, done)
    moved = [name for name, _ in lm.causal.named_parameters() if ".lora_B." in name]
    assert moved and all(lm.causal.get_parameter(name).abs().max() > 0 for name in moved)


@needs_trl
@pytest.mark.long
def test_a_damaged_checkpoint_and_a_stop_change_nothing(
    slow: Study,
    rewards_of: Callable[[Study], Rewards],
    kept: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewards = rewards_of(slow)
    expected = train(slow, rewards, ARM)
    weights, curve = digest(expected), (expected / "curve.jsonl").read_bytes()
    kept()
    stop = StopRequest()
    write = durable.write

    def signalled(path: Path, parts: Any) -> None:
        write(path, parts)
        if path.name == "digests.json":
            stop.signum = 2

    monkeypatch.setattr(durable, "write", signalled)
    with pytest.raises(Interrupted):
        train(slow, rewards, ARM, stop)
    (checkpoint,) = expected.glob("checkpoints/checkpoint-*")
    weight = checkpoint / "model.safetensors"
    weight.write_bytes(weight.read_bytes()[:-1])
    capsys.readouterr()
    assert digest(train(slow, rewards, ARM)) == weights
    assert (expected / "curve.jsonl").read_bytes() == curve
    said = capsys.readouterr()
    assert "{" not in said.out + said.err and "arning" not in said.out + said.err
