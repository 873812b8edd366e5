"""Imports point down: a test walks them and names one that does not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import accelerando

HOUSE = Path(accelerando.__file__).parent

# A room may import from rooms on lower floors, and from itself.  Rooms that share a floor are strangers, but for
# the nouns at the root, which are ordered among themselves by their own floors.
FLOORS = {
    "pipeline": 7, "renewal": 7.5, "cli": 9, "result": 6.5, "demo": 8, "doctor": 7, "targets": 1,
    "search": 6, "serve": 6, "server": 6.5, "model_repository": 6.5,
    "techniques": 5, "backends": 5, "profile": 5, "measure": 5, "report": 5, "train": 4,
    "bundle": 3, "manifest": 2.8, "parity": 2.2, "proof": 2.9, "disk": 2.2, "strict_json": 0.5,
    "ladder": 2.6, "goal": 2.6, "goal_text": 0.5, "trial": 2.4, "plugins": 2.2, "recipe": 2.1,
    "workload": 1.5, "intake": 1.6, "schooling": 1.65, "adoption": 1.7,
    "metric": 1.2, "signature": 1, "machine": 0.5, "interval": 0.5, "memory": 0.5, "errors": 0,
    "testing": 9,
}  # fmt: skip


def imports(house: Path) -> Iterator[tuple[Path, int, str, str]]:
    """(file, line, room that imports, room that is imported) of every import of the house, also inside functions."""
    for file in sorted(house.rglob("*.py")):
        room = room_of(file.relative_to(house))
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for_types = {n for branch in ast.walk(tree) if _is_for_types(branch) for n in ast.walk(branch)}
        for node in ast.walk(tree):
            names = []
            if node in for_types:
                continue  # never run
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
                if node.module == "accelerando":
                    names = [f"accelerando.{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "accelerando" and len(parts) > 1 and room != "__init__":
                    yield file, node.lineno, room, parts[1]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def trespasses(house: Path) -> list[str]:
    found = []
    for file, line, here, there in imports(house):
        if here == there:
            continue
        if there not in FLOORS or here not in FLOORS:
            found.append(f"{file.name}:{line}: {here} -> {there}: a room without a floor")
        elif FLOORS[there] >= FLOORS[here]:
            found.append(f"{file.name}:{line}: {here} -> {there}: imports point down")
    return found


def test_imports_point_down() -> None:
    assert trespasses(HOUSE) == []


def test_sabotage_an_upward_and_a_sideways_import_are_named(tmp_path: Path) -> None:
    (tmp_path / "measure").mkdir()
    (tmp_path / "measure" / "examine.py").write_text("from accelerando.search import ask\n")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "text.py").write_text("def f():\n    import accelerando.measure.rounds\n")
    (tmp_path / "goal.py").write_text("from accelerando import pipeline\n")
    assert sorted(trespasses(tmp_path)) == [
        "examine.py:1: measure -> search: imports point down",
        "goal.py:1: goal -> pipeline: imports point down",
        "text.py:2: report -> measure: imports point down",
    ]


def test_no_room_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "core", "base", "manager", "engine", "helper", "helpers", "misc"}
    assert [p for p in HOUSE.rglob("*") if p.stem.lstrip("_") in empty] == []


def test_no_file_bears_the_name_of_a_function_that_it_defines() -> None:
    """Or the function would take the module's place on the package."""
    for file in HOUSE.rglob("*.py"):
        names = [n.name for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
        assert file.stem not in names, file


def test_heavy_libraries_are_imported_inside_functions_only() -> None:
    heavy = {
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "openvino",
        "nncf",
        "sklearn",
        "pandas",
        "plotly",
        "cloudpickle",
    }
    for file in HOUSE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {n.partition(".")[0] for n in names}, f"{file}:{node.lineno}"
