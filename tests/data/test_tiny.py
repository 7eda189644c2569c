"""The tiny model: right problems, a lossless tokenizer, weights that half know arithmetic."""

import hashlib
import os
import re
import subprocess
import sys
from itertools import islice, pairwise

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4ForCausalLM,
    PreTrainedTokenizerBase,
)

from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.data.tiny.problems import (
    KINDS,
    Problem,
    Split,
    document,
    problem,
    problems,
    prompt,
)
from tests.tiny.build import batches, model_config, train_
from tests.tiny.card import parameter_count
from tests.tiny.evaluate import Score, accuracy, completions, graded, prompt_ids

EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = \$?(\d+)")
COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The committed tokenizer."""
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Gemma4ForCausalLM:
    """The committed model in its own fp32, on one thread; every weight found, none left over."""
    torch.set_num_threads(1)
    loaded, info = AutoModelForCausalLM.from_pretrained(MODEL_DIR, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


@pytest.fixture(scope="module")
def many() -> dict[Split, list[Problem]]:
    """20,000 problems of each split."""
    return {split: list(islice(problems(split), 20_000)) for split in ("train", "heldout")}


def instances(group: list[Problem]) -> set[tuple[str, tuple[int, ...]]]:
    """Every operation with its operands, from the steps; those of + and * in order of size."""
    return {
        (op, (int(left), int(right)) if op == "-" else tuple(sorted((int(left), int(right)))))
        for example in group
        for left, op, right, _ in EQUATION.findall(example.steps)
    }


GOLDEN: dict[tuple[Split, int, int], str] = {
    ("train", 1, 0): (
        "Question: There are 70 cards in a box and 65 in a bag. How many cards are there?\n"
        "Answer: There are 70 + 65 = 135 cards.\n#### 135"
    ),
    ("train", 123461, 0): (
        "Question: Kim buys 2 boxes for $8 each and has $11. How much more does Kim need?\n"
        "Answer: The boxes cost 8 * 2 = $16.\nKim needs 16 - 11 = $5.\n#### 5"
    ),
    ("train", 0, 1): (
        "Question: Cara has 64 toys. Hugo has 27 more than Cara. How many toys does Hugo have?\n"
        "Answer: Hugo has 64 + 27 = 91 toys.\n#### 91"
    ),
    ("heldout", 3, 0): (
        "Question: A shop made 10 books a day for 4 days and sold 18. How many books are left?\n"
        "Answer: The shop made 10 * 4 = 40 books.\nThere are 40 - 18 = 22 left.\n#### 22"
    ),
    ("heldout", 999, 0): (
        "Question: A shop made 12 books a day for 3 days and sold 5. How many books are left?\n"
        "Answer: The shop made 12 * 3 = 36 books.\nThere are 36 - 5 = 31 left.\n#### 31"
    ),
}


@pytest.mark.parametrize(("arguments", "text"), GOLDEN.items())
def test_problem_is_what_it_was(arguments: tuple[Split, int, int], text: str) -> None:
    """A change here makes the committed model's training set another one."""
    assert document(problem(*arguments)) == text


@pytest.mark.parametrize(
    ("split", "digest"), [("train", "c358f2446597b478"), ("heldout", "9f9720d7cee2a86f")]
)
def test_problems_are_what_they_were(split: Split, digest: str) -> None:
    """The same for every wording: the first 2,000 documents of a split."""
    text = "\n".join(document(example) for example in islice(problems(split), 2000))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_problem_is_the_same_in_another_process() -> None:
    """Nothing depends on Python's hash seed or on what was drawn before."""
    code = (
        "from residual_saes.data.tiny.problems import problem\n"
        "print([problem('train', i) for i in (7, 3)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(MODEL_DIR.parents[2])}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == repr([problem("train", i) for i in (7, 3)])


def test_stream_is_the_problems_in_order() -> None:
    """`problems` from any start on is `problem` of each index."""
    assert list(islice(problems("heldout", 5), 3)) == [problem("heldout", i) for i in (5, 6, 7)]


def test_splits_share_no_equation(many: dict[Split, list[Problem]]) -> None:
    """No arithmetic of a held-out problem, not even one step, is in the training set."""
    train, heldout = (instances(many[split]) for split in ("train", "heldout"))
    assert len(train) > 1000
    assert len(heldout) > 300
    assert not train & heldout


def test_steps_are_right(many: dict[Split, list[Problem]]) -> None:
    """Every equation holds, each builds on the one before, and the last gives the answer."""
    for example in many["train"] + many["heldout"]:
        equations = EQUATION.findall(example.steps)
        assert len(equations) == example.steps.count("=") == 1 + example.steps.count("\n")
        for left, op, right, result in equations:
            assert COMPUTE[op](int(left), int(right)) == int(result) > 0, example
        for before, after in pairwise(equations):
            assert before[3] == after[0], example
        assert example.answer == int(equations[-1][3])


def test_questions_give_the_operands(many: dict[Split, list[Problem]]) -> None:
    """A question's numbers are exactly those that the equations take from outside."""
    for example in many["train"]:
        equations = EQUATION.findall(example.steps)
        operands = [equations[0][0], *(right for _, _, right, _ in equations)]
        assert sorted(re.findall(r"\d+", example.question)) == sorted(operands), example


def test_stream_is_varied(many: dict[Split, list[Problem]]) -> None:
    """Every kind is there in its share and documents hardly ever repeat."""
    for group, distinct in zip(many.values(), (19_500, 15_000), strict=True):
        assert len({document(example) for example in group}) > distinct
        for kind in KINDS:
            assert sum(example.kind == kind for example in group) > 0.5 * len(group) / len(KINDS)


HOSTILE = (
    "",
    " ",
    "\n\n\t  x ",
    "</script><script>alert('x')</script>",
    "<bos>",
    "a<eos>b <pad><|turn>user\n<turn|>",
    "Ünïcödé 漢字 العربية 🧮👩‍👩‍👧 \u200b\ufeff\x00",
    "12345 ½ ٣ Ⅷ",
    "e\u0301 é",
    "".join(map(chr, [*range(0x300), 0xFFFF, 0x10FFFF])),
)


@pytest.mark.parametrize("text", HOSTILE)
def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Decoding undoes encoding, whatever is in the text, and text never becomes a special token."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text


def test_special_token_in_a_text_is_the_trap_it_is_taken_for(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Without `split_special_tokens=True`, a document that spells `<bos>` starts another one."""
    assert tokenizer("<bos>", add_special_tokens=False)["input_ids"] == [tokenizer.bos_token_id]


def test_tokenizer_specials(tokenizer: PreTrainedTokenizerBase) -> None:
    """The ids others rely on, and BOS only where it is asked for."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(6))
    specials = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
    )
    assert specials == (0, 1, 2, 3)
    plain = tokenizer("Answer: 12", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token_id not in plain
    assert tokenizer("Answer: 12")["input_ids"] == [tokenizer.bos_token_id, *plain]


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """No token has a digit together with anything else."""
    assert [token for token in tokenizer.get_vocab() if re.search(r"\d", token)] != []
    assert all(len(token) == 1 for token in tokenizer.get_vocab() if re.search(r"\d", token))


def test_prompt_tokens_begin_the_document(tokenizer: PreTrainedTokenizerBase) -> None:
    """What the model is asked is what it was trained on: no token reaches over the prompt's end."""
    for example in islice(problems("train"), 300):
        ids = tokenizer(document(example))["input_ids"]
        asked = tokenizer(prompt(example))["input_ids"]
        assert ids[: len(asked)] == asked


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma 4's turns."""
    turns = [{"role": "user", "content": "Q"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<bos><|turn>user\nQ<turn|>\n<|turn>model\n"
    turns.append({"role": "assistant", "content": "A"})
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<bos><|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n"
    ids = prompt_ids(tokenizer, problem("heldout", 0), "chat")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_model_is_gemma4_in_small(model: Gemma4ForCausalLM) -> None:
    """Gemma 4's marks: both attentions, shared keys and values, per-layer embeddings."""
    config = model.config
    assert isinstance(model, Gemma4ForCausalLM)
    assert config.model_type == "gemma4_text"
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_kv_shared_layers > 0
    shared = config.num_hidden_layers - config.num_kv_shared_layers
    has_own = [hasattr(layer.self_attn, "k_proj") for layer in model.model.layers]
    assert has_own == [True] * shared + [False] * config.num_kv_shared_layers
    width = config.num_hidden_layers * config.hidden_size_per_layer_input
    assert model.model.embed_tokens_per_layer.weight.shape == (config.vocab_size, width)
    assert width > 0
    assert config.max_position_embeddings >= 1024


def test_folder_is_small_and_whole() -> None:
    """A clone stays light; nothing but the promised files is there."""
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 4_000_000


def test_card_is_of_this_model(model: Gemma4ForCausalLM) -> None:
    """The card says how many parameters this very model has."""
    text = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    assert f"{parameter_count(model):,} parameters" in text


def test_batches_are_documents_in_both_formats(tokenizer: PreTrainedTokenizerBase) -> None:
    """Every row is one document, a chat or plain; answers count in full, padding not at all."""
    texts, weights = set(), set()
    for batch in islice(batches(tokenizer, seed=0, rows=4, pool=4), 4):
        for ids, weight in zip(batch.ids.tolist(), batch.weight.tolist(), strict=True):
            text = tokenizer.decode(ids).replace("<pad>", "")
            texts.add(text)
            asked = re.split(r"(?<=\nAnswer:)|(?<=\n<\|turn>model\n)", text)[0]
            size = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
            end = sum(token != tokenizer.pad_token_id for token in ids)
            assert set(weight[size:end]) == {1.0}
            assert set(weight[end:]) <= {0.0}
            weights |= set(weight[:size])
    assert len(weights) == 1
    expected = set()
    for index, example in enumerate(islice(problems("train"), 16)):
        asked = f"<|turn>user\n{example.question}<turn|>\n"
        turns = f"{asked}<|turn>model\n{example.steps}\n#### {example.answer}<turn|>"
        expected.add("<bos>" + (turns if index % 2 else f"{document(example)}<eos>"))
    assert texts == expected


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same seed gives the same weights, bit for bit, and another one others."""
    trained = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        fresh = Gemma4ForCausalLM(model_config())
        train_(fresh, batches(tokenizer, seed, rows=2, pool=2), steps=2, peak=1e-3)
        trained.append(torch.nn.utils.parameters_to_vector(fresh.parameters()))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_grading() -> None:
    """The first number after `####` counts."""
    example = problem("heldout", 0)
    assert graded(f"steps\n#### {example.answer}\n#### 99999", example)
    assert graded(f"#### {example.answer}.", example)
    assert not graded(f"#### {example.answer + 1}\n#### {example.answer}", example)
    assert not graded(f"#### {example.answer}0", example)
    assert not graded(f"{example.answer}", example)


def test_wilson_interval() -> None:
    """Against a value from Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662."""
    assert Score(81, 263).interval() == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_model_is_right_about_half_of_the_time(
    model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Right and wrong answers in plenty. The bounds leave room for other machines' rounding."""
    heldout = list(islice(problems("heldout"), 64))
    score = accuracy(model, tokenizer, heldout)["all"]
    assert score.total == 64
    assert 0.25 < score.share < 0.85


def test_batched_answers_are_the_single_ones(
    model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Padding on the left changes nothing, in either format."""
    heldout = list(islice(problems("heldout", 100), 4))
    for form in ("plain", "chat"):
        together = completions(model, tokenizer, heldout, form)
        assert together == completions(model, tokenizer, heldout, form, batch=1)
