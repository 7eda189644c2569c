"""Signs of how easily the product reads: `python -m tests.bench.house_signs [CHECKOUT ...]`.

One column for each checkout, by default this one. The signs are of all product packages; they are
signs, not the aim, which is that a tired newcomer understands each file at the first reading.

A code line here is one that is neither blank nor only a comment; docstrings count.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

_ROOTS = ("hydra_plugins", "residual_saes")  # the packages that Python finds by themselves
PACKAGES = ("conf", "data", "harvest", "train", "analyze", "hydra_plugins", "residual_saes")
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def product(root: Path) -> dict[str, Path]:
    """The product's modules, by name: their files. A package is named without `__init__`.

    The packages of the source tree are imported as parts of residual_saes, which links to them.
    """
    modules = {}
    for package in PACKAGES:
        parent = "" if package in _ROOTS else "residual_saes."
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            modules[parent + name.removesuffix(".__init__")] = path
    return modules


# -- imports ---------------------------------------------------------------------------------------


def imported(path: Path, modules: Mapping[str, Path]) -> tuple[set[str], set[str]]:
    """The product's modules that a file imports: (at module level, inside functions).

    Imports under TYPE_CHECKING are at module level.
    """
    at_once = set[str]()
    lazily = set[str]()
    for node, late in statements(parsed(path)):
        names = [name for name in _imported_names(node, modules) if name in modules]
        (lazily if late else at_once).update(names)
    return at_once, lazily


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text())


def statements(node: ast.AST, late: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement below a node, and whether it is inside a function."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, part, ()):
            if isinstance(child, ast.stmt):
                yield child, late
            yield from statements(child, late or isinstance(child, _FUNCTIONS))


def _imported_names(node: ast.AST, modules: Mapping[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return []
    whole = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in modules else node.module for name in whole]


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others: none in a good house.

    Args:
        edges: of each module, those that it imports.
    """
    reached = {module: _reachable(module, edges) for module in edges}
    found = list[list[str]]()
    for module in sorted(edges):
        group = [other for other in sorted(reached[module]) if module in reached.get(other, ())]
        if group and group not in found:
            found.append(group)
    return found


def _reachable(module: str, edges: Mapping[str, set[str]]) -> set[str]:
    reached = set[str]()
    waiting = [module]
    while waiting:
        fresh = edges.get(waiting.pop(), set()) - reached
        reached |= fresh
        waiting += fresh
    return reached


# -- the signs -------------------------------------------------------------------------------------


def has_code(path: Path) -> bool:
    """Whether a file holds anything but a docstring."""
    body = ast.parse(path.read_text()).body
    is_docstring = len(body) == 1 and ast.get_docstring(ast.Module(body, [])) is not None
    return bool(body) and not is_docstring


class Function(NamedTuple):
    """A function or method."""

    name: str
    lines: int  # without decorators
    declared: bool  # it has a docstring or `...` for a body, as a Protocol's methods have


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method of a file."""
    for node, _ in statements(tree):
        if isinstance(node, _FUNCTIONS):
            assert node.end_lineno is not None
            constants = [isinstance(part, ast.Expr) for part in node.body]
            declared = all(constants) and isinstance(node.body[-1].value, ast.Constant)
            yield Function(node.name, node.end_lineno - node.lineno + 1, declared)


def _pairs(tree: ast.AST) -> int:
    """Assignments of a written tuple to a tuple: `x, y = a, b`."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            count += any(isinstance(target, ast.Tuple) for target in node.targets)
    return count


def signs(root: Path) -> dict[str, float]:
    """Every sign of a checkout, by name."""
    modules = product(root)
    texts = [path.read_text() for path in modules.values()]
    lines = [line for text in texts for line in text.splitlines()]
    filled = [line for line in lines if line.strip()]
    code = sum(not line.lstrip().startswith("#") for line in filled)
    trees = list(map(parsed, modules.values()))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    comprehensions = sum(isinstance(node, _COMPREHENSIONS) for node in nodes)
    every = [function for tree in trees for function in functions(tree)]
    lengths = [function.lines for function in every]
    written = [function.lines for function in every if not function.declared]
    widths = sorted(map(len, filled))
    packages = [path for path in modules.values() if path.name == "__init__.py"]
    edges = {module: imported(path, modules)[0] for module, path in modules.items()}
    return {
        "files": len(modules),
        "lines": len(lines),
        "longest file, lines": max(len(text.splitlines()) for text in texts),
        "import circles": len(circles(edges)),
        "__init__ files with code": sum(map(has_code, packages)),
        "comprehensions per 1,000 code lines": round(1000 * comprehensions / code, 1),
        "tuple-to-tuple assignments per 1,000 code lines": round(
            1000 * sum(map(_pairs, trees)) / code, 1
        ),
        "90th percentile line, columns": widths[int(0.9 * len(widths))],
        "longest line, columns": widths[-1],
        "functions": len(lengths),
        "median function, lines": statistics.median(lengths),
        "the same without a Protocol's declarations": statistics.median(written),
        "longest function, lines": max(lengths),
    }


def main() -> None:
    roots = [Path(word) for word in sys.argv[1:]] or [Path(__file__).parents[2]]
    columns = [signs(root) for root in roots]
    for name in columns[0]:
        print(f"{name:<48}", *(f"{column[name]:>9,g}" for column in columns))


if __name__ == "__main__":
    main()
