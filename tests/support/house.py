"""The package's modules as text: what each imports, and the names each compares with.

An import inside a function counts like one at the top of a file; imports under ``if TYPE_CHECKING:`` do not run and do not count.
A package's ``__init__`` may re-export: an import of one of its names is an import of the module that defines the name.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import deflow_torchrl

PACKAGE = "deflow_torchrl"
ROOT = Path(deflow_torchrl.__file__).parent
_PREFIX_CALLS = (".startswith", ".removeprefix", ".partition", ".split")


def module_name(path: Path) -> str:
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def room(module: str) -> str:
    """The folder, or the file of the package's own folder, that a module is in; ``""`` for the package itself."""
    return (module + ".").split(".")[1]


def statements(module: str, *, functions: bool) -> Iterator[ast.stmt]:
    """Statements that run: all but those under ``if TYPE_CHECKING:``; those in functions where asked for."""
    waiting: list[ast.AST] = list(tree(module).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if isinstance(node, ast.stmt):
                yield node
            waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]


def _is_package(module: str) -> bool:
    return FILES[module].name == "__init__.py"


@functools.cache
def _reexports(package: str) -> dict[str, tuple[str, str]]:
    """Name -> (module, name there), of a package's ``__init__`` and its stub."""
    found = {}
    for path in (FILES[package], FILES[package].with_suffix(".pyi")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ():
            if isinstance(node, ast.ImportFrom):
                module = f"{package}.{node.module or ''}".rstrip(".") if node.level else str(node.module)
                found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return found


def _defining(module: str, name: str) -> str:
    """The module that ``from module import name`` is about."""
    if f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    if module in FILES and _is_package(module) and name in _reexports(module):
        return _defining(*_reexports(module)[name])
    return module


@functools.cache
def imports(module: str) -> dict[str, int]:
    """Modules of the package that a module imports, those it imports inside functions too, and the line."""
    at_top = {id(node) for node in statements(module, functions=False)}
    found: dict[str, int] = {}
    for node in statements(module, functions=True):
        if _is_package(module) and id(node) in at_top:
            continue  # a re-export
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            for alias in node.names:
                found.setdefault(_defining(str(node.module), alias.name), node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(PACKAGE):
                    found.setdefault(alias.name, node.lineno)
    return {name: line for name, line in found.items() if name != module and name in FILES}


def foreign_imports(module: str) -> set[str]:
    """Top-level names of other packages that are imported with the module."""
    found = set()
    for node in statements(module, functions=False):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found - {PACKAGE}


def circles() -> list[set[str]]:
    """Sets of modules that import each other, directly or by way of others."""
    reached = {module: _reached(module) for module in FILES}
    found: list[set[str]] = []
    for module in FILES:
        circle = {other for other in reached[module] if module in reached[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


def _reached(module: str) -> set[str]:
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        new = set(imports(waiting.pop())) - reached
        reached |= new
        waiting += new
    return reached


def compared_strings(module: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that something is compared or matched with, or that is looked for in front of it."""
    for node in ast.walk(tree(module)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            parts = [node.pattern]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(_PREFIX_CALLS):
            parts = list(node.args)
        for leaf in (leaf for part in parts for leaf in ast.walk(part)):
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                yield leaf.lineno, leaf.value


def tables(module: str) -> Iterator[tuple[int, set[object]]]:
    """Line and constant keys of every dictionary that is written out."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Dict):
            yield node.lineno, {key.value for key in node.keys if isinstance(key, ast.Constant)}
