# SPDX-License-Identifier: Apache-2.0
"""A flag is read once: the configuration ends at the commands. Below them, components take settings of their own.

Every module is parsed, so a name that is only imported for its type counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_bagel"
#: Rooms that know the configuration: the one that defines it, and the one that reads it.
KNOWING = ("config", "cli")
PARSER = "megatron_bagel.config.parser"


def modules_below() -> list[Path]:
    """List the modules that must not know the configuration."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in KNOWING]


def annotations(tree: ast.AST) -> Iterator[tuple[ast.expr, int]]:
    """Yield (annotation, line) of every parameter, result, field and variable."""
    for node in ast.walk(tree):
        written = node.returns if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else getattr(node, "annotation", None)
        if written is not None:
            yield written, node.lineno


def names_config(annotation: ast.expr) -> bool:
    """Whether an annotation, or a part of it, is ``Config``; a class of that name in another module (``uvicorn.Config``) is not."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and node.id == "Config":
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and names_config(ast.parse(node.value, mode="eval").body):
            return True
    return False


def asks_how_given(node: ast.AST) -> bool:
    """Whether an expression reads ``given`` of something called ``config``."""
    if not isinstance(node, ast.Attribute) or node.attr != "given":
        return False
    owner = node.value
    return (isinstance(owner, ast.Name) and owner.id == "config") or (isinstance(owner, ast.Attribute) and owner.attr == "config")


def imports_parser(node: ast.AST) -> bool:
    """Whether a statement imports the module of ``Config``, or something from it."""
    if isinstance(node, ast.ImportFrom):
        return node.module == PARSER or any(f"{node.module}.{alias.name}" == PARSER for alias in node.names)
    return isinstance(node, ast.Import) and any(alias.name == PARSER for alias in node.names)


def offences(source: str) -> list[str]:
    """Describe what of a module's source knows the whole configuration."""
    tree = ast.parse(source)
    found = [f"{line}: is annotated Config" for annotation, line in annotations(tree) if names_config(annotation)]
    for node in ast.walk(tree):
        if imports_parser(node):
            found.append(f"{node.lineno}: imports {PARSER}")
        elif asks_how_given(node):
            found.append(f"{node.lineno}: asks how a value was given")
    return found


@pytest.mark.parametrize("path", modules_below(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_configuration_ends_at_the_commands(path: Path) -> None:
    assert not offences(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def build(config: Config) -> None: ...", ["1: is annotated Config"]),
        ("def build(config: Config | None = None) -> None: ...", ["1: is annotated Config"]),
        ("def build(config: 'Config') -> None: ...", ["1: is annotated Config"]),
        ("def build() -> Config: ...", ["1: is annotated Config"]),
        ("class Run:\n    config: Config", ["2: is annotated Config"]),
        ("from megatron_bagel.config.parser import Config", ["1: imports megatron_bagel.config.parser"]),
        ("from megatron_bagel.config import parser", ["1: imports megatron_bagel.config.parser"]),
        ("def read():\n    import megatron_bagel.config.parser", ["2: imports megatron_bagel.config.parser"]),
        ("if 'lr' in config.given: ...", ["1: asks how a value was given"]),
        ("if 'lr' in self.config.given: ...", ["1: asks how a value was given"]),
        ("def serve(config: uvicorn.Config, parallel: ModelParallelConfig) -> None: ...", []),
        ("texts = [item for item in probe.given]", []),
    ],
)
def test_offences_are_seen(source: str, expected: list[str]) -> None:
    assert offences(source) == expected
