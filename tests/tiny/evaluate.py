"""How many word problems a model answers right by greedy decoding."""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from residual_saes.data.tiny.problems import Problem, prompt

Format = Literal["plain", "chat"]
FORMATS: tuple[Format, ...] = ("plain", "chat")


class Score(NamedTuple):
    """Right answers out of a number of problems."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """Accuracy, 0 to 1."""
        return self.right / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval of the share; z = 1.96 gives 95 %."""
        n, p = self.total, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


def graded(completion: str, problem: Problem) -> bool:
    """Whether the first `#### N` of a completion is the answer."""
    found = re.search(r"#### (-?[0-9.,]+)", completion)
    return found is not None and found[1].replace(",", "").rstrip(".") == str(problem.answer)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problem: Problem, form: Format) -> list[int]:
    """The tokens to continue, BOS included."""
    if form == "chat":
        turns = [{"role": "user", "content": problem.question}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
    return list(tokenizer(prompt(problem))["input_ids"])


@torch.inference_mode()
def completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    form: Format = "plain",
    batch: int = 64,
    max_new_tokens: int = 96,
) -> list[str]:
    """The model's greedy continuation of each problem's prompt, `batch` problems at a time."""
    texts: list[str] = []
    for start in range(0, len(problems), batch):
        rows = [prompt_ids(tokenizer, problem, form) for problem in problems[start : start + batch]]
        width = max(map(len, rows))
        # Padded on the left and masked, so that every row's next token stands in the last column.
        input_ids = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        )
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    form: Format = "plain",
    batch: int = 64,
) -> dict[str, Score]:
    """Scores by kind of problem, and over all of them under "all"."""
    texts = completions(model, tokenizer, problems, form, batch)
    right = [graded(text, problem) for text, problem in zip(texts, problems, strict=True)]
    scores = {"all": Score(sum(right), len(right))}
    for kind in sorted({problem.kind for problem in problems}):
        of_kind = [ok for ok, problem in zip(right, problems, strict=True) if problem.kind == kind]
        scores[kind] = Score(sum(of_kind), len(of_kind))
    return scores
