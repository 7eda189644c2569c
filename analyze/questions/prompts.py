"""What the model reads before it answers a word problem."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from residual_saes.analyze.questions.problems import Example
from residual_saes.data.errors import SettingError
from residual_saes.harvest.tokens import Tokenizer

# Of the examples that are drawn for a prompt: lm-evaluation-harness' default.
_SEED = 1234
_INSTRUCTION = "Solve step by step and give final answer as '#### N'.\n\n"


def _lm_eval(tokenizer: Tokenizer, question: str, examples: Sequence[Example] = ()) -> list[int]:
    shown = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in examples)
    text = f"{shown}Question: {question}\nAnswer:"
    return [tokenizer.bos, *tokenizer.encode([text])[0]]


def _reference_cot(tokenizer: Tokenizer, question: str) -> list[int]:
    text = f"Q: {question}\nA: Let's think step by step."
    return [tokenizer.bos, *tokenizer.encode([text])[0]]


def _reference(tokenizer: Tokenizer, question: str) -> list[int]:
    return _chat(tokenizer, _INSTRUCTION + question)


def _chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """A user's turn and the beginning of the model's, in `Tokenizer.turns`."""
    turn = {"role": "user", "content": text}
    return [tokenizer.bos, *tokenizer.encode([[turn]], reply=True)[0]]


# Each makes ids with BOS of a question.
PROMPTS: dict[str, Callable[..., list[int]]] = {
    "lm_eval": _lm_eval,  # lm-evaluation-harness', with or without examples
    "chat": _chat,  # the bare question
    "reference": _reference,  # with the instruction of the reference SAE's card
    "reference_cot": _reference_cot,  # of the reference project's stage gates; plain text
}
IN_TURNS = ("chat", "reference")
# What ends an answer to a prompt, beside what ends every answer.
ENDS = {"reference_cot": ("\nQ:", "\nProblem:")}
_NEXT_PROBLEM = re.compile(r"\n+\s*(?:Q:|Problem:)")  # where the reference project cuts answers


def cut(prompt: str, text: str) -> str:
    """An answer to this prompt up to where the model puts a further problem to itself."""
    return _NEXT_PROBLEM.split(text)[0] if prompt in ENDS else text


def drawn(examples: Sequence[Example], questions: Sequence[str], shots: int) -> list[list[Example]]:
    """The examples of each question's prompt, as lm-evaluation-harness' GSM8K task draws them.

    One generator goes through the questions in their order. So the first questions have the same
    examples however many follow. A question that is among the examples is never its own example:
    one more is drawn then, as the harness does.

    Raises:
        SettingError: there are too few examples.
    """
    if len(examples) <= shots:
        raise SettingError(
            f"answers.shots={shots} needs more examples than that, and there are {len(examples)}; "
            "give a longer train.jsonl as answers.examples="
        )
    among = {example.question for example in examples}
    rng = random.Random(_SEED)
    chosen = []
    for question in questions:
        some = rng.sample(examples, shots + (question in among))
        others = [example for example in some if example.question != question]
        if len(others) < shots:  # it is there several times
            rest = [example for example in examples if example.question != question]
            others = rng.sample(rest, shots)
        chosen.append(others[:shots])
    return chosen
