"""How the arithmetic of each kind of problem is told: names, things, questions and worked steps.

In the templates `{a}`, `{b}`, `{c}`, `{d}` are the operands in the order of use and `{x}`, `{y}`,
`{z}` the results of the first, second and third operation; `{name}` and `{friend}` are two people
and `{things}` is what is counted.
"""

from typing import NamedTuple


class Wording(NamedTuple):
    """One way to tell a kind of problem."""

    question: str  # template of the question
    steps: str  # template of the worked steps: one equation per line


# ruff: noqa: SIM905 - one name a line would push the wordings off the screen
NAMES: tuple[str, ...] = tuple(
    "Anna Ben Cara Dan Ella Finn Gina Hugo Ivy Jack "
    "Kim Leo Mia Noah Olga Paul Rosa Sam Tina Will".split()
)
THINGS: tuple[str, ...] = tuple(
    "apples balls beans books cards coins cups eggs hats keys "
    "nuts pens pears pins plums rings shells stamps toys".split()
)

WORDINGS: dict[str, tuple[Wording, ...]] = {
    "add": (
        Wording(
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            "{name} has {a} + {b} = {x} {things}.",
        ),
        Wording(
            "There are {a} {things} in a box and {b} in a bag. How many {things} are there?",
            "There are {a} + {b} = {x} {things}.",
        ),
        Wording(
            "{name} has {a} {things}. {friend} has {b} more than {name}. How many {things} "
            "does {friend} have?",
            "{friend} has {a} + {b} = {x} {things}.",
        ),
        Wording(
            "{name} made {a} {things} on Monday and {b} on Friday. How many {things} did "
            "{name} make?",
            "{name} made {a} + {b} = {x} {things}.",
        ),
    ),
    "subtract": (
        Wording(
            "{name} had {a} {things} and gave {b} to {friend}. How many {things} are left?",
            "There are {a} - {b} = {x} {things} left.",
        ),
        Wording(
            "A shop had {a} {things} and sold {b} of them. How many {things} are left?",
            "There are {a} - {b} = {x} {things} left.",
        ),
        Wording(
            "{name} has {a} {things}. {friend} has {b} fewer than {name}. How many "
            "{things} does {friend} have?",
            "{friend} has {a} - {b} = {x} {things}.",
        ),
        Wording(
            "{name} needs {a} {things} and has {b}. How many more {things} does {name} need?",
            "{name} needs {a} - {b} = {x} more {things}.",
        ),
    ),
    "multiply": (
        Wording(
            "There are {a} bags with {b} {things} each. How many {things} are there?",
            "There are {a} * {b} = {x} {things}.",
        ),
        Wording(
            "{name} makes {a} {things} a day for {b} days. How many {things} does {name} make?",
            "{name} makes {a} * {b} = {x} {things}.",
        ),
        Wording(
            "{name} has {a} {things}. {friend} has {b} times as many. How many {things} "
            "does {friend} have?",
            "{friend} has {a} * {b} = {x} {things}.",
        ),
        Wording(
            "A box costs ${a}. {name} buys {b} boxes of {things}. How much does {name} pay?",
            "{name} pays {a} * {b} = ${x}.",
        ),
    ),
    "add_subtract": (
        Wording(
            "{name} had {a} {things}, bought {b} more and gave {c} to {friend}. How many "
            "{things} are left?",
            "{name} had {a} + {b} = {x} {things}.\nThere are {x} - {c} = {y} left.",
        ),
        Wording(
            "A box had {a} {things} and a bag had {b}. {name} sold {c} of them. How many "
            "{things} are left?",
            "There were {a} + {b} = {x} {things}.\nThere are {x} - {c} = {y} left.",
        ),
        Wording(
            "{name} made {a} {things} on Monday and {b} on Friday and lost {c}. How many "
            "{things} are left?",
            "{name} made {a} + {b} = {x} {things}.\nThere are {x} - {c} = {y} left.",
        ),
    ),
    "subtract_add": (
        Wording(
            "{name} had {a} {things}, gave {b} to {friend} and bought {c} more. "
            "How many {things} does {name} have now?",
            "After giving there were {a} - {b} = {x}.\n{name} has {x} + {c} = {y} {things}.",
        ),
        Wording(
            "{name} has {a} {things}. {friend} has {b} fewer and finds {c} more. How many "
            "{things} does {friend} have?",
            "{friend} had {a} - {b} = {x} {things}.\n{friend} has {x} + {c} = {y} {things}.",
        ),
        Wording(
            "A shop had {a} {things}, sold {b} on Monday and made {c} on Friday. How many "
            "{things} are there?",
            "On Monday there were {a} - {b} = {x}.\nThere are {x} + {c} = {y} {things}.",
        ),
    ),
    "multiply_add": (
        Wording(
            "{name} has {a} bags with {b} {things} each and {c} more. How many {things} "
            "does {name} have?",
            "The bags have {a} * {b} = {x} {things}.\n{name} has {x} + {c} = {y} {things}.",
        ),
        Wording(
            "{name} made {a} {things} a day for {b} days and {c} on Friday. How many "
            "{things} did {name} make?",
            "In {b} days {name} made {a} * {b} = {x}.\n{name} made {x} + {c} = {y} {things}.",
        ),
        Wording(
            "{name} buys {b} boxes for ${a} each and a bag for ${c}. How much does {name} pay?",
            "The boxes cost {a} * {b} = ${x}.\n{name} pays {x} + {c} = ${y}.",
        ),
    ),
    "multiply_subtract": (
        Wording(
            "{name} had {a} bags with {b} {things} each and gave {c} to {friend}. How many "
            "{things} are left?",
            "The bags had {a} * {b} = {x} {things}.\nThere are {x} - {c} = {y} left.",
        ),
        Wording(
            "A shop made {a} {things} a day for {b} days and sold {c}. How many {things} are left?",
            "The shop made {a} * {b} = {x} {things}.\nThere are {x} - {c} = {y} left.",
        ),
        Wording(
            "{name} buys {b} boxes for ${a} each and has ${c}. How much more does {name} need?",
            "The boxes cost {a} * {b} = ${x}.\n{name} needs {x} - {c} = ${y}.",
        ),
    ),
    "three_steps": (
        Wording(
            "{name} had {a} bags with {b} {things} each, bought {c} more and gave {d} to "
            "{friend}. "
            "How many {things} are left?",
            "The bags had {a} * {b} = {x} {things}.\n{name} had {x} + {c} = {y}.\nThere "
            "are {y} - {d} = {z} left.",
        ),
        Wording(
            "A shop made {a} {things} a day for {b} days and {c} on Friday and sold {d}. "
            "How many {things} are left?",
            "In {b} days it made {a} * {b} = {x}.\nThere were {x} + {c} = {y}.\nThere are "
            "{y} - {d} = {z} left.",
        ),
        Wording(
            "{name} buys {b} boxes for ${a} each and a bag for ${c} and has ${d}. How much "
            "more does {name} need?",
            "The boxes cost {a} * {b} = ${x}.\nThe bag makes {x} + {c} = ${y}.\n{name} "
            "needs {y} - {d} = ${z}.",
        ),
    ),
}
"""For every kind of problem, its wordings."""
