# SPDX-License-Identifier: Apache-2.0
"""Imports point down the floors of the house, in the whole package and inside its large rooms.

Every module is parsed, so an import inside a function counts too and a circle cannot hide behind import order.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_bagel"
#: Folders whose modules may import each other, but not in a circle.
FOLDERS = ("megatron_bagel", "tools", "data_tools", "benchmarks")
#: Room -> its floors, lower ones first. Parts of one floor do not import each other. The empty name is the package itself.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (
        ("common",), ("config", "platform"), ("layout", "parallel"), ("model", "data", "checkpoint"), ("encoders",), ("costs",),
        ("assembly",), ("inference", "sample_world"), ("training",), ("planning",), ("cli",),
        ("train", "generate", "evaluate", "plan", "__main__"),
    ),
    "checkpoint": (("hf",), ("dist",), ("convert",), ("convert_adapter",)),
    "cli": (
        ("usage", "console"), ("cost_settings", "data_settings", "hub_models"), ("resolve_run", "resolve_plan"),
        ("train", "plan", "generate", "evaluate", "data", "convert", "quickstart"), ("main",),
    ),
    "data": (("keyed_random", "tokenizer", "transforms"), ("sources",), ("index",), ("planner",), ("loading", "inspect")),
    "inference": (("core",), ("batch",), ("web",)),
    "training": (
        ("losses", "optim", "expert_loads"), ("step_result",), ("hooks",), ("observability",), ("resilience",), ("step",),
        ("evaluation", "saving"), ("loop",), ("resolved_run",), ("setup", "export_job"),
    ),
}  # fmt: skip


def imported_modules(tree: ast.AST) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield (dotted parts, line) of every import from ``FOLDERS``; a relative import has no parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.module is None or node.level:
                yield (), node.lineno
            elif node.module.split(".")[0] in FOLDERS:
                yield from (((*node.module.split("."), alias.name), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            yield from ((tuple(parts), node.lineno) for parts in names if parts[0] in FOLDERS and len(parts) > 1)


def offences(path: Path) -> list[str]:
    """Describe the imports of a module that point up, sideways or to no floor."""
    own = path.relative_to(PACKAGE).with_suffix("").parts
    offending = []
    for target, line in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
        problem = _outside(target) or _upward(own, target[1:])
        if problem:
            offending.append(f"{path.relative_to(PACKAGE)}:{line} {problem}")
    return offending


def _outside(target: tuple[str, ...]) -> str | None:
    if not target:
        return "is a relative import"
    return None if target[0] == "megatron_bagel" else f"imports {target[0]}, which is not part of the package"


def _upward(own: tuple[str, ...], target: tuple[str, ...]) -> str | None:
    if own == ("__init__",):  # the package itself stands below everything
        return "imports from above" if target[0] in _levels("") else None
    if target[0] == "__version__":
        return None
    if own[0] != target[0]:
        return _compare("", own[0], target[0])
    room = own[0]
    if room not in FLOORS or len(own) < 2 or len(target) < 2 or own[1] == target[1] or own[1] == "__init__":
        return None
    return _compare(room, own[1], target[1])


def _levels(room: str) -> dict[str, int]:
    return {part: level for level, parts in enumerate(FLOORS[room]) for part in parts}


def _compare(room: str, own: str, target: str) -> str | None:
    levels = _levels(room)
    where = f" of {room}" if room else ""
    if own not in levels or target not in levels:
        return f"({own}) imports {target}, and one of them is on no floor{where}"
    return f"({own}) imports {target}, which is not below it" if levels[target] >= levels[own] else None


def module_graph() -> dict[str, set[str]]:
    """Map every module of ``FOLDERS`` to the modules it imports, those for type checking included."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        imported = (target for target, _ in imported_modules(ast.parse(path.read_text(encoding="utf-8"))))
        modules = (".".join(target) if ".".join(target) in names else ".".join(target[:-1]) for target in imported)
        graph[name] = {module for module in modules if module in names and module != name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, or an empty list."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if loop := visit(target, [*trail, name]):
                return loop
        done.add(name)
        return []

    return next((loop for name in sorted(graph) if (loop := visit(name, []))), [])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert not offences(path)


def test_every_room_is_a_package():
    """A folder without ``__init__.py`` is left out of the installed package."""
    assert not [folder for folder in {path.parent for path in PACKAGE.rglob("*.py")} if not (folder / "__init__.py").is_file()]


def test_no_circle():
    graph = module_graph()
    assert "megatron_bagel.cli.data.build" in graph["data_tools.build_index"] and "tools.golden_cases" in graph["tools.golden_train"]
    assert not circle(graph)


def test_a_circle_of_type_checking_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/first.py").write_text("if TYPE_CHECKING:\n    from tools.second import Thing\n")
    (tmp_path / "tools/second.py").write_text("def f():\n    import tools.first\n")
    assert circle(module_graph()) == ["tools.first", "tools.second"]


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("layout/x.py", "from megatron_bagel.model.batch import MicroBatch", "(layout) imports model"),
        ("model/x.py", "def f():\n    import megatron_bagel.data.loader", "(model) imports data"),
        ("config/x.py", "from megatron_bagel import platform", "(config) imports platform"),
        ("data/x.py", "from . import loader", "relative import"),
        ("cli/x.py", "from data_tools.build_index import main", "not part of the package"),
        ("odd/x.py", "from megatron_bagel.config import parser", "on no floor"),
        ("training/x.py", "from megatron_bagel.model.batch import MicroBatch", None),
        ("data/sources/x.py", "from megatron_bagel.data.planner.packing import Packer", "(sources) imports planner"),
        ("data/x.py", "from megatron_bagel.data import transforms", "on no floor of data"),
        ("data/index/x.py", "from megatron_bagel.data import transforms", None),
        ("data/loading/x.py", "from megatron_bagel.data.inspect.figures import draw", "(loading) imports inspect"),
        ("training/step.py", "from megatron_bagel.training.loop import train", "(step) imports loop"),
        ("training/resilience/x.py", "from megatron_bagel.training import step", "(resilience) imports step"),
        ("checkpoint/hf/x.py", "import megatron_bagel.checkpoint.dist.state", "(hf) imports dist"),
        ("inference/web/x.py", "from megatron_bagel.inference.core.engine import Engine", None),
    ],
)
def test_offences_are_seen(tmp_path, monkeypatch, module, line, expected):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line)
    described = offences(path)
    assert (expected is None and not described) or expected in described[0]
