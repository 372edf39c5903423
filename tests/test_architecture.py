"""The way of the data is the way of the imports: rooms look one way, files never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# room → rooms it may import; `pingscope` itself holds leaf files (errors, schema) and the door, which opens every room
MAY_IMPORT = {
    "interp": {"interp"},
    "probes": {"interp", "probes"},
    "steering": {"interp", "probes", "steering"},
    "figures": {"interp", "figures"},
    "experiments": {"interp", "probes", "steering", "figures", "experiments"},
}


def imports(path: Path) -> set[str]:
    """Every module of this package that a file names, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("pingscope.")}


MODULES = {
    "pingscope." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in MAY_IMPORT
    for path in sorted((ROOT / room).rglob("*.py"))
}
GRAPH = {name: (imports(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}


def test_rooms_import_in_one_direction() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in sorted(others)
        if other.split(".")[1] not in MAY_IMPORT[name.split(".")[1]]
    ]
    assert not wrong


def test_no_file_imports_itself_in_a_circle() -> None:
    # A package's __init__ is the door of its room: it opens what lies behind it, so it is left out.
    graph = {
        name: {other for other in others if MODULES[other].name != "__init__.py"}
        for name, others in GRAPH.items()
        if MODULES[name].name != "__init__.py"
    }
    finished: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way[way.index(name) :], name])
        if name not in finished:
            for other in sorted(graph[name]):
                walk(other, (*way, name))
            finished.add(name)

    for name in graph:
        walk(name, ())


def test_no_function_is_longer_than_a_page() -> None:
    """60 lines of code; what a docstring says about shapes and errors is not counted."""

    def lines(function: ast.FunctionDef) -> int:
        said = ast.get_docstring(function, clean=False)
        return (function.end_lineno or 0) - function.lineno + 1 - (said.count("\n") + 1 if said else 0)

    too_long = [
        f"{path.relative_to(ROOT)}: {node.name}, {lines(node)} lines"
        for path in [*MODULES.values(), *(ROOT / "benchmarks").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and lines(node) > 60
    ]
    assert not too_long
