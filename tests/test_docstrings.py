# SPDX-License-Identifier: Apache-2.0
"""Public names say what they are: every public function, class and method has a docstring that begins with a sentence.

A method that overrides a documented one of the package inherits its docstring.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_bagel"
#: Where the first sentence also ends on the first line. Folders join when the docstrings of the last of their files do so.
ONE_LINE_ROOMS = ("checkpoint", "cli", "common", "config", "costs", "data", "encoders", "inference", "layout", "model", "parallel",
                  "platform", "sample_world")  # fmt: skip
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public_definitions(body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[tuple[Definition, ast.ClassDef | None]]:
    """Yield (definition, class that it is a method of) of what a module offers; overloads count with their implementation."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list):
            continue
        yield node, owner
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, node)


def classes_of(trees: list[ast.Module]) -> dict[str, ast.ClassDef]:
    """Map the names of all classes to their definitions."""
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def inherits_docstring(method: Definition, owner: ast.ClassDef | None, classes: Mapping[str, ast.ClassDef]) -> bool:
    """Return whether a base class in the package documents the method."""
    names = [] if owner is None else [base.id for base in owner.bases if isinstance(base, ast.Name)]
    bases = [classes[name] for name in names if name in classes and classes[name] is not owner]
    documented = (node for base in bases for node in base.body if getattr(node, "name", "") == method.name and ast.get_docstring(node))
    return any(documented) or any(inherits_docstring(method, base, classes) for base in bases)


def complaints(tree: ast.Module, classes: Mapping[str, ast.ClassDef], one_line: bool) -> list[str]:
    """Describe the public definitions without a docstring, and those whose first paragraph (``one_line``: line) ends without a period."""
    described = []
    for node, owner in public_definitions(tree.body):
        docstring = ast.get_docstring(node)
        name = node.name if owner is None else f"{owner.name}.{node.name}"
        if docstring is None and not inherits_docstring(node, owner, classes):
            described.append(f"{name} (line {node.lineno}) has no docstring")
        elif docstring is not None and not docstring.split("\n" if one_line else "\n\n")[0].endswith((".", "?")):
            described.append(f"{name} (line {node.lineno}) does not begin with a sentence{' on one line' if one_line else ''}")
    return described


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
CLASSES = classes_of(list(TREES.values()))


@pytest.mark.parametrize("path", TREES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_have_docstrings(path: Path) -> None:
    one_line = any(path.is_relative_to(PACKAGE / room) for room in ONE_LINE_ROOMS)
    assert not complaints(TREES[path], CLASSES, one_line)


BASE = "class Base:\n    '''A base.'''\n    def f(self):\n        '''Do f.'''\n"


@pytest.mark.parametrize(
    ("source", "one_line", "expected"),
    [
        ("def f():\n    pass", False, ["f (line 1) has no docstring"]),
        ("def f():\n    '''Rows of the table'''", False, ["f (line 1) does not begin with a sentence"]),
        ("def f():\n    '''Return the rows\n    of the table.'''", False, []),
        ("def f():\n    '''Return the rows\n    of the table.'''", True, ["f (line 1) does not begin with a sentence on one line"]),
        ("class C:\n    '''A table.'''\n    @property\n    def rows(self): ...", True, ["C.rows (line 4) has no docstring"]),
        ("class _C:\n    def rows(self): ...", True, []),
        ("@overload\ndef f(x: int): ...\ndef f(x):\n    '''Return x.\n\n    As it is'''\n    def inner(): ...", True, []),
        (f"{BASE}class C(Base):\n    '''A table.'''\n    def f(self): ...\n    def g(self): ...", True, ["C.g (line 8) has no docstring"]),
    ],
)
def test_complaints_are_seen(source: str, one_line: bool, expected: list[str]) -> None:
    tree = ast.parse(source)
    assert complaints(tree, classes_of([tree]), one_line) == expected
