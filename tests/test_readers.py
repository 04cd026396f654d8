# SPDX-License-Identifier: Apache-2.0
"""JSON, YAML, safetensors and Arrow files are opened by one module each, which names the file in every error."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "megatron_bagel"
#: Dotted call or import -> modules that may use it.
READERS = {
    "json.load": {"common/json_text.py"},
    "json.loads": {"common/json_text.py", "common/json_files.py"},  # the latter: what it has just written itself
    "json.JSONDecoder": {"common/json_text.py"},
    "yaml.load": {"common/yaml_files.py"},
    "yaml.load_all": {"common/yaml_files.py"},
    "yaml.safe_load": {"common/yaml_files.py"},
    "yaml.safe_load_all": {"common/yaml_files.py"},
    "yaml.full_load": {"common/yaml_files.py"},
    "yaml.unsafe_load": {"common/yaml_files.py"},
    "safetensors.safe_open": {"checkpoint/hf/safetensors_io.py"},
    "safetensors.deserialize": {"checkpoint/hf/safetensors_io.py"},
    "safetensors.torch.load": {"checkpoint/hf/safetensors_io.py"},
    "safetensors.torch.load_file": {"checkpoint/hf/safetensors_io.py"},
    "safetensors.torch.load_model": {"checkpoint/hf/safetensors_io.py"},
    "safetensors.numpy.load_file": {"checkpoint/hf/safetensors_io.py"},
    "pyarrow.ipc.open_file": {"data/index/arrow_files.py"},
    "pyarrow.ipc.open_stream": {"data/index/arrow_files.py"},
    "pyarrow.ipc.RecordBatchFileReader": {"data/index/arrow_files.py"},
    "pyarrow.feather.read_table": {"data/index/arrow_files.py"},
}


def full_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of everything a module takes from another one, whatever it calls it."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts: list[str] = [node.attr]
            value = node.value
            while isinstance(value, ast.Attribute):
                parts.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id in names:
                yield ".".join([names[value.id], *reversed(parts)]), node.lineno


def offences(path: str, source: str) -> list[str]:
    """Describe what a module opens although another module is the reader of such files."""
    return [f"{path}:{line} {name}" for name, line in full_names(ast.parse(source)) if name in READERS and path not in READERS[name]]


@pytest.mark.parametrize("path", sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")))
def test_nothing_else_opens_such_a_file(path: str) -> None:
    assert offences(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads(text)",
        "import json as j\nj.load(file)",
        "from json import loads",
        "import yaml\nyaml.safe_load(text)",
        "from safetensors import safe_open as open_weights",
        "import safetensors.torch\nsafetensors.torch.load_file(path)",
        "from safetensors.torch import load_file",
        "import pyarrow as pa\npa.ipc.open_file(mapped)",
        "from pyarrow import ipc\nipc.open_file(mapped)",
        "def read(path):\n    import json\n    return list(map(json.loads, path))",
    ],
)
def test_another_reader_is_found(source: str) -> None:
    assert len(offences("training/loop.py", source)) == 1


def test_each_reader_exists_and_reads() -> None:
    used = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name, _ in full_names(ast.parse(path.read_text(encoding="utf-8")))
    }
    for reader, name in (
        ("common/json_text.py", "json.loads"),
        ("common/yaml_files.py", "yaml.safe_load"),
        ("checkpoint/hf/safetensors_io.py", "safetensors.safe_open"),
        ("data/index/arrow_files.py", "pyarrow.ipc.open_file"),
    ):
        assert (reader, name) in used
