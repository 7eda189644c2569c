"""The dense reward: its definition, a planted order, no influence of neighbours, TRL."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from residual_saes.analyze import results
from residual_saes.analyze.latents.reward import DenseReward
from residual_saes.analyze.questions.problems import problem
from residual_saes.data.errors import MismatchError, SettingError, StoreError
from residual_saes.data.model_path import EMBEDDED
from residual_saes.data.site import HookPoint
from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.data.tiny.problems import problems, prompt, solution
from residual_saes.harvest.model import LanguageModel, ModelConfig, load
from residual_saes.harvest.site import tap
from residual_saes.train.sae import SAE
from tests.analyze.conftest import TINY_LAYER

FLOAT32 = ModelConfig(EMBEDDED, dtype="float32")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(FLOAT32)


def texts(lm: LanguageModel, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts with BOS, and solutions, as ids."""
    some = [drawn for drawn, _ in zip(problems("heldout"), range(count), strict=False)]
    prompts = [
        [lm.tokenizer.bos, *ids] for ids in lm.tokenizer.encode([prompt(drawn) for drawn in some])
    ]
    return prompts, lm.tokenizer.encode([" " + solution(drawn) for drawn in some])


def residual(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    with tap(lm, [TINY_LAYER]) as taken, torch.inference_mode():
        lm.decoder(input_ids=torch.tensor([ids]), use_cache=False)
    return taken[HookPoint(TINY_LAYER)][0].float()


def random_sae(d: int, k: int = 8, f: int = 96) -> SAE:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(f, d, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    return SAE.of(W.T.contiguous(), W, torch.zeros(f), torch.zeros(d), k)


def test_rewards_are_the_definition(lm: LanguageModel) -> None:
    sae = random_sae(lm.d_model)
    weights = torch.randn(sae.d_sae, generator=torch.Generator().manual_seed(0))
    reward = DenseReward(lm, sae, TINY_LAYER, weights)
    prompts, completions = texts(lm, 4)
    for ids, before, found in zip(
        completions, prompts, reward.token_rewards(prompts, completions), strict=True
    ):
        h = residual(lm, before + ids)[len(before) :].double().numpy()
        pre = (h - sae.b_dec.numpy()) @ sae.W_enc.double().numpy() + sae.b_enc.numpy()
        expected = []
        for row in pre:
            top = np.argsort(-row)[: sae.k]
            expected.append(sum(max(row[i], 0) * float(weights[i]) for i in top))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    pooled = reward(
        [prompt(drawn) for drawn, _ in zip(problems("heldout"), range(4), strict=False)],
        [""] * 4,
        completions,
    )
    tokens = reward.token_rewards(prompts, completions)
    assert pooled == pytest.approx([float(rewards.mean()) for rewards in tokens], abs=1e-6)


def test_a_planted_reward_orders_completions(lm: LanguageModel) -> None:
    """A latent that reads one token's residuals pays a completion by how often it holds it."""
    prompts, completions = texts(lm, 60)
    (token,) = lm.tokenizer.encode([" left"])[0]
    rows = torch.cat(
        [
            residual(lm, before + ids)[len(before) :]
            for before, ids in zip(prompts, completions, strict=True)
        ]
    )
    here = torch.tensor([id_ for ids in completions for id_ in ids]) == token
    assert here.sum() > 10
    direction = rows[here].mean(0) - rows[~here].mean(0)
    unit = torch.cat([direction[None], -direction[None]]) / direction.norm()
    middle = (rows[here].mean(0) + rows[~here].mean(0)) / 2
    sae = SAE.of(unit.T.contiguous(), unit, torch.zeros(2), middle, 1)
    pay = DenseReward(lm, sae, TINY_LAYER, torch.tensor([1.0, 0.0]))
    question = "Question: Tina had 9 pears and gave 4 to Leo. How many pears are left?\nAnswer:"
    written = [
        " There are 9 - 4 = 5 pears",
        " There are 9 - 4 = 5 left",
        " There are 5 left left left",
    ]
    found = pay([question] * 3, written, lm.tokenizer.encode(written))
    assert found[0] < found[1] < found[2]
    fine = DenseReward(lm, sae, TINY_LAYER, torch.tensor([-1.0, 0.0]))
    assert fine([question] * 3, written, lm.tokenizer.encode(written)) == [
        -reward for reward in found
    ]


def test_batch_mates_change_nothing(lm: LanguageModel) -> None:
    """To the last bit, whatever is rewarded beside a completion, and in any order."""
    reward = DenseReward(lm, random_sae(lm.d_model), TINY_LAYER, torch.linspace(-1, 1, 96))
    prompts, completions = texts(lm, 12)
    together = reward.token_rewards(prompts, completions)
    order = np.random.default_rng(0).permutation(12)
    shuffled = reward.token_rewards([prompts[i] for i in order], [completions[i] for i in order])
    for at, number in enumerate(order):
        assert torch.equal(shuffled[at], together[number])
        assert torch.equal(
            reward.token_rewards([prompts[number]], [completions[number]])[0], together[number]
        )


def test_bos_stands_once_and_ends_do_not_count(lm: LanguageModel) -> None:
    reward = DenseReward(lm, random_sae(lm.d_model), TINY_LAYER, torch.linspace(-1, 1, 96))
    inner = lm.tokenizer.inner
    text, (ids,) = "Question: 3 + 4?\nAnswer:", lm.tokenizer.encode([" 7"])
    chat = [{"role": "user", "content": "How many are 3 + 4?"}]
    rendered = inner.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    plain, with_bos = reward([text, inner.bos_token + text], ["", ""], [ids, ids])
    assert plain == with_bos
    as_chat, as_text = reward([chat, rendered], ["", ""], [ids, ids])
    assert as_chat == as_text != plain
    ended = [
        [*ids, inner.eos_token_id],
        [*ids, inner.eos_token_id, inner.pad_token_id, inner.pad_token_id],
    ]
    assert reward([text, text], ["", ""], ended) == [plain, plain]
    assert reward([text], [""], [[inner.eos_token_id]]) == [0.0]


def test_the_truncated_model_pays_the_same(lm: LanguageModel) -> None:
    short = load(FLOAT32)
    short.truncate_(TINY_LAYER)
    prompts, completions = texts(lm, 3)
    sae, weights = random_sae(lm.d_model), torch.linspace(-1, 1, 96)
    whole, cut = (
        DenseReward(model, sae, TINY_LAYER, weights).token_rewards(prompts, completions)
        for model in (lm, short)
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


# -- from a run ------------------------------------------------------------------------------------


QUESTIONS = ["How many are 3 + 4?", "How many are 5 + 4?"]  # of the gate below


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run with a stage gate that passed."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("studies"))
    write_gate(copy)
    return copy


def write_gate(run: Path, settings: dict[str, object] | None = None, **figures: object) -> Path:
    """A result as `study=stage_gate` leaves it."""
    found = {
        "verdict": "pass",
        "missing": [],
        "notes": [],
        "within": {"questions": 20},
        "best_of": {"n": [1, 8]},
        "layer_of_features": TINY_LAYER,
        "helpful": [{"feature": 3, "g": 1.0}],
        "harmful": [{"feature": 5, "g": -1.0}],
        "discovery": {"ids": [problem(text, "0").id for text in QUESTIONS]},
    }
    path = run / "studies" / "stage_gate" / "stage_gate.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"study": "stage_gate", "settings": settings or {}, "figures": found | figures}
    path.write_text(json.dumps(whole))
    seal(path)
    return path


def seal(path: Path) -> None:
    """Record a file of features as its study does."""
    results.seal(path.parent, {"settings": json.loads(path.read_bytes()).get("settings", {})})


def test_from_run_takes_the_features_of_the_stage_gate(run: Path) -> None:
    reward = DenseReward.from_run(run, FLOAT32, judged_on=["How many are 8 + 1?"])
    assert reward.layer == TINY_LAYER and reward.lm.deepest == TINY_LAYER
    assert torch.nonzero(reward.weights).ravel().tolist() == [3, 5]
    assert reward.weights[[3, 5]].tolist() == [1, -1]
    assert reward.__name__ == "dense_reward"


def test_features_of_a_gate_that_did_not_pass_need_to_be_asked_for(run: Path) -> None:
    for verdict in ("weak", "fail", "undecided"):
        write_gate(run, verdict=verdict, notes=["R is constant"])
        with pytest.raises(SettingError, match="even_if_failed"):
            DenseReward.from_run(run, FLOAT32)
    assert DenseReward.from_run(run, FLOAT32, even_if_failed=True).weights[3] == 1
    path = write_gate(run)
    earlier = json.loads(path.read_text())
    del earlier["figures"]["best_of"]  # a pass by another rule, of an earlier version
    path.write_text(json.dumps(earlier))
    seal(path)
    with pytest.raises(StoreError, match="stage_gate"):
        DenseReward.from_run(run, FLOAT32, even_if_failed=True)


def test_features_are_not_judged_by_the_questions_that_chose_them(
    run: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "asked.jsonl"
    rows = [{"question": text, "answer": "7"} for text in (QUESTIONS[0], "How many are 9 + 9?")]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for judged_on in (QUESTIONS[:1], asked, str(asked)):
        with pytest.raises(SettingError, match=r"^1 of the [12] questions of judged_on= .* 2 "):
            DenseReward.from_run(run, FLOAT32, judged_on=judged_on)
    with pytest.raises(SettingError, match="judged_on"):  # whoever wants a gate that failed
        DenseReward.from_run(run, FLOAT32, judged_on=asked, even_if_failed=True)
    lists = {"helpful": [{"feature": 3}], "harmful": [], "ids": [problem(QUESTIONS[0], "0").id]}
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(lists))
    with pytest.raises(SettingError, match="judged_on"):
        DenseReward.from_run(run, FLOAT32, path, judged_on=asked)
    assert DenseReward.from_run(run, FLOAT32, path).weights[3] == 1
    with pytest.raises(SettingError, match="problems"):
        DenseReward.from_run(run, FLOAT32, judged_on=tmp_path / "missing.jsonl")


def test_refusals(run: Path, lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="run"):
        DenseReward.from_run(run / "other", FLOAT32)
    path = write_gate(run, helpful=[{"feature": 256}])
    with pytest.raises(StoreError, match="256"):
        DenseReward.from_run(run, FLOAT32)
    write_gate(run, layer_of_features=8)
    with pytest.raises(MismatchError, match="layer"):
        DenseReward.from_run(run, FLOAT32)
    write_gate(run, helpful=[], harmful=[])
    with pytest.raises(StoreError, match="stage_gate"):
        DenseReward.from_run(run, FLOAT32)
    write_gate(run, helpful=[3])
    with pytest.raises(StoreError, match="stage_gate"):
        DenseReward.from_run(run, FLOAT32)
    path.unlink()
    with pytest.raises(StoreError, match="stage_gate"):
        DenseReward.from_run(run, FLOAT32)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(StoreError, match=r"list\.json"):
        DenseReward.from_run(run, FLOAT32, tmp_path / "list.json")
    sae = random_sae(lm.d_model)
    with pytest.raises(SettingError, match="model"):
        DenseReward(lm, random_sae(7), TINY_LAYER, torch.zeros(96))
    with pytest.raises(SettingError, match="layer"):
        DenseReward(lm, sae, 12, torch.zeros(96))
    with pytest.raises(SettingError, match="weights"):
        DenseReward(lm, sae, TINY_LAYER, torch.zeros(95))
    with pytest.raises(SettingError, match="max_completion_length"):
        DenseReward(lm, sae, TINY_LAYER, torch.zeros(96)).token_rewards(
            [[2]], [[9] * lm.max_context]
        )


@pytest.mark.parametrize("of", ["weights", "sae"])
def test_features_of_another_model_or_sae_are_refused(run: Path, of: str) -> None:
    write_gate(run, {of: "another"})
    with pytest.raises(MismatchError, match=of):
        DenseReward.from_run(run, FLOAT32)


def test_the_features_that_contrast_lists_are_taken_by_name(run: Path) -> None:
    path = run / "studies" / "contrast" / f"contrastive_features_L{TINY_LAYER}.json"
    path.parent.mkdir(parents=True)
    lists = {"layer": TINY_LAYER, "helpful": [{"feature": 7, "d": 1.0}], "harmful": []}
    path.write_text(json.dumps(lists))
    with pytest.raises(StoreError, match=path.name):  # the study did not come to its end
        DenseReward.from_run(run, FLOAT32, path)
    seal(path)
    assert DenseReward.from_run(run, FLOAT32, path).weights[7] == 1
    results.seal(path.parent, {"settings": {"weights": "another"}})
    with pytest.raises(MismatchError, match="weights"):
        DenseReward.from_run(run, FLOAT32, path)
    path.write_text(json.dumps(lists).replace("7", "8"))
    with pytest.raises(StoreError, match=path.name):
        DenseReward.from_run(run, FLOAT32, path)


# -- TRL -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing:FutureWarning"
)  # transformers', at TRL's own use
@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the extra `grpo` is not installed"
)
@pytest.mark.long
def test_grpo_trains_on_it(lm: LanguageModel, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    reward = DenseReward(lm, random_sae(lm.d_model), TINY_LAYER, torch.linspace(-1, 1, 96))
    some = [
        {"prompt": prompt(drawn), "answer": drawn.answer}
        for drawn, _ in zip(problems("heldout"), range(4), strict=False)
    ]
    config = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=24,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
    )
    policy = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(some),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "rewards/dense_reward/mean" in line]
    assert len(logged) == 2
    assert all(np.isfinite(line["rewards/dense_reward/mean"]) for line in logged)
    assert any(line["rewards/dense_reward/std"] > 0 for line in logged)
    assert any(
        not torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items()
    )
