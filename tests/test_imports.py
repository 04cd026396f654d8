"""Imports point down the list of the design only: found by reading every module, so a circle cannot hide behind import order."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_bagel"
#: Lower layers first. Parts of one layer do not import each other.
LAYERS = (
    ("config", "platform"), ("layout", "parallel"), ("model", "data", "checkpoint"), ("encoders",), ("inference",), ("training",),
    ("planning",), ("train", "generate", "evaluate", "plan"),
)  # fmt: skip
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def imported_parts(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(first name below megatron_bagel, line) of every import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.module is None or node.level:
                yield "relative import", node.lineno
            elif node.module == "megatron_bagel":
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif node.module.startswith("megatron_bagel."):
                yield node.module.split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("megatron_bagel."):
                    yield alias.name.split(".")[1], node.lineno


def offences(path: Path) -> list[str]:
    """Imports of a module that point up or sideways."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        part = "config"  # the package itself stands below everything
    found = []
    for target, line in imported_parts(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.relative_to(PACKAGE)}:{line}"
        if target not in LEVEL or part not in LEVEL:
            found.append(f"{where} imports {target}, which is in no layer")
        elif target != part and LEVEL[target] >= LEVEL[part]:
            found.append(f"{where} ({part}) imports {target}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert not offences(path)


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("layout/x.py", "from megatron_bagel.model.batch import MicroBatch", "(layout) imports model"),
        ("model/x.py", "def f():\n    import megatron_bagel.data.loader", "(model) imports data"),
        ("config/x.py", "from megatron_bagel import platform", "(config) imports platform"),
        ("data/x.py", "from . import loader", "relative import"),
        ("odd/x.py", "from megatron_bagel.config import parser", "in no layer"),
        ("training/x.py", "from megatron_bagel.model.batch import MicroBatch", None),
    ],
)
def test_offences_are_seen(tmp_path, monkeypatch, module, line, expected):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / module
    path.parent.mkdir()
    path.write_text(line)
    found = offences(path)
    assert (expected is None and not found) or expected in found[0]
