# SPDX-License-Identifier: Apache-2.0
"""mypy says the same with and without the optional packages: each of them is named where a missing module is no error."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML; the settings are the same ones on later versions")

ROOT = Path(__file__).resolve().parent.parent
#: Packages whose module has another name.
MODULE_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "megatron-core": "megatron"}


def always_installed() -> set[str]:
    """Modules of the packages that ``examples/setup_env.sh`` installs: those of the project and of its tests."""
    requirements: list[str] = []
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "INSTALL_REQUIRES":
                requirements += ast.literal_eval(node.value)
            elif node.targets[0].id == "EXTRAS_REQUIRE":
                assert isinstance(node.value, ast.Dict)
                by_name = {ast.literal_eval(key): value for key, value in zip(node.value.keys, node.value.values, strict=True) if key}
                test = by_name["test"]
                assert isinstance(test, ast.List)
                requirements += [element.value for element in test.elts if isinstance(element, ast.Constant)]
    names = [re.split(r"[\[<>=;, ]", requirement)[0].lower() for requirement in requirements]
    return {MODULE_NAMES.get(name, name.replace("-", "_")) for name in names}


def third_party_imports(folder: Path) -> dict[str, str]:
    """Top-level modules that ``folder`` imports and neither Python nor this project has -> the first place of each."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in modules:
                name = module.split(".")[0]
                if name not in sys.stdlib_module_names and not (ROOT / name).is_dir():
                    found.setdefault(name, f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_a_missing_optional_package_is_no_type_error() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    allowed = {
        module.removesuffix(".*") for part in settings["overrides"] if part.get("ignore_missing_imports") for module in part["module"]
    }
    imported: dict[str, str] = {}
    for folder in settings["files"]:
        imported |= third_party_imports(ROOT / folder)
    assert "ray" in imported and "torch" in imported
    missing = {name: place for name, place in imported.items() if name not in always_installed() | allowed}
    assert not missing, f"add these to ignore_missing_imports in pyproject.toml, or to setup.py: {missing}"
