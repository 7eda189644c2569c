"""Train, measure and save the tiny model: `python -m tests.tiny.build`.

The same seed on the same machine with the same packages gives the same weights, bit for bit: one
thread, deterministic algorithms, and training problems that are a pure function of their index.
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from residual_saes.data.tiny.embedded import MODEL_DIR
from residual_saes.data.tiny.problems import Problem, document, problem, problems, solution
from tests.tiny.card import Training, card
from tests.tiny.evaluate import FORMATS, Format, Score, accuracy, prompt_ids
from tests.tiny.tokenizer import SPECIAL_TOKENS, train_tokenizer

PAD, EOS, BOS, _, _, TURN_END = range(len(SPECIAL_TOKENS))
VOCAB_SIZE = 512  # tokens, 256 of them bytes
CONTEXT = 1024  # tokens
TOKENIZER_DOCUMENTS = 10_000
ROWS = 16  # documents in a batch
STEPS = 3500
PEAK_LEARNING_RATE = 1.5e-3
PROMPT_WEIGHT = 0.1
"""Weight of a prompt's token in the loss (an answer's is 1): a question's numbers are chance."""


def model_config() -> Gemma4TextConfig:
    """Gemma 4 E4B in small: 5 sliding layers to 1 full, K/V shared above layer 6, PLE, softcap."""
    return Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        sliding_window=32,
        num_kv_shared_layers=5,
        hidden_size_per_layer_input=8,
        final_logit_softcapping=30.0,
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        eos_token_id=[EOS, TURN_END],
        bos_token_id=BOS,
        initializer_range=0.05,
        dtype="float32",
    )


class Batch(NamedTuple):
    """Training documents of like length, padded on the right; (rows, T) both."""

    ids: Tensor  # tokens, from BOS to the document's end
    weight: Tensor  # what the prediction of each token counts in the loss: 0 for padding


def document_ids(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, form: Format
) -> tuple[list[int], int]:
    """A training document from BOS to its end, and how many of its tokens are the prompt."""
    prompt = prompt_ids(tokenizer, problem, form)
    # After "Answer:" the text goes on with a space, after "model\n" it does not.
    text, end = (f" {solution(problem)}", EOS) if form == "plain" else (solution(problem), TURN_END)
    return [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"], end], len(prompt)


def batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, rows: int, pool: int = 32
) -> Iterator[Batch]:
    """Endless batches of `rows` training documents, every second one a chat.

    Documents are sorted by length within a pool of `pool` batches: 1.5 % of padding instead of 27
    %.
    """
    rng = Random(seed)
    index = 0
    while True:
        indices = range(index, index + rows * pool)
        index = indices.stop
        documents = [
            document_ids(tokenizer, problem("train", i, seed), FORMATS[i % 2]) for i in indices
        ]
        documents.sort(key=lambda document: len(document[0]))
        starts = list(range(0, len(documents), rows))
        rng.shuffle(starts)
        for start in starts:
            group = documents[start : start + rows]
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in group])
            answer = torch.arange(width) >= torch.tensor([[prompt] for _, prompt in group])
            yield Batch(ids, torch.where(answer, 1.0, PROMPT_WEIGHT) * (ids != PAD))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Trained(NamedTuple):
    """What a training run leaves behind besides the weights."""

    losses: list[float]  # of each step, nats per token, weighted
    tokens: int  # seen, padding left out


def train_(
    model: Gemma4ForCausalLM, training_batches: Iterator[Batch], steps: int, peak: float
) -> Trained:
    """Trains the model in place for `steps` batches, up to the learning rate `peak`."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    tokens = 0
    model.train()
    for step, batch in enumerate(islice(training_batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        # Padding on the right needs no mask: attention is causal, and padded tokens have no weight.
        logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits
        loss_each = cross_entropy(
            logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
        )
        weight = batch.weight[:, 1:].flatten()
        loss = (loss_each * weight).sum() / weight.sum()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss {losses[-1]} at step {step}")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((batch.ids != PAD).sum())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    model.eval()
    return Trained(losses, tokens)


def measure(folder: Path, count: int) -> dict[str, dict[str, Score]]:
    """Accuracies of the saved model by kind of problem, for each data type and prompt format."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    heldout = list(islice(problems("heldout"), count))
    scores: dict[str, dict[str, Score]] = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False
        ).eval()
        for form in FORMATS:
            scores[f"{name}, {form}"] = accuracy(model, tokenizer, heldout, form)
    return scores


def build(folder: Path, seed: int, steps: int, count: int) -> str:
    """Trains, saves and measures the model; returns the text of its card."""
    torch.manual_seed(seed)
    corpus = (document(problem("train", index, seed)) for index in range(TOKENIZER_DOCUMENTS))
    tokenizer = train_tokenizer(corpus, VOCAB_SIZE, CONTEXT)
    model = Gemma4ForCausalLM(model_config())
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=[EOS, TURN_END], do_sample=False
    )
    started = time.process_time()
    trained = train_(model, batches(tokenizer, seed, ROWS), steps, PEAK_LEARNING_RATE)
    seconds = time.process_time() - started
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = Training(
        command=f"python -m tests.tiny.build --seed {seed} --steps {steps}",
        steps=steps,
        documents=steps * ROWS,
        tokens=trained.tokens,
        loss=sum(trained.losses[-100:]) / len(trained.losses[-100:]),
        seconds=seconds,
    )
    text = card(model, training, measure(folder, count))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the tiny model: train, measure, save.")
    parser.add_argument(
        "--out", type=Path, default=MODEL_DIR, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the training problems"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--problems", type=int, default=1000, help="held-out problems to measure on"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(build(arguments.out, arguments.seed, arguments.steps, arguments.problems))


if __name__ == "__main__":
    main()
