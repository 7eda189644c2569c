"""The model's answers to word problems: generated once, graded, and kept for every study of them.

Grades are those of lm-evaluation-harness' GSM8K task (v3). `strict` is the number behind the first
`#### `, `flexible` the last number of the text. `answers.grading` says by which an answer is
right. Without `#### ` it is unparsable. Texts are compared, as there; numbers, where the file of
problems does not write a truth in plain digits (18.00, 1e6, 0.5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from residual_saes.analyze.kept import grow, read_lines
from residual_saes.analyze.language_model import Generation, Sampling, generate
from residual_saes.analyze.outcome import dumped
from residual_saes.analyze.questions import problems
from residual_saes.analyze.questions.problems import Example, Problem, Solution
from residual_saes.analyze.questions.prompts import ENDS, IN_TURNS, PROMPTS, cut, drawn
from residual_saes.analyze.study import Study, find
from residual_saes.data import durable
from residual_saes.data.errors import SettingError, StopRequest
from residual_saes.data.journal import Progress, tell
from residual_saes.data.settings import build
from residual_saes.harvest.chat_template import Turns
from residual_saes.harvest.model import LanguageModel
from residual_saes.harvest.tokens import Tokenizer

VERSION = 1  # of the kept answers: raise it when the same settings give other ones
GRADINGS = ("strict", "flexible")
GENERATED = "generated"  # source of the model's own answers
STOPS = ("Question:", "</s>", "<|im_end|>")  # lm-evaluation-harness'
_FILE = "answers.jsonl"
_OWN = ("samples", "temperature")  # settings that may be left to the study


class NoProblemsError(SettingError):
    """A study needs problems=, and it is not given."""


@dataclass(frozen=True)
class Answer:
    """A completion of a problem's prompt: the model's own, or somebody's labelled solution."""

    problem: Problem
    source: str  # GENERATED, or who wrote it
    prompt_ids: list[int]  # with BOS
    ids: list[int]  # of the completion
    text: str
    correct: bool
    strict: str | None  # the number found, see analyze.questions.problems
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


# -- settings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """The settings `answers`: how problems are answered. `asking_of` knows a study's own."""

    prompt: str = "lm_eval"
    shots: int = 0  # examples before the question
    examples: str | None = None  # .jsonl that they are drawn from; None: the folder's train.jsonl
    questions: int = 1319  # the first so many problems of each file
    samples: int = 1  # answers to each question
    temperature: float = 0.0  # answers are drawn from softmax(logits / temperature); 0: greedy
    seed: int = 0  # of what is drawn
    grading: str = "strict"  # or `flexible`: which number decides whether an answer is right
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
        if self.grading not in GRADINGS:
            raise SettingError(
                f"answers.grading={self.grading} must be one of {', '.join(GRADINGS)}"
            )
        if self.shots < 0 or (self.shots and self.prompt != "lm_eval"):
            raise SettingError(
                f"answers.shots={self.shots} must be at least 0, and 0 with "
                f"answers.prompt={self.prompt}; only answers.prompt=lm_eval has examples"
            )
        if self.examples is not None and not self.shots:
            raise SettingError(f"answers.examples={self.examples} needs answers.shots=, such as 5")
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
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer."""
        return (*STOPS, *ENDS.get(self.prompt, ()))

    @property
    def added(self) -> dict[str, Any]:
        """Settings that were added since answers were first kept, unless they are at defaults."""
        names = ("shots", "samples", "temperature", "seed", "grading")
        return {name: getattr(self, name) for name in names if self._is_changed(name)}

    def record(self) -> dict[str, Any]:
        """What keys hold; that of settings without `added` is as it always was."""
        first = ("prompt", "questions", "new_tokens", "batch")
        return {name: getattr(self, name) for name in first} | self.added

    def _is_changed(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Asking, name))


# -- answers of a study ----------------------------------------------------------------------------


def inputs(study: Study) -> dict[str, Any]:
    """What answers depend on beside the model, for `Study.perform`.

    Raises:
        SettingError: there are no problems, or the prompt needs what is not there. The model is
            not loaded for that.
    """
    asking, asked = _asked(study)
    return _inputs(study, asked, asking)


def _inputs(study: Study, asked: Sequence[Problem | Solution], asking: Asking) -> dict[str, Any]:
    found = {"problems": _digest([item.record() for item in asked]), "answers": asking.record()}
    if asking.shots:
        found["examples"] = _digest(_examples(study, asking))
    if turns := turns_of(study):
        found["turns"] = {"name": turns.name, "digest": turns.digest}
    return found


def _digest(records: Sequence[Any]) -> str:
    return durable.digest(dumped(records).encode())


def prompt_of(study: Study) -> dict[str, Any]:
    """How problems are asked, as results say it: {form, shots, turns, built_in}."""
    asking, turns = asking_of(study), turns_of(study)
    said = {"form": asking.prompt, "shots": asking.shots}
    return said | {
        "turns": turns.name if turns else None,
        "built_in": turns is not None and turns.built_in,
    }


def turns_of(study: Study) -> Turns | None:
    """How the study's prompts are put in turns; None where they are plain text.

    Raises:
        SettingError: they would be in turns, and the tokenizer has none.
    """
    in_turns = asking_of(study).prompt in IN_TURNS
    return study.description.tokenizer.turns if in_turns else None


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
    asking, every = _asked(study)
    by_part: dict[str | None, list[Problem | Solution]] = {}
    for item in every:
        own = item.problem.part if isinstance(item, Solution) else item.part
        if own is None or part in (None, own):
            by_part.setdefault(own, []).append(item)
    found = []
    for asked in by_part.values():
        solutions = [item for item in asked if isinstance(item, Solution)]
        questions = [item for item in asked if isinstance(item, Problem)]
        found += _of_solutions(study, solutions, asking) if solutions else []
        found += _generated(study, questions, asking, stop) if questions else []
    return found


def _generated(
    study: Study, questions: Sequence[Problem], asking: Asking, stop: StopRequest | None
) -> list[Answer]:
    """The model's own answers to the questions of one file."""
    # Kept without their part: the file alone, or in a folder, has the same answers.
    bare = [replace(question, part=None) for question in questions]

    def fill(folder: Path) -> None:
        prompts = prompts_of(study, bare, asking)
        longest = max(map(len, prompts.values()))
        require_room(longest, asking, _context(study))
        if (turns := turns_of(study)) and turns.built_in:
            tell(f"the tokenizer has no chat template: prompts are in {turns.name}")
        write_answers(folder / _FILE, study.lm, bare, prompts, asking, stop or StopRequest())

    # Either number is kept, so the grading makes no other answers.
    key = {"version": VERSION, **model_key(study)}
    key |= _inputs(study, bare, replace(asking, grading=Asking.grading))
    folder = study.kept("answers", key, fill)
    found = []
    for kept in read_answers(folder / _FILE):
        own = replace(kept.problem, part=questions[0].part)
        number = kept.strict if asking.grading == "strict" else kept.flexible
        found.append(replace(kept, problem=own, correct=own.is_answer(number)))
    return found


def write_answers(
    path: Path,
    lm: LanguageModel,
    questions: Sequence[Problem],
    prompts: Mapping[str, list[int]],
    asking: Asking,
    stop: StopRequest,
) -> None:
    """Write a model's own answers to a file, batch by batch, from wherever it stands.

    Args:
        prompts: ids of each question's prompt, by the question's id.
    """
    asked = [(question, sample) for question in questions for sample in range(asking.samples)]

    def make(rows: slice) -> list[dict[str, Any]]:
        batch = [(question, prompts[question.id]) for question, _ in asked[rows]]
        samples = [sample for _, sample in asked[rows]]
        return [answer.record() for answer in completions(lm, batch, asking, samples)]

    grow_answers(path, len(asked), asking.batch, make, Progress().show, stop)


def read_answers(path: Path) -> list[Answer]:
    """The answers that `write_answers` left."""
    lines = read_lines(path)
    return [Answer(**{**line, "problem": Problem(**line["problem"])}) for line in lines]


def prompts_of(study: Study, questions: Sequence[Problem], asking: Asking) -> dict[str, list[int]]:
    """The ids of each question's prompt, by the question's id."""
    prompt = PROMPTS[asking.prompt]
    tokenizer = study.description.tokenizer
    if not asking.shots:
        return {item.id: prompt(tokenizer, item.question) for item in questions}
    texts = [item.question for item in questions]
    shown = drawn(_examples(study, asking), texts, asking.shots)
    prompts = {}
    for item, before in zip(questions, shown, strict=True):
        prompts[item.id] = prompt(tokenizer, item.question, before)
    return prompts


def _context(study: Study) -> int:
    """Tokens that the model can read."""
    return study.description.max_context or 2**31


def _examples(study: Study, asking: Asking) -> list[Example]:
    """What the examples of prompts are drawn from."""
    path = asking.examples
    if path is None and study.problems and Path(study.problems).is_dir():
        path = f"{study.problems}/train.jsonl"
    if path is None:
        raise SettingError(
            f"answers.shots={asking.shots} takes its examples from a train.jsonl such as GSM8K's; "
            "give it as answers.examples=, or problems= as the folder with train.jsonl and "
            "test.jsonl"
        )
    return problems.examples(Path(path))


def questions(study: Study) -> list[tuple[Problem, list[int]]]:
    """Each question once, with its prompt's ids; of a folder those of test.jsonl."""
    asking, every = _asked(study)
    found: dict[str, Problem] = {}
    for item in every:
        asked = item.problem if isinstance(item, Solution) else item
        if asked.part != "train":
            found.setdefault(asked.id, asked)
    prompts = prompts_of(study, list(found.values()), asking)
    return [(asked, prompts[asked.id]) for asked in found.values()]


def asking_of(study: Study) -> Asking:
    """The study's settings `answers`; what is null in them is as the study itself has it.

    One answer is greedy, several are drawn at temperature 1.

    Raises:
        SettingError: one of them is not known, or cannot be.
    """
    given = _given(study)
    samples = given.get("samples", 1 if given.get("temperature") == 0 else find(study.name).samples)
    own = {"samples": samples, "temperature": 0.0 if samples == 1 else 1.0}
    return build(Asking, "answers", own | given)


def _given(study: Study) -> dict[str, Any]:
    """The settings `answers` without those that are left to the study."""
    left = {name for name in _OWN if study.answers.get(name) is None}
    return {name: value for name, value in study.answers.items() if name not in left}


def number_of(study: Study) -> int:
    """How many answers a study asks for, at most."""
    asking, every = _asked(study)
    return sum(1 if isinstance(item, Solution) else asking.samples for item in every)


def _asked(study: Study) -> tuple[Asking, Sequence[Problem | Solution]]:
    """What is asked, and how. Where all solutions are labelled, nothing is drawn."""
    asking = asking_of(study)
    asked = problems_of(study, asking)
    if all(isinstance(item, Solution) for item in asked):
        asking = replace(asking, samples=1, temperature=0.0)
    return asking, asked


def problems_of(study: Study, asking: Asking) -> Sequence[Problem | Solution]:
    """The problems that the study is given; of the embedded model its own by default."""
    is_tiny = study.subject.store.manifest["model"]["id"] == "tiny"
    source = study.problems or (problems.TINY if is_tiny else None)
    if source is None:
        raise NoProblemsError(
            "problems= is missing; give a .jsonl of {question, answer} such as GSM8K's test.jsonl, "
            "one of labelled solutions, a folder with train.jsonl and test.jsonl, or problems=tiny"
        )
    asked = problems.read(source, asking.questions)
    is_given = any(name in _given(study) for name in _OWN)
    if is_given and asking.temperature and any(isinstance(item, Solution) for item in asked):
        raise SettingError(
            f"problems={source} holds labelled solutions, so nothing is drawn; leave out "
            "answers.temperature= and answers.samples=, or give problems without solutions"
        )
    return asked


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
    require_room(max(map(len, prompts)), asking, lm.max_context)
    samples = [0] * len(asked) if samples is None else samples
    sampling = None
    if asking.temperature:
        pairs = zip(asked, samples, strict=True)
        uniform = []
        for (item, _), sample in pairs:
            uniform.append(numbers(asking.new_tokens, asking.seed, item.id, sample))
        sampling = Sampling(asking.temperature, torch.from_numpy(np.stack(uniform)))
    in_turns = asking.prompt in IN_TURNS
    limits = (asking.new_tokens, asking.stops)
    generations = generate(lm, prompts, *limits, sampling, in_turns=in_turns)
    found = []
    for (item, prompt), generation, sample in zip(asked, generations, samples, strict=True):
        answer = graded(lm.tokenizer, item, prompt, generation, asking)
        found.append(replace(answer, sample=sample))
    return found


def require_room(longest: int, asking: Asking, max_context: int) -> None:
    """Raise SettingError if the longest prompt (tokens) leaves no room for an answer."""
    if longest + asking.new_tokens > max_context:
        raise SettingError(
            f"answers.new_tokens={asking.new_tokens} behind a prompt of {longest} tokens pass the "
            f"model's context of {max_context}; lower it"
        )


def numbers(count: int, *of: object) -> NDArray[np.float64]:
    """(count,) in [0, 1), by which an answer is drawn: a function of the words `of` alone."""
    entropy = durable.digest(" ".join(map(str, of)).encode())
    return np.random.default_rng(int(entropy, 16)).random(count)


def graded(
    tokenizer: Tokenizer,
    item: Problem,
    prompt: list[int],
    completion: Generation,
    asking: Asking,
) -> Answer:
    """A completion as an answer, right or wrong by its number."""
    text: str = tokenizer.inner.decode(completion.ids, skip_special_tokens=True)
    for stop in STOPS:
        text = text.split(stop)[0]
    text = cut(asking.prompt, text)
    strict = problems.strict(text)
    flexible = problems.flexible(text)
    return Answer(
        problem=item,
        source=GENERATED,
        prompt_ids=prompt,
        ids=completion.ids,
        text=text,
        correct=item.is_answer(strict if asking.grading == "strict" else flexible),
        strict=strict,
        flexible=flexible,
        finished=completion.finished,
    )


def _of_solutions(study: Study, solutions: Sequence[Solution], asking: Asking) -> list[Answer]:
    """Labelled solutions as completions of the problem's prompt, right where the label says so."""
    tokenizer = study.description.tokenizer
    questions = {solution.problem.id: solution.problem for solution in solutions}
    prompts = prompts_of(study, list(questions.values()), asking)
    labelled = []
    for solution in solutions:
        ids = tokenizer.encode([" " + solution.text])[0]
        last_number = problems.flexible(solution.text)
        answer = Answer(
            problem=solution.problem,
            source=solution.source,
            prompt_ids=prompts[solution.problem.id],
            ids=ids[: asking.new_tokens],
            text=solution.text,
            correct=solution.correct,
            strict=last_number,
            flexible=last_number,
            finished=len(ids) <= asking.new_tokens,
        )
        labelled.append(answer)
    longest = max(len(answer.sequence) for answer in labelled)
    if longest > _context(study):
        raise SettingError(
            f"answers.new_tokens={asking.new_tokens} lets a prompt and its solution have {longest} "
            f"tokens, and the model's context is {_context(study)}; lower it"
        )
    return labelled
