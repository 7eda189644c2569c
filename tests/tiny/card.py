"""The tiny model's card: what it is and how well it does, written from measured values."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import Gemma4ForCausalLM

from residual_saes.data.tiny.problems import document, problem
from tests.tiny.evaluate import Score


@dataclass(frozen=True)
class Training:
    """What the training took."""

    command: str  # that makes the same model again
    steps: int  # optimizer steps
    documents: int  # documents seen, each once
    tokens: int  # tokens seen, padding left out
    loss: float  # mean over the last 100 steps, nats per token as weighted
    seconds: float  # of one CPU core


def parameter_count(model: Gemma4ForCausalLM) -> int:
    """Parameters of a model; the output head is the embedding and counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def card(
    model: Gemma4ForCausalLM, training: Training, scores: Mapping[str, Mapping[str, Score]]
) -> str:
    """The text of the card.

    Args:
        scores: accuracies by kind, under a heading for each way of measuring.
    """
    total = next(iter(scores.values()))["all"].total
    return f"""# A tiny Gemma 4 that does word problems, not too well

A model of the Gemma 4 architecture (`gemma4_text`) with {parameter_count(model):,} parameters, trained from
nothing on made-up arithmetic word problems in the manner of GSM8K. It is made to be right about half of the
time, so that whatever compares right answers with wrong ones has both in plenty, in seconds, on any
machine. It knows nothing else.

{architecture(model)}

## Training
{training.documents:,} problems ({training.tokens:,} tokens), each seen once, half of them as plain text and
half as a chat; {training.steps:,} steps of AdamW in {training.seconds / 60:.0f} minutes of one CPU core.
The last loss is {training.loss:.3f}. The problems come from `data/tiny/problems.py`, none from elsewhere.
To make the same model again:

    {training.command}

A held-out problem, as plain text:

{indented(document(problem("heldout", 0)))}

## Accuracy
Greedy decoding of the first {total:,} held-out problems; no equation in them, not even one step of several,
occurs in the training problems. An answer is right if the first number after `####` is. In brackets:
Wilson's 95 % intervals. "Plain" is the prompt of lm-evaluation-harness' GSM8K task, "chat" the question in
Gemma 4's turns.

{table(scores)}
"""


def architecture(model: Gemma4ForCausalLM) -> str:
    """The architecture in a few lines."""
    config = model.config
    last = config.num_hidden_layers - 1
    full = " and ".join(
        str(i) for i, kind in enumerate(config.layer_types) if kind == "full_attention"
    )
    return f"""- {config.num_hidden_layers} layers of width {config.hidden_size}
- feed-forward of width {config.intermediate_size}
- {config.num_attention_heads} heads, {config.num_key_value_heads} of keys and values
- full attention in layers {full}, a sliding window of {config.sliding_window} tokens in the others
- layers {last + 1 - config.num_kv_shared_layers} to {last} reuse the keys and values of earlier ones
- per-layer embeddings of width {config.hidden_size_per_layer_input}
- vocabulary {config.vocab_size}, context {config.max_position_embeddings} tokens"""


def table(scores: Mapping[str, Mapping[str, Score]]) -> str:
    """A Markdown table: a row for each kind of problem, a column for each way of measuring."""
    kinds = list(next(iter(scores.values())))
    header = ["kind", *scores]
    rows = [[kind, *(cell(of_kind[kind]) for of_kind in scores.values())] for kind in kinds]
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]
    )


def cell(score: Score) -> str:
    """A score as percent with its interval."""
    low, high = score.interval()
    return f"{score.share:.1%} [{low:.1%}, {high:.1%}] of {score.total}"


def indented(text: str) -> str:
    """A text as a Markdown code block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
