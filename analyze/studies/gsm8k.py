"""The model's answers to word problems: generated once, graded, kept, and used again by the studies
of problems.

Graded as lm-evaluation-harness' GSM8K task (v3) does: `strict` is the number behind the first `####
`, `flexible` the last number of the text. An answer counts as right by `strict`; if there is no
`#### ` it is unparsable, and wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from analyze import problems
from analyze.language_model import Generation, generate
from analyze.problems import Problem, Solution
from analyze.stats import wilson
from analyze.study import Outcome, Study, Table, dumped, made
from data import durable
from data.errors import SettingError, StopRequest
from data.journal import Progress
from data.settings import build
from harvest.model import LanguageModel
from harvest.tokens import Tokenizer

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
    """Every problem's answer, or the labelled solutions if the problems come with such; generated
    where not yet kept.

    Kept in RUN/studies/gsm8k/answers-DIGEST.jsonl, the digest being of all that they depend on, so
    that other settings lose nothing. Kept batch by batch: a run that is stopped goes on behind the
    last one.

    Raises:
        SettingError: there are no problems, or a prompt leaves no room for an answer.
    """
    found, asking = _read(study), _asking(study)
    labelled = [one for one in found if isinstance(one, Solution)]
    if labelled:
        return _of_solutions(study.lm.tokenizer, labelled, asking)
    asked = [one for one in found if isinstance(one, Problem)]
    device = torch.device(study.model.device).type  # sums round otherwise on another kind
    key = {
        "weights": study.identity["weights"],
        "dtype": study.model.dtype,
        "device": device,
        **_inputs(study, found),
    }
    folder = made(study.folder.parent / "gsm8k")
    path = folder / f"answers-{durable.digest(dumped(key).encode())[:12]}.jsonl"
    kept = [_revived(line) for line in path.read_text().splitlines()] if path.exists() else []
    progress = Progress()
    for at in range(len(kept), len(asked), asking.batch):
        if stop is not None:
            stop.check()
        batch = asked[at : at + asking.batch]
        prompts = [PROMPTS[asking.prompt](study.lm.tokenizer, one.question) for one in batch]
        kept += written(study.lm, list(zip(batch, prompts, strict=True)), asking)
        durable.write(path, ["".join(dumped_line(asdict(one)) for one in kept).encode()])
        right = sum(one.correct for one in kept)
        progress.show(
            f"{len(kept)}/{len(asked)} answered | {right} right", last=len(kept) == len(asked)
        )
    return kept


def dumped_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=True) + "\n"


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


def _revived(line: str) -> Answer:
    fields = json.loads(line)
    return Answer(**{**fields, "problem": Problem(**fields["problem"])})


# -- the study -------------------------------------------------------------------------------------


def gsm8k(study: Study) -> Outcome:
    """Accuracy by either grading, with Wilson's intervals, and which problems were answered right
    and wrong.
    """
    with StopRequest() as stop:
        found = answers(study, stop)
    total = len(found)
    counts = {
        "strict": sum(one.correct for one in found),
        "flexible": sum(one.flexible == one.problem.answer for one in found),
        "unparsable": sum(one.unparsable for one in found),
        "truncated": sum(not one.finished for one in found),
    }
    intervals = {name: wilson(count, total) for name, count in counts.items()}
    figures = {
        "answers": total,
        **{
            name: {"count": count, "share": count / total, "interval": intervals[name]}
            for name, count in counts.items()
        },
        "right": [one.problem.id for one in found if one.correct],
        "wrong": [one.problem.id for one in found if not one.correct],
    }
    said = {
        name: (f"{count / total:.1%}", f"{intervals[name].low:.1%} to {intervals[name].high:.1%}")
        for name, count in counts.items()
    }
    rows = [(name, str(count), *said[name]) for name, count in counts.items()]
    summary = [
        f"{counts['strict']} of {total} answers are right by the strict grading: {said['strict'][0]}, 95 % interval "
        f"{said['strict'][1]} (Wilson)."
    ]
    return Outcome(
        figures, summary, [Table("Graded answers", ("", "answers", "share", "95 %"), rows)]
    )
