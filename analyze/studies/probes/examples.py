"""The labelled texts that probes are of, and which of them stay together.

study.label=, without study.texts=, is one of:

    kind          of the embedded word problems: what is asked, as prompts ask it
    correct       of the model's answers, or of labelled solutions: right or wrong
    token_class   of one token of each held-out document, at random: english, other, digit or code
    position      of the same tokens: early, middle or late among them; the length tells it
    FIELD         of the lines of the file problems=

With study.texts= it is the field of its lines that has the label. Texts are read behind a BOS.

Shapes: n texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from residual_saes.analyze import json_lines, pieces
from residual_saes.analyze.latents.pooling import Span
from residual_saes.analyze.questions import answering, problems
from residual_saes.analyze.study import Study
from residual_saes.analyze.token_classes import class_of
from residual_saes.data.errors import DocumentError, SettingError, StopRequest, StoreError
from residual_saes.data.neutral import neutral
from residual_saes.data.tiny import problems as tiny
from residual_saes.data.tiny.wordings import NAMES, THINGS

KIND, CORRECT, TOKEN_CLASS, POSITION = "kind", "correct", "token_class", "position"
OF_TOKENS = (TOKEN_CLASS, POSITION)
WORDING = "wording"  # study.group of the embedded problems
LEAST = 10  # texts of a class
LEAST_GROUPS = 3  # of a class: one for each side of a split
MOST_CLASSES = 20
_LONGEST_LABEL = 60  # characters
_SEED = 0
_label, _length = attrgetter("label"), attrgetter("length")
_OPERANDS = re.compile(rf"\b(?:\d+|{'|'.join((*NAMES, *THINGS))})\b")


class Labelled(NamedTuple):
    """A text with its label."""

    span: Span
    label: str
    group: str  # texts of one group stay on one side
    text: str  # texts that are the same stay on one side, too
    length: int  # tokens that may tell the label by their number alone


class Examples(NamedTuple):
    """All texts."""

    spans: list[Span]
    names: list[str]  # of the classes
    label: NDArray[np.int64]  # (n,) numbers of classes
    group: NDArray[np.int64]  # (n,) numbers of groups, from 0
    length: NDArray[np.int64]  # (n,)
    repeated: int  # texts that are there before
    contradicting: int  # of these, those of another label than the first
    left_out: dict[str, int]  # classes of too few tokens

    def record(self) -> dict[str, Any]:
        """What results follow from."""
        labels = {"names": self.names, "labels": self.label.tolist()}
        return {"texts": self.spans, **labels, "groups": self.group.tolist()}


def label_of(study: Study, texts: str | None, label: str | None) -> str:
    """What study.label= is, or is by default."""
    if label:
        return label
    if texts:
        return "label"
    return KIND if _is_embedded(study) else TOKEN_CLASS


def require_group(texts: str | None, label: str, group: str | None) -> None:
    """Raise SettingError if study.group= is of labels that have groups of their own."""
    if group and label in (CORRECT, *OF_TOKENS) and not texts:
        raise SettingError(
            f"study.group={group} is of files, and study.label={label} has groups of its own: "
            "questions or documents; leave it out"
        )


def examples(
    study: Study,
    texts: str | None,
    label: str,
    group: str | None,
    limit: int,
    stop: StopRequest | None = None,
) -> Examples:
    """The texts, at most `limit` of them, chosen at random.

    Args:
        texts: a .jsonl of texts, or None.
        label: see the module's docstring.
        group: a field of the lines; WORDING for the embedded problems; None: each text by itself,
            and the answers to one question together.

    Raises:
        SettingError: there are no such texts, one class alone, or too few of one.
        StoreError: a line is no text with a label.
    """
    if texts:
        found = _of_file(study, Path(texts), label, group)
        source = f"study.texts={texts}"
    elif label == CORRECT:
        found = _of_answers(study, stop)
        source = "study.label=correct"
    elif label in OF_TOKENS:
        found = _of_tokens(study, label, limit)
        source = f"study.label={label}"
    elif _is_embedded(study):
        found = _of_kinds(study, label, group)
        source = "problems=tiny"
    else:
        found = _of_problems(study, label, group)
        source = f"problems={study.problems}"
    if len(found) > limit:
        chosen = np.random.default_rng(_SEED).permutation(len(found))[:limit]
        found = [found[index] for index in np.sort(chosen)]
    few: dict[str, int] = {}
    if label in OF_TOKENS and not texts:
        counts = Counter(map(_label, found))
        few = {name: count for name, count in sorted(counts.items()) if count < LEAST}
        found = [item for item in found if item.label not in few]
    made = _numbered(found, few)
    _require_classes(made, source)
    return made


def _is_embedded(study: Study) -> bool:
    of_tiny = study.subject.store.manifest["model"]["id"] == "tiny"
    return (study.problems or (of_tiny and problems.TINY)) == problems.TINY


# -- where they come from --------------------------------------------------------------------------


def _of_file(study: Study, path: Path, label: str, group: str | None) -> list[Labelled]:
    """Lines of {text, LABEL, GROUP}; `question` may stand for `text`."""
    if not path.is_file():
        raise SettingError(
            f"study.texts={path} is no file; give a .jsonl of {{text, label}}, with study.label= "
            "where the label has another name"
        )
    tokenizer = study.description.tokenizer
    context = study.description.max_context or 2**31
    found = []
    for place, line in json_lines.lines(path, "study.texts", "text and label"):
        text = line.get("text", line.get("question"))
        if not isinstance(text, str) or not text.strip():
            raise StoreError(f"{place}: a line has a text `text` that is not empty")
        (ids,) = tokenizer.attempt([text])
        if isinstance(ids, DocumentError):
            raise StoreError(f"{place}: {ids}") from ids
        if not 0 < len(ids) < context:
            raise StoreError(
                f"{place}: its text has {len(ids)} tokens, and the model reads 1 to {context - 1} "
                "behind a BOS; cut it, or leave the line out"
            )
        of_group = _name(place, line, group) if group else place
        span = Span([tokenizer.bos, *ids], 1)
        found.append(Labelled(span, _name(place, line, label), of_group, _plain(text), len(ids)))
    return found


def _of_kinds(study: Study, label: str, group: str | None) -> list[Labelled]:
    """The embedded problems' prompts, with their kinds."""
    if label != KIND or group not in (None, WORDING):
        name, value = ("label", label) if label != KIND else ("group", group)
        allowed = ", ".join((KIND, CORRECT, *OF_TOKENS)) if label != KIND else WORDING
        raise SettingError(
            f"study.{name}={value} is of no file; the embedded problems have {allowed}; give the "
            f"file that has it as study.texts= or problems="
        )
    limit = 2 * answering.asking_of(study).questions
    kinds = {drawn.question: drawn.kind for drawn in islice(tiny.problems("heldout"), limit)}
    return _of_prompts(
        study,
        kinds.__getitem__,
        lambda question: _OPERANDS.sub("#", question) if group else question,
    )


def _of_problems(study: Study, label: str, group: str | None) -> list[Labelled]:
    """The prompts of the problems of a file, with a field of its lines."""
    asked = answering.questions(study)  # refuses what are no problems
    path = Path(str(study.problems))
    path = path / "test.jsonl" if path.is_dir() else path
    wanted = {item.question for item, _ in asked}
    labels: dict[str, str] = {}
    groups: dict[str, str] = {}
    for place, line in json_lines.lines(path, "problems", "question and answer"):
        question = line.get("question")
        if question in wanted and question not in labels:
            labels[question] = _name(place, line, label)
            groups[question] = _name(place, line, group) if group else question
    return _of_prompts(study, labels.__getitem__, groups.__getitem__)


def _of_prompts(
    study: Study, label: Callable[[str], str], group: Callable[[str], str]
) -> list[Labelled]:
    """Prompts of problems, labelled and grouped by their questions."""
    found = []
    for item, ids in answering.questions(study):
        text = item.question
        found.append(Labelled(Span(ids, 1), label(text), group(text), _plain(text), len(ids) - 1))
    return found


def _of_answers(study: Study, stop: StopRequest | None) -> list[Labelled]:
    """Answers behind their prompts, right or wrong; those to one question are a group."""
    found = []
    for answer in answering.answers(study, stop):
        if answer.ids:
            span = Span(answer.sequence, len(answer.prompt_ids))
            label = "right" if answer.correct else "wrong"
            question = answer.problem.id
            text = f"{question} {answer.ids}"
            found.append(Labelled(span, label, question, text, len(answer.ids)))
    return found


def _of_tokens(study: Study, label: str, limit: int) -> list[Labelled]:
    """A token of each held-out document, with the text before it."""
    rng = np.random.default_rng(_SEED)
    backend = study.description.tokenizer.backend
    found: dict[int, Labelled] = {}
    for piece in islice(_firsts(study), limit):
        length = int(rng.integers(1, len(piece.ids)))
        ids = piece.ids[: length + 1]
        name = class_of(backend.decode(ids[-1:], skip_special_tokens=False))
        span = Span(ids, length)
        found[piece.document] = Labelled(span, name, str(piece.document), str(ids), length)
    if label == TOKEN_CLASS or not found:
        return list(found.values())
    every = list(found.values())
    thirds = np.quantile(list(map(_length, every)), [1 / 3, 2 / 3])
    names = np.array(["early", "middle", "late"])
    places = names[np.searchsorted(thirds, list(map(_length, every)))]
    return [item._replace(label=str(name)) for item, name in zip(every, places, strict=True)]


def _firsts(study: Study) -> Iterator[pieces.Piece]:
    """The first piece of each held-out document that has a token behind the BOS."""
    seen = set()
    for piece in pieces.held_out(study.subject):
        if piece.document not in seen and len(piece.ids) > 1:
            seen.add(piece.document)
            yield piece


def _name(place: str, line: dict[str, Any], field: str) -> str:
    """A field of a line, as a label or a group."""
    value = line.get(field)
    if not isinstance(value, str | int) or len(str(value)) > _LONGEST_LABEL or value == "":
        got = "none" if field not in line else "another value"
        raise StoreError(
            f"{place}: its `{neutral(field)}` must be a text of at most {_LONGEST_LABEL} "
            f"characters, a whole number, true or false, and it has {got}; study.label= and "
            "study.group= name the fields"
        )
    return neutral(str(value))


def _plain(text: str) -> str:
    """What texts have in common that are the same but for white space and capitals."""
    return " ".join(text.split()).casefold()


# -- numbers and refusals --------------------------------------------------------------------------


def _numbered(found: Sequence[Labelled], left_out: dict[str, int]) -> Examples:
    spans, labels, groups, texts, lengths = zip(*found, strict=True) if found else [()] * 5
    names, label = np.unique(labels, return_inverse=True)
    _, group = np.unique(groups, return_inverse=True)
    _, first, text = np.unique(texts, return_index=True, return_inverse=True)
    repeated = first[text] != np.arange(len(found))
    return Examples(
        spans=list(spans),
        names=names.tolist(),
        label=label.astype(np.int64),
        group=_joined(group, text),
        length=np.array(lengths, np.int64),
        repeated=int(repeated.sum()),
        contradicting=int((repeated & (label != label[first[text]])).sum()),
        left_out=left_out,
    )


def _joined(group: NDArray[np.int64], text: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) groups, of which those that share a text are one; numbered from 0."""
    n = len(group)
    if not n:
        return group
    of_group, of_text = group + n, text + 2 * n  # nodes beside the n rows
    rows = np.arange(n)
    edges = (np.ones(2 * n), (np.r_[rows, rows], np.r_[of_group, of_text]))
    graph = sparse.coo_array(edges, shape=(3 * n, 3 * n))
    _, component = csgraph.connected_components(graph, directed=False)
    _, joined = np.unique(component[:n], return_inverse=True)
    return np.asarray(joined, np.int64)


def _require_classes(made: Examples, source: str) -> None:
    """Raise SettingError unless there are several classes with enough texts and groups each."""
    if len(made.names) < 2:
        had = made.names[0] if made.names else "none"
        raise SettingError(
            f"{source}: all texts have one label ({had}), and probes tell at least two apart; give "
            "texts of both, or another study.label="
        )
    if len(made.names) > MOST_CLASSES:
        raise SettingError(
            f"{source}: there are {len(made.names)} labels, and at most {MOST_CLASSES} are probed; "
            "study.label= names a field of few values"
        )
    for number, name in enumerate(made.names):
        mine = made.label == number
        groups = len(np.unique(made.group[mine]))
        if mine.sum() < LEAST or groups < LEAST_GROUPS:
            raise SettingError(
                f"{source}: label {name} has {mine.sum()} texts in {groups} groups, and {LEAST} in "
                f"{LEAST_GROUPS} are needed; give more of them, or leave the label out"
            )
