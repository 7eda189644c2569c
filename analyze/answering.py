"""The model's answers to word problems: generated once, graded, kept, and used again by the studies
of problems.

Graded as lm-evaluation-harness' GSM8K task (v3) does: `strict` is the number behind the first `####
`, `flexible` the last number of the text. An answer counts as right by `strict`; if there is no
`#### ` it is unparsable, and wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from analyze import problems
from analyze.language_model import Generation, generate
from analyze.outcome import dumped
from analyze.problems import Problem, Solution
from analyze.study import Study, grow, read_lines
from data import durable
from data.errors import SettingError, StopRequest
from data.journal import Progress
from data.settings import build
from harvest.model import LanguageModel
from harvest.tokens import Tokenizer

VERSION = 1  # raise it when the same settings give other answers
_FILE = "answers.jsonl"
STOPS = ("Question:", "</s>", "<|im_end|>")  # lm-evaluation-harness'


@dataclass(frozen=True)
class Answer:
    """A completion of a problem's prompt, the model's own or somebody's labelled one."""

    problem: Problem
    source: str  # `generated`, or who wrote it
    prompt_ids: list[int]  # with BOS
    ids: list[int]  # of the completion
    text: str
    correct: bool
    strict: str | None  # the number found, see analyze.problems
    flexible: str | None
    finished: bool  # not cut off by the limit

    @property
    def unparsable(self) -> bool:
        return self.strict is None

    @property
    def sequence(self) -> list[int]:
        """Prompt and completion: what a language model reads to see this answer."""
        return self.prompt_ids + self.ids


# -- prompts ---------------------------------------------------------------------------------------


def _lm_eval(tokenizer: Tokenizer, question: str) -> list[int]:
    return [tokenizer.bos, *tokenizer.encode([f"Question: {question}\nAnswer:"])[0]]


def _reference(tokenizer: Tokenizer, question: str) -> list[int]:
    return _chat(tokenizer, f"Solve step by step and give final answer as '#### N'.\n\n{question}")


def _chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """A user's turn and the beginning of the model's, by the model's own template."""
    return [tokenizer.bos, *tokenizer.encode([[{"role": "user", "content": text}]], reply=True)[0]]


PROMPTS: dict[str, Callable[[Tokenizer, str], list[int]]] = {
    "lm_eval": _lm_eval,
    "chat": _chat,
    "reference": _reference,
}
"""lm-evaluation-harness' prompt; the bare question as a chat; the instruction of the reference SAE's card as a chat."""


# -- answers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """How problems are answered."""

    prompt: str = "lm_eval"
    questions: int = 1319  # the first so many problems
    new_tokens: int = 512  # of an answer, at most
    batch: int = (
        32  # questions generated together; another value may change roundings, and so an answer
    )

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise SettingError(f"answers.prompt={self.prompt} must be one of {', '.join(PROMPTS)}")
        for name in ("questions", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise SettingError(f"answers.{name}={getattr(self, name)} must be at least 1")


def inputs(study: Study) -> dict[str, Any]:
    """What answers depend on, for `Study.perform`."""
    return _inputs(study, _read(study))


def _inputs(study: Study, found: Sequence[Problem | Solution]) -> dict[str, Any]:
    asked = [asdict(one) for one in found]
    return {"problems": durable.digest(dumped(asked).encode()), "answers": asdict(_asking(study))}


def answers(study: Study, stop: StopRequest | None = None) -> list[Answer]:
    """Every problem's answer; the labelled solutions, if the problems come with such.

    The model's own answers are generated once, batch by batch, and kept for all studies of a run.
    A run that is stopped goes on behind its last batch.

    Raises:
        SettingError: there are no problems, or a prompt leaves no room for an answer.
    """
    asked, asking = _read(study), _asking(study)
    labelled = [item for item in asked if isinstance(item, Solution)]
    if labelled:
        return _of_solutions(study.lm.tokenizer, labelled, asking)
    questions = [item for item in asked if isinstance(item, Problem)]
    key = {
        "version": VERSION,
        "weights": study.identity["weights"],
        "dtype": study.model.dtype,
        "device": torch.device(study.model.device).type,  # sums round otherwise on another kind
        **_inputs(study, asked),
    }

    def generate_all(folder: Path) -> None:
        progress, right = Progress(), 0

        def next_batch(part: slice) -> list[dict[str, Any]]:
            nonlocal right
            if stop is not None:
                stop.check()
            prompt = PROMPTS[asking.prompt]
            batch = [(item, prompt(study.lm.tokenizer, item.question)) for item in questions[part]]
            fresh = written(study.lm, batch, asking)
            right += sum(answer.correct for answer in fresh)
            done = min(part.stop, len(questions))
            line = f"{done}/{len(questions)} answered | {right} right here"
            progress.show(line, last=done == len(questions))
            return [asdict(answer) for answer in fresh]

        grow(folder / _FILE, len(questions), asking.batch, next_batch)

    folder = study.kept("answers", key, generate_all)
    return [_revived(line) for line in read_lines(folder / _FILE)]


def _read(study: Study) -> Sequence[Problem | Solution]:
    source = study.problems or (
        problems.TINY if study.subject.store.manifest["model"]["id"] == "tiny" else None
    )
    if source is None:
        raise SettingError(
            "problems= is missing; give a .jsonl of {question, answer} such as GSM8K's test.jsonl, one of labelled "
            "solutions, or problems=tiny"
        )
    return problems.read(source, _asking(study).questions)


def _asking(study: Study) -> Asking:
    return build(Asking, "answers", study.answers)


def written(
    lm: LanguageModel, asked: Sequence[tuple[Problem, list[int]]], asking: Asking
) -> list[Answer]:
    """The model's own completions of problems with their prompts, in one batch, graded.

    Raises:
        SettingError: a prompt leaves no room for an answer.
    """
    if (longest := max(len(prompt) for _, prompt in asked) + asking.new_tokens) > lm.max_context:
        raise SettingError(
            f"answers.new_tokens={asking.new_tokens} behind a prompt of {longest - asking.new_tokens} tokens pass the "
            f"model's context of {lm.max_context}; lower it"
        )
    found = generate(lm, [prompt for _, prompt in asked], asking.new_tokens, STOPS)
    return [
        _graded(lm.tokenizer, one, prompt, generation)
        for (one, prompt), generation in zip(asked, found, strict=True)
    ]


def _graded(
    tokenizer: Tokenizer, one: Problem, prompt: list[int], completion: Generation
) -> Answer:
    ids, finished = completion
    text: str = tokenizer.inner.decode(ids, skip_special_tokens=True)
    for stop in STOPS:
        text = text.split(stop)[0]
    found, last = problems.strict(text), problems.flexible(text)
    return Answer(one, "generated", prompt, ids, text, found == one.answer, found, last, finished)


def _of_solutions(
    tokenizer: Tokenizer, labelled: Sequence[Solution], asking: Asking
) -> list[Answer]:
    """Labelled solutions as completions of the problem's prompt; `correct` is what the label
    says.
    """
    found = []
    for one in labelled:
        prompt = PROMPTS[asking.prompt](tokenizer, one.problem.question)
        ids, last = tokenizer.encode([" " + one.text])[0], problems.flexible(one.text)
        whole = len(ids) <= asking.new_tokens
        ids = ids[: asking.new_tokens]
        found.append(
            Answer(one.problem, one.source, prompt, ids, one.text, one.correct, last, last, whole)
        )
    return found


def _revived(fields: dict[str, Any]) -> Answer:
    return Answer(**{**fields, "problem": Problem(**fields["problem"])})
