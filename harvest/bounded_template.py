"""Chat templates are programs of strangers: what one rendering may do and make is bounded.

Jinja's sandbox keeps a template from the machine, not from running for ever or filling the memory.
Here each loop and each call costs a step, whatever makes a value is asked for its size before, and
no value may be larger than `Budget.largest`. All of that depends on the template and the chat
alone, so a store does not depend on the machine. A bound on the processor's time stands behind it.

A value's size is what it has when it is printed: characters of a text, and of a list those of all
that it holds, as often as it holds it.
"""

from __future__ import annotations

import ast
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2.runtime import markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from residual_saes.data.errors import SettingError

# Of one rendering: about a second. Gemma 4's templates look at all messages for each one, and take
# 3.4 n² steps of a chat of n texts; that is the most of 72 published ones.
_STEPS = 1_000_000
_STEPS_FOR_TEXTS = 50  # times n²
_STEPS_FOR_CHARACTERS = 100
_SECONDS = 20.0  # of the processor, and 20 µs times n²
_READ = 16  # characters, or entries, that are read in a step
_LARGEST = 1 << 24  # characters of a value, beside 8 for each one of the chat
_MADE = 1 << 27  # characters of all values that are made, beside 64 for each one of the chat
_TEMPLATE = 1 << 20  # characters of a template; the longest published have 30,000
_CALL = 20  # steps of a call
_WIDTH = 1 << 20  # as a number that a text is padded or repeated to
_BITS = 1 << 14  # of a whole number

# What may make more than it is given: filters of Jinja and methods of str.
_GROWING = {
    *("batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "rjust"),
    *("round", "slice", "sum", "tojson", "translate", "urlize", "wordwrap", "xmlattr", "zfill"),
}
_FORMATTING = {"format", "format_map"}
_WIDE = re.compile(r"\d{6}|%[-+ #0]*\*")  # a width in a format
_LAZY: tuple[type, ...] = (Iterator, type({}.items()), type({}.keys()), type({}.values()))


class TooMuchWork(ValueError):
    """A template does, or makes, more than any honest one."""


class Budget:
    """What one rendering may still do."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Take all texts of the chat."""
        size = sum(map(len, texts))
        pairs = len(texts) ** 2
        self.largest = _LARGEST + 8 * size
        self._steps = _STEPS + _STEPS_FOR_CHARACTERS * size + _STEPS_FOR_TEXTS * pairs
        self._left = self._steps
        self._made = _MADE + 64 * size
        self._seconds = _SECONDS + 2e-5 * pairs
        self._end = time.thread_time() + self._seconds
        # By the id of a list or mapping, which is kept so that the id stays its own.
        self._sizes: dict[int, tuple[Any, int]] = {}

    def step(self, steps: int = 1) -> None:
        """Count some steps."""
        self._left -= steps
        if self._left < 0:
            raise TooMuchWork(f"it takes more than {self._steps:,} steps")
        if steps > 1 or not self._left % 1024:
            self._watch()

    def read(self, value: Any) -> Any:
        """A value that is read as a whole, for as many steps as that takes."""
        size = self.size(value)
        if size > _READ:
            self.step(1 + size // _READ)
        return value

    def _watch(self) -> None:
        if time.thread_time() > self._end:
            raise SettingError(
                f"a chat template takes more than {self._seconds:.0f} s for one chat; take another "
                "model, or name a column of plain text with field="
            )

    def require(self, size: int) -> None:
        """Raise TooMuchWork if a value of so many characters is too large."""
        if size > self.largest:
            raise TooMuchWork(f"it makes more than {self.largest:,} characters of one value")

    def sized(self, value: Any) -> Any:
        """A value that was just made, if it is not too large."""
        size = self.size(value)
        self.require(size)
        if size > _READ:
            self._made -= size if isinstance(value, str | bytes | int) else len(value)
            if self._made < 0:
                raise TooMuchWork("it makes too many values")
        return value

    def size(self, value: Any) -> int:
        """Characters of a value; of one that is too large, more than `largest`."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 3
        if isinstance(value, range):
            return 1 + 6 * len(value)
        if not isinstance(value, list | tuple | Mapping | set | frozenset):
            return 1
        if id(value) in self._sizes:
            return self._sizes[id(value)][1]
        self.step(1 + len(value))
        size = 1
        for inner in value:
            size += self.size(inner)
            if isinstance(value, Mapping):
                size += self.size(value[inner])
            if size > self.largest:
                break
        self._sizes[id(value)] = (value, size)
        return size


_current = threading.local()


@contextmanager
def bounded(texts: Sequence[str]) -> Iterator[None]:
    """Bound the rendering of one chat in this thread, given all its texts."""
    former = getattr(_current, "budget", None)
    _current.budget = Budget(texts)
    try:
        yield
    finally:
        _current.budget = former


def install() -> None:
    """Have transformers render chat templates by `Bounded`."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = Bounded


def _budget() -> Budget | None:
    return getattr(_current, "budget", None)


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a `Budget`; without one it is Jinja's."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def from_string(self, source: Any, *args: Any, **options: Any) -> Any:
        """Compile a template."""
        if len(source) > _TEMPLATE:
            raise TooMuchWork(f"it has {len(source):,} characters")
        tables: list[dict[str, Any]] = [self.filters, self.tests]
        for functions in tables:
            for name, function in functions.items():
                functions[name] = _guarded(name, function)
        self.globals.pop("lipsum", None)  # it draws at random, and as much as it is told
        namespace: Any = self.globals["namespace"]
        # A namespace may hold itself, and be printed with all that it holds.
        self.globals["namespace"] = type("Namespace", (namespace,), {"__repr__": _name})
        return super().from_string(source, *args, **options)

    def _compile(self, source: str, filename: str) -> Any:
        """The template's Python, which Jinja wrote, with a step in each loop and function."""
        tree = ast.fix_missing_locations(_Steps().visit(ast.parse(source)))
        return compile(tree, filename, "exec")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See jinja2.sandbox."""
        if budget := _budget():
            _require_small(budget, operator, left, right)
        value = super().call_binop(context, operator, left, right)
        return budget.sized(value) if budget else value

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        """See jinja2.sandbox; the underscores leave all names to `options`."""
        budget = _budget()
        if budget is None:
            return super().call(__context, __obj, *args, **options)
        args = tuple(map(_listed, args))
        budget.step(_CALL)
        method = getattr(__obj, "__wrapped__", __obj)  # str.format has a wrapper
        text = getattr(method, "__self__", None)
        if isinstance(text, str | bytes):
            budget.read(text)
            _require_growth(budget, method.__name__, [text, *args, *options.values()])
        return budget.sized(super().call(__context, __obj, *args, **options))

    def concat(self, parts: Iterable[str]) -> str:
        """The texts as one; Jinja collects in lists what a template prints."""
        budget = _budget()
        if budget is None:
            return "".join(parts)
        texts: list[str] = []
        total = 0
        for part in parts:
            total += len(part)
            budget.require(total)
            texts.append(part)
        return "".join(texts)

    def tick(self) -> None:
        """Count a step of the template."""
        if budget := _budget():
            budget.step()

    def read(self, value: Any) -> Any:
        """A value that is compared, or looked for."""
        budget = _budget()
        return budget.read(value) if budget else value

    def held(self, value: Any) -> Any:
        """A list or a mapping that the template wrote."""
        budget = _budget()
        return budget.sized(value) if budget else value

    def str_join(self, parts: tuple[Any, ...]) -> str:
        """What `~` makes."""
        return str_join(self.held(parts))

    def markup_join(self, parts: tuple[Any, ...]) -> str:
        """What `~` makes in a block that escapes HTML."""
        return markup_join(self.held(parts))


def _name(_: Any) -> str:
    return "<Namespace>"


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, asked for the size of what it makes."""

    behind = 1 if hasattr(function, "jinja_pass_arg") else 0  # of what Jinja gives to it

    @functools.wraps(function)  # keeps what Jinja notes on functions
    def guarded(*args: Any, **options: Any) -> Any:
        budget = _budget()
        if budget is None:
            return function(*args, **options)
        args = tuple(map(_listed, args))
        for value in args[behind : behind + 1]:
            budget.step(_CALL)
            budget.read(value)
        _require_growth(budget, name, [*args[behind:], *options.values()])
        return budget.sized(function(*args, **options))

    return guarded


def _listed(value: Any) -> Any:
    """A value; what is made while it is read, as a list: so its size is known."""
    is_lazy = isinstance(value, _LAZY)
    return list(value) if is_lazy else value


def _require_growth(budget: Budget, name: str, values: list[Any]) -> None:
    """Raise TooMuchWork before a filter or a method makes too much of `values`."""
    if name == "replace" and len(values) >= 3:
        text, old, new = map(str, values[:3])
        budget.require(len(text) + text.count(old) * len(new))
    if name not in _GROWING or not values:
        return
    first, *others = values
    if name == "sum":
        texts = [value for value in others if not isinstance(value, int | float)]
        budget.step(len(first) * budget.size(first) // _READ if texts else 1)
        return
    if name in _FORMATTING and isinstance(first, str) and _WIDE.search(first):
        raise TooMuchWork("its format has a width of a million")
    width = max([abs(value) for value in others if isinstance(value, int)], default=1)
    if width > _WIDTH:
        raise TooMuchWork(f"{name} is given {width:,}")
    # A separator or an indentation may stand in many places.
    longest = max([width, *map(budget.size, others)])
    budget.require(budget.size(first) * longest // 16)


def _require_small(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Raise TooMuchWork before an operator makes too much."""
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if operator == "%" and isinstance(left, str):
        _require_growth(budget, "format", [left, right])
    elif operator == "*" and len(numbers) == 1:
        size = budget.size(right if numbers[0] is left else left)
        budget.require(size * abs(numbers[0]))
    elif operator in ("*", "**") and len(numbers) == 2:
        bits = left.bit_length()
        made = bits * abs(right) if operator == "**" else bits + right.bit_length()
        if made > _BITS:
            raise TooMuchWork(f"it makes a number of {made:,} bits")
    elif operator == "+":
        budget.require(budget.size(left) + budget.size(right))


class _Steps(ast.NodeTransformer):
    """Puts a call of `Bounded` wherever a template's Python repeats, calls, or makes a value."""

    def visit_For(self, node: ast.For) -> ast.AST:
        return self._stepped(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._stepped(node)

    def visit_List(self, node: ast.List) -> ast.AST:
        return self._held(node)

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        return self._held(node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        return self._held(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        node.left, *node.comparators = map(_read, [node.left, *node.comparators])
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return _method(node.id) if node.id in ("str_join", "markup_join") else node

    def _stepped(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(ast.Call(_method("tick"), [], [])))
        return node  # type: ignore[no-any-return]

    def _held(self, node: Any) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load) or _is_plain(node):
            return node  # type: ignore[no-any-return]
        return ast.Call(_method("held"), [node], [])


def _is_plain(node: Any) -> bool:
    """Whether a display holds constants alone, or nothing: Jinja's own buffers, tables of names."""
    values = node.values if isinstance(node, ast.Dict) else node.elts
    return all(isinstance(value, ast.Constant) for value in values)


def _read(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id == "missing"):
        return node
    return ast.Call(_method("read"), [node], [])


def _method(name: str) -> ast.Attribute:
    return ast.Attribute(ast.Name("environment", ast.Load()), name, ast.Load())
