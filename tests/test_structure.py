"""The house: imports point downwards, and none comes back to where it began."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import cl_optim

PACKAGE = Path(cl_optim.__file__).parent
# From the ground up: a room may use lower floors only, and not its neighbours on its own.
FLOORS = (
    {"_C", "_C_cuda", "_version"},
    {"ops"},
    {"distributed"},
    {"importance", "functional"},
    {"fisher", "optim"},
    {"retention"},
    {"integrations", "demo"},
    {"cli"},
)


class Import(NamedTuple):
    """An import of one module of the package by another, perhaps for types alone."""

    importer: str
    imported: str
    line: int
    typing: bool


def modules() -> dict[str, Path]:
    """Each module of the package by its name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports() -> Iterator[Import]:
    """Every import within the package, in functions, too."""
    for name, path in MODULES.items():
        yield from _imports(name, ast.parse(path.read_text()), typing=False)


def _imports(name: str, node: ast.AST, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        for imported in _imported(child):
            yield Import(name, imported, child.lineno, typing)
        yield from _imports(name, child, typing or is_typing)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not looked into"
        base = node.module or ""
        # `from cl_optim.ops import library` imports a module, `… import Backend` a name of one.
        names = [f"{base}.{alias.name}" for alias in node.names]
        names = [name if _own(name) in MODULES else base for name in names]
    else:
        return []
    return [_own(name) for name in names if name.split(".")[0] == "cl_optim"]


def _own(name: str) -> str:
    return name.removeprefix("cl_optim").removeprefix(".")


IMPORTS = list(imports())


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def circle(edges: list[Import]) -> list[str]:
    """Modules that import each other round and round; empty where there are none."""
    graph: dict[str, set[str]] = {}
    for edge in edges:
        graph.setdefault(edge.importer, set()).add(edge.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_each_module_has_a_floor():
    assert {room(name) for name in MODULES} - {""} <= set().union(*FLOORS)
    assert len(IMPORTS) > 300


def test_imports_point_downwards():
    # The package itself offers what is in it, and is used like any other by what runs it.
    upwards = [
        edge
        for edge in IMPORTS
        if edge.importer
        and room(edge.importer) != room(edge.imported)
        and (
            floor(edge.importer) < floor("demo")
            if not edge.imported
            else floor(edge.imported) >= floor(edge.importer)
        )
    ]
    assert not upwards


def test_no_import_comes_back():
    """Not one that waits until it is needed, either; types alone may."""
    assert not circle([edge for edge in IMPORTS if not edge.typing])


def test_a_circle_is_found():
    there, back = (Import(one, other, 1, typing=False) for one, other in ("ab", "ba"))
    assert circle([there]) == []
    assert set(circle([there, back])) == {"a", "b"}
