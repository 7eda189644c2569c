"""Arithmetic word problems in the manner of GSM8K: a question, worked steps, `#### N`.

The contract: `problem(split, index, seed)` is a pure function, the same on every platform and in
every process; no equation (an operation and its operands, `3 + 4` and `4 + 3` taken as one) occurs
in both splits, not even as one step of several. So a right answer to a held-out problem was worked
out, never remembered.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import count
from random import Random
from typing import Literal, NamedTuple

from residual_saes.data.tiny.wordings import NAMES, THINGS, WORDINGS

Split = Literal["train", "heldout"]

HELDOUT_ONE_IN = 5
"""One equation in this many is held out. The training set still shows each operand often."""


class Operation(NamedTuple):
    """One step of a plan, `left op right`; left is the result of the step before."""

    op: Literal["+", "-", "*"]
    smallest: int  # of the right operand
    largest: int  # of the right operand


class Plan(NamedTuple):
    """The arithmetic of a kind of problem."""

    first: tuple[int, int]  # range of the first operand, both ends included
    operations: tuple[Operation, ...]


PLANS: dict[str, Plan] = {
    "add": Plan((3, 79), (Operation("+", 3, 69),)),
    "subtract": Plan((12, 99), (Operation("-", 3, 79),)),
    "multiply": Plan((3, 49), (Operation("*", 2, 4),)),
    "add_subtract": Plan((3, 59), (Operation("+", 3, 39), Operation("-", 3, 59))),
    "subtract_add": Plan((12, 79), (Operation("-", 3, 59), Operation("+", 3, 39))),
    "multiply_add": Plan((3, 24), (Operation("*", 2, 4), Operation("+", 3, 19))),
    "multiply_subtract": Plan((3, 24), (Operation("*", 2, 4), Operation("-", 3, 19))),
    "three_steps": Plan(
        (3, 24), (Operation("*", 2, 4), Operation("+", 3, 19), Operation("-", 3, 19))
    ),
}
"""The ranges set the difficulty: with these, the tiny model gets every kind partly right."""

KINDS: tuple[str, ...] = tuple(PLANS)
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Equation(NamedTuple):
    """`left op right = result`, one line of the worked steps."""

    left: int
    op: str
    right: int
    result: int

    @property
    def key(self) -> tuple[str, int, int]:
        """(op, left, right), the operands of + and * in order of size; a split owns keys."""
        swap = self.op != "-" and self.left > self.right
        return (self.op, self.right, self.left) if swap else (self.op, self.left, self.right)


@cache  # some thousands of keys, asked for dozens of times per problem
def owner(key: tuple[str, int, int]) -> Split:
    """The one split that an equation of this key may occur in."""
    op, left, right = key
    # A digest: unlike `hash` it is the same in every process, unlike crc32 it scatters neighbours.
    digest = blake2b(f"{left}{op}{right}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0 else "train"


@dataclass(frozen=True)
class Problem:
    """A word problem with its solution."""

    id: str  # split, seed and index: what `problem` was called with
    kind: str  # one of KINDS
    question: str
    steps: str  # the worked steps, one equation per line
    answer: int


def prompt(problem: Problem) -> str:
    """The text a model is to continue: the prompt of lm-evaluation-harness' GSM8K task."""
    return f"Question: {problem.question}\nAnswer:"


def solution(problem: Problem) -> str:
    """The worked steps and the final answer, as in GSM8K."""
    return f"{problem.steps}\n#### {problem.answer}"


def document(problem: Problem) -> str:
    """Prompt and solution: one training document."""
    return f"{prompt(problem)} {solution(problem)}"


def problem(split: Split, index: int, seed: int = 0) -> Problem:
    """The problem at `index` (from 0) of a split's endless list; a pure function."""
    identity = f"{split}-{seed}-{index}"
    rng = Random(identity)  # Random seeds itself from a string by SHA-512: the same everywhere
    kind = rng.choice(KINDS)
    equations = draw_equations(rng, PLANS[kind], split)
    wording = rng.choice(WORDINGS[kind])
    name, friend = rng.sample(NAMES, 2)
    operands = [equations[0].left] + [equation.right for equation in equations]
    results = [equation.result for equation in equations]
    fields = dict(zip("abcd", operands, strict=False)) | dict(zip("xyz", results, strict=False))
    words = {"name": name, "friend": friend, "things": rng.choice(THINGS)}
    question, steps = (template.format(**fields, **words) for template in wording)
    return Problem(identity, kind, question, steps, results[-1])


def problems(split: Split, start: int = 0, seed: int = 0) -> Iterator[Problem]:
    """The problems of a split from index `start` on, without end."""
    return (problem(split, index, seed) for index in count(start))


def draw_equations(rng: Random, plan: Plan, split: Split) -> list[Equation]:
    """Operands for a plan such that every equation belongs to the split."""
    while True:
        equations: list[Equation] = []
        left = rng.randint(*plan.first)
        for operation in plan.operations:
            equation = draw_equation(rng, left, operation, split)
            if equation is None:
                break
            equations.append(equation)
            left = equation.result
        else:
            return equations


def draw_equation(rng: Random, left: int, operation: Operation, split: Split) -> Equation | None:
    """An equation of the split from `left` with a result of at least 1; None if there is none."""
    op, smallest, largest = operation
    rights = range(smallest, min(largest, left - 1 if op == "-" else largest) + 1)
    equations = (Equation(left, op, right, RESULT[op](left, right)) for right in rights)
    allowed = [equation for equation in equations if owner(equation.key) == split]
    return rng.choice(allowed) if allowed else None
