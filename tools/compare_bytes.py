# SPDX-License-Identifier: Apache-2.0
"""Compares files that hold no tensors: by their bytes, or, where they hold paths, by all other values in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.compare_values import Rule, Tally, leaves

#: Keys of an index's files whose values are paths, or are computed from paths.
PATH_KEYS = frozenset({"path", "file", "tokenizer_path", "build_key"})
#: Files that hold paths, and what is left out of them. The build key of the index is called "index" in files of stored latents.
_LEFT_OUT = {
    "manifest.json": PATH_KEYS,
    "skipped.jsonl": PATH_KEYS,
    "latents.json": PATH_KEYS | {"index"},
    "key.json": PATH_KEYS | {"index"},
}
_READ_BYTES = 1 << 20


def files_of(folder: Path) -> dict[str, Path]:
    """Return every file of a folder by its path inside."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def compare_files(left: Mapping[str, Path], right: Mapping[str, Path], tally: Tally) -> None:
    """Count files by name. Under any rule, nothing but paths may differ."""
    tally.note_one_sided(left, right)
    for name in left:
        if name in right:
            differ = _value_difference if left[name].name in _LEFT_OUT else _byte_difference
            difference = differ(left[name], right[name])
            tally.add(name, difference, math.inf if difference else 0.0, accepted=not difference)


def _value_difference(left: Path, right: Path) -> str:
    inner = Tally("", "values")
    inner.compare(_values(left), _values(right), Rule(bitwise=True))
    return "" if inner.equal else inner.first or "; ".join(f"only in {side}: {names[0]}" for side, names in inner.only.items() if names)


def _values(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        content = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from error
    return {name: value for name, value in leaves(content) if name.rsplit(".", 1)[-1] not in _LEFT_OUT[path.name]}


def _byte_difference(left: Path, right: Path) -> str:
    sizes = left.stat().st_size, right.stat().st_size
    if sizes[0] != sizes[1]:
        return f"{sizes[0]} and {sizes[1]} bytes"
    with left.open("rb") as left_file, right.open("rb") as right_file:
        for start in range(0, sizes[0], _READ_BYTES):
            left_bytes, right_bytes = left_file.read(_READ_BYTES), right_file.read(_READ_BYTES)
            if left_bytes != right_bytes:
                offset = next(number for number, pair in enumerate(zip(left_bytes, right_bytes, strict=True)) if pair[0] != pair[1])
                return f"bytes differ from offset {start + offset} on"
    return ""
