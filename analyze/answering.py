"""The model's answers to word problems: generated once, graded, and kept for every study of them.

Grades are those of lm-evaluation-harness' GSM8K task (v3). `strict` is the number behind the first
`#### `, `flexible` the last number of the text. An answer is right if `strict` is. Without `#### `
it is unparsable, and wrong. Texts are compared, as there; numbers, where the file of problems does
not write a truth in plain digits (18.00, 1e6, 0.5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analyze import problems
from analyze.language_model import Generation, Sampling, generate
from analyze.outcome import dumped
from analyze.problems import Problem, Solution
from analyze.study import Study, grow, read_lines
from data import durable
from data.errors import SettingError, StopRequest
from data.journal import Progress
from data.settings import build
from harvest.model import LanguageModel
from harvest.tokens import Tokenizer

VERSION = 1  # of the kept answers: raise it when the same settings give other ones
STOPS = ("Question:", "</s>", "<|im_end|>")  # lm-evaluation-harness'
_FILE = "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """A completion of a problem's prompt: the model's own, or somebody's labelled solution."""

    problem: Problem
    source: str  # `generated`, or who wrote it
    prompt_ids: list[int]  # with BOS
    ids: list[int]  # of the completion
    text: str
    correct: bool
    strict: str | None  # the number found, see analyze.problems
    flexible: str | None
    finished: bool  # not cut off by the limit
    sample: int = 0  # which of the question's answers, see `Asking.samples`

    @property
    def unparsable(self) -> bool:
        return self.strict is None

    @property
    def sequence(self) -> list[int]:
        """Prompt and completion: what a language model reads to see this answer."""
        return self.prompt_ids + self.ids

    def record(self) -> dict[str, Any]:
        """A line of the kept answers."""
        return asdict(self) | {"problem": self.problem.record()}


# -- prompts ---------------------------------------------------------------------------------------


def _lm_eval(tokenizer: Tokenizer, question: str) -> list[int]:
    return [tokenizer.bos, *tokenizer.encode([f"Question: {question}\nAnswer:"])[0]]


def _reference(tokenizer: Tokenizer, question: str) -> list[int]:
    return _chat(tokenizer, f"Solve step by step and give final answer as '#### N'.\n\n{question}")


def _chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """A user's turn and the beginning of the model's, by the model's own template."""
    turn = {"role": "user", "content": text}
    return [tokenizer.bos, *tokenizer.encode([[turn]], reply=True)[0]]


PROMPTS: dict[str, Callable[[Tokenizer, str], list[int]]] = {
    "lm_eval": _lm_eval,  # lm-evaluation-harness'
    "chat": _chat,  # the bare question
    "reference": _reference,  # with the instruction of the reference SAE's card
}


@dataclass(frozen=True)
class Asking:
    """The settings `answers`: how problems are answered."""

    prompt: str = "lm_eval"
    questions: int = 1319  # the first so many problems of each file
    samples: int = 1  # answers to each question
    temperature: float = 0.0  # answers are drawn from softmax(logits / temperature); 0: greedy
    seed: int = 0  # of what is drawn
    new_tokens: int = 512  # of an answer, at most
    # Answers generated together. Another value may round otherwise, and so change an answer.
    batch: int = 32

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise SettingError(f"answers.prompt={self.prompt} must be one of {', '.join(PROMPTS)}")
        for name in ("questions", "samples", "new_tokens", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise SettingError(f"answers.{name}={value} must be at least 1")
        if not (self.temperature == 0 or 1e-3 <= self.temperature < float("inf")):
            raise SettingError(
                f"answers.temperature={self.temperature} must be 0 (greedy) or a number from 0.001"
            )
        if self.samples > 1 and self.temperature == 0:
            raise SettingError(
                f"answers.samples={self.samples} at answers.temperature=0 would be equal answers; "
                "give a temperature such as 1"
            )

    @property
    def added(self) -> dict[str, Any]:
        """Settings that were added since answers were first kept, unless they are at defaults."""
        names = ("samples", "temperature", "seed")
        return {name: getattr(self, name) for name in names if self._is_changed(name)}

    def record(self) -> dict[str, Any]:
        """What keys hold; that of settings without `added` is as it always was."""
        first = ("prompt", "questions", "new_tokens", "batch")
        return {name: getattr(self, name) for name in first} | self.added

    def _is_changed(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Asking, name))


# -- answers of a study ----------------------------------------------------------------------------


def inputs(study: Study) -> dict[str, Any]:
    """What answers depend on beside the model, for `Study.perform`."""
    asking = asking_of(study)
    return _inputs(_problems(study, asking), asking)


def _inputs(asked: Sequence[Problem | Solution], asking: Asking) -> dict[str, Any]:
    content = dumped([item.record() for item in asked])
    return {"problems": durable.digest(content.encode()), "answers": asking.record()}


def answers(study: Study, stop: StopRequest | None = None, part: str | None = None) -> list[Answer]:
    """Every problem's answers; the labelled solutions, if the problems come with such.

    The model's own answers are generated once, batch by batch, and kept for all studies of a run.
    A run that is stopped goes on behind its last batch.

    Args:
        part: of a folder of problems, this file's alone; of a single file all the same.

    Returns:
        question by question, train.jsonl's before test.jsonl's; a question's samples in order.

    Raises:
        SettingError: there are no problems, or a prompt leaves no room for an answer.
    """
    asking = asking_of(study)
    by_part: dict[str | None, list[Problem | Solution]] = {}
    for item in _problems(study, asking):
        own = item.problem.part if isinstance(item, Solution) else item.part
        if own is None or part in (None, own):
            by_part.setdefault(own, []).append(item)
    found = []
    for asked in by_part.values():
        solutions = [item for item in asked if isinstance(item, Solution)]
        questions = [item for item in asked if isinstance(item, Problem)]
        found += _of_solutions(study.lm.tokenizer, solutions, asking) if solutions else []
        found += _generated(study, questions, asking, stop) if questions else []
    return found


def _generated(
    study: Study, questions: Sequence[Problem], asking: Asking, stop: StopRequest | None
) -> list[Answer]:
    """The model's own answers to the questions of one file."""
    # Kept without their part: the file alone, or in a folder, has the same answers.
    bare = [replace(question, part=None) for question in questions]
    asked = [(question, sample) for question in bare for sample in range(asking.samples)]

    def make(rows: slice) -> list[dict[str, Any]]:
        prompt = PROMPTS[asking.prompt]
        tokenizer = study.lm.tokenizer
        batch = [(item, prompt(tokenizer, item.question)) for item, _ in asked[rows]]
        samples = [sample for _, sample in asked[rows]]
        return [answer.record() for answer in completions(study.lm, batch, asking, samples)]

    def fill(folder: Path) -> None:
        path = folder / _FILE
        grow_answers(path, len(asked), asking.batch, make, Progress().show, stop or StopRequest())

    key = {"version": VERSION, **model_key(study), **_inputs(bare, asking)}
    folder = study.kept("answers", key, fill)
    kept = [_revived(line) for line in read_lines(folder / _FILE)]
    part = questions[0].part
    return [replace(one, problem=replace(one.problem, part=part)) for one in kept]


def questions(study: Study) -> list[tuple[Problem, list[int]]]:
    """Each question once, with its prompt's ids; of a folder those of test.jsonl."""
    asking = asking_of(study)
    found: dict[str, Problem] = {}
    for item in _problems(study, asking):
        asked = item.problem if isinstance(item, Solution) else item
        if asked.part != "train":
            found.setdefault(asked.id, asked)
    prompt = PROMPTS[asking.prompt]
    tokenizer = study.lm.tokenizer
    return [(asked, prompt(tokenizer, asked.question)) for asked in found.values()]


def asking_of(study: Study) -> Asking:
    """The study's settings `answers`.

    Raises:
        SettingError: one of them is not known, or cannot be.
    """
    return build(Asking, "answers", study.answers)


def _problems(study: Study, asking: Asking) -> Sequence[Problem | Solution]:
    is_tiny = study.subject.store.manifest["model"]["id"] == "tiny"
    source = study.problems or (problems.TINY if is_tiny else None)
    if source is None:
        raise SettingError(
            "problems= is missing; give a .jsonl of {question, answer} such as GSM8K's test.jsonl, "
            "one of labelled solutions, a folder with train.jsonl and test.jsonl, or problems=tiny"
        )
    return problems.read(source, asking.questions)


def model_key(study: Study) -> dict[str, Any]:
    """What a forward pass depends on beside its tokens, for the key of kept results."""
    return {
        "weights": study.identity["weights"],
        "dtype": study.model.dtype,
        "device": torch.device(study.model.device).type,  # another kind rounds sums otherwise
    }


def grow_answers(
    path: Path,
    total: int,
    batch: int,
    make: Callable[[slice], Sequence[Mapping[str, Any]]],
    show: Callable[..., None],
    stop: StopRequest,
) -> None:
    """Bring a file of answers to `total` lines, batch by batch, from wherever it stands.

    Args:
        make: the lines in a slice, each with a field `correct`.
        show: prints a line of progress; given the line, and whether it is the last.
    """
    right = 0

    def next_batch(part: slice) -> Sequence[Mapping[str, Any]]:
        nonlocal right
        stop.check()
        lines = make(part)
        right += sum(line["correct"] for line in lines)
        done = min(part.stop, total)
        show(f"{done}/{total} answered | {right} right here", last=done == total)
        return lines

    grow(path, total, batch, next_batch)


def _revived(fields: dict[str, Any]) -> Answer:
    return Answer(**{**fields, "problem": Problem(**fields["problem"])})


# -- completions and their grades ------------------------------------------------------------------


def completions(
    lm: LanguageModel,
    asked: Sequence[tuple[Problem, list[int]]],
    asking: Asking,
    samples: Sequence[int] | None = None,
) -> list[Answer]:
    """The model's own completions of problems with their prompts, in one batch, graded.

    Args:
        samples: which of its question's answers each is; by default the first.

    Raises:
        SettingError: a prompt leaves no room for an answer.
    """
    prompts = [prompt for _, prompt in asked]
    longest = max(map(len, prompts))
    if longest + asking.new_tokens > lm.max_context:
        raise SettingError(
            f"answers.new_tokens={asking.new_tokens} behind a prompt of {longest} tokens pass the "
            f"model's context of {lm.max_context}; lower it"
        )
    samples = [0] * len(asked) if samples is None else samples
    sampling = None
    if asking.temperature:
        pairs = zip(asked, samples, strict=True)
        uniform = [_uniform(asking, item.id, sample) for (item, _), sample in pairs]
        sampling = Sampling(asking.temperature, torch.from_numpy(np.stack(uniform)))
    generations = generate(lm, prompts, asking.new_tokens, STOPS, sampling)
    graded = []
    for (item, prompt), generation, sample in zip(asked, generations, samples, strict=True):
        answer = _graded(lm.tokenizer, item, prompt, generation)
        graded.append(replace(answer, sample=sample))
    return graded


def _uniform(asking: Asking, question: str, sample: int) -> NDArray[np.float64]:
    """(new_tokens,) in [0, 1), by which an answer is drawn: a function of these alone."""
    entropy = durable.digest(f"{asking.seed} {question} {sample}".encode())
    return np.random.default_rng(int(entropy, 16)).random(asking.new_tokens)


def _graded(
    tokenizer: Tokenizer, item: Problem, prompt: list[int], completion: Generation
) -> Answer:
    text: str = tokenizer.inner.decode(completion.ids, skip_special_tokens=True)
    for stop in STOPS:
        text = text.split(stop)[0]
    strict = problems.strict(text)
    return Answer(
        problem=item,
        source="generated",
        prompt_ids=prompt,
        ids=completion.ids,
        text=text,
        correct=item.is_answer(strict),
        strict=strict,
        flexible=problems.flexible(text),
        finished=completion.finished,
    )


def _of_solutions(
    tokenizer: Tokenizer, solutions: Sequence[Solution], asking: Asking
) -> list[Answer]:
    """Labelled solutions as completions of the problem's prompt, right where the label says so."""
    labelled = []
    for solution in solutions:
        ids = tokenizer.encode([" " + solution.text])[0]
        last_number = problems.flexible(solution.text)
        answer = Answer(
            problem=solution.problem,
            source=solution.source,
            prompt_ids=PROMPTS[asking.prompt](tokenizer, solution.problem.question),
            ids=ids[: asking.new_tokens],
            text=solution.text,
            correct=solution.correct,
            strict=last_number,
            flexible=last_number,
            finished=len(ids) <= asking.new_tokens,
        )
        labelled.append(answer)
    return labelled
