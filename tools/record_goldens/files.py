# SPDX-License-Identifier: Apache-2.0
"""Writes a set's files, and compares two sets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Texts above this many characters are written on one line.
_LONG = 8000
#: Norms after updates of weights whose gradient is zero in exact arithmetic: softmax does not see a bias of all keys. AdamW's eps of 1e-15
#: makes full steps of their rounding noise (docs/differences.md).
_IS_NOISE = re.compile(r"_norms/vit_model\..*\.k_proj\.bias$")


class GoldenFolder:
    """A folder of goldens."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Return a file's path, whose folder exists."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def json(self, name: str, content: Any) -> None:
        """Write JSON, indented where it is short enough to be read."""
        text = json.dumps(content, indent=1)
        self.path(name).write_text(text if len(text) < _LONG else json.dumps(content, separators=(",", ":")), encoding="utf-8")

    def tensors(self, name: str, content: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write tensors."""
        path = self.path(name)
        save_file({key: value.detach().contiguous().clone() for key, value in content.items()}, path, metadata)
        path.chmod(0o644)

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        return json.loads((self.root / name).read_text(encoding="utf-8"))

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a file."""
        return load_file(self.root / name)


def summary(tensor: Tensor) -> dict[str, Any]:
    """Return what a set keeps of a tensor that is too large for it: shape, sum, and sum of absolute values."""
    return {"shape": list(tensor.shape), "sum": float(tensor.double().sum()), "abs_sum": float(tensor.double().abs().sum())}


def jsonable(value: Any) -> Any:
    """Return a value as JSON holds it: tensors by their summary, tuples as lists."""
    if isinstance(value, dict):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, Tensor):
        return summary(value)
    return value.item() if isinstance(value, np.generic) else value


@dataclass
class Difference:
    """How far two files are apart: ``largest``, and ``place``, where that is.

    A number is compared relative to itself, a tensor relative to its largest value, both not below 1. A picture of 8 bits is compared by
    the mean of its levels: a value near the middle of two levels falls on either side.
    """

    file: str
    largest: float = 0.0
    place: str = ""

    def note(self, difference: float, place: str) -> None:
        """Keep the largest difference; NaN counts as infinite."""
        difference = math.inf if math.isnan(difference) else difference
        if difference > self.largest:
            self.largest, self.place = difference, place


def compare_sets(one: Path, other: Path) -> Iterator[Difference]:
    """Yield the difference of every file of numbers that either set has. What only one has is infinitely different."""
    files = {
        path.relative_to(root).as_posix() for root in (one, other) for path in root.rglob("*") if path.suffix in (".json", ".safetensors")
    }
    for name in sorted(files):
        difference = Difference(name)
        if not ((one / name).is_file() and (other / name).is_file()):
            difference.note(math.inf, "only one set has this file")
        elif name.endswith(".json"):
            _compare_values(GoldenFolder(one).read_json(name), GoldenFolder(other).read_json(name), "", difference)
        else:
            _compare_tensors(GoldenFolder(one).read_tensors(name), GoldenFolder(other).read_tensors(name), difference)
        yield difference


def _compare_values(one: Any, other: Any, place: str, difference: Difference) -> None:
    numbers = (int, float)
    if _IS_NOISE.search(place):
        return
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() ^ other.keys()):
            difference.note(math.inf, f"{place}/{key}: only one set has it")
        for key in one.keys() & other.keys():
            _compare_values(one[key], other[key], f"{place}/{key}", difference)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            _compare_values(left, right, f"{place}/{index}", difference)
    elif isinstance(one, numbers) and isinstance(other, numbers) and one != other:
        difference.note(abs(one - other) / max(1.0, abs(one), abs(other)), place)
    elif one != other:
        difference.note(math.inf, f"{place}: {str(one)[:60]!r} and {str(other)[:60]!r}")


def _compare_tensors(one: dict[str, Tensor], other: dict[str, Tensor], difference: Difference) -> None:
    for name in sorted(one.keys() ^ other.keys()):
        difference.note(math.inf, f"{name}: only one set has it")
    for name in one.keys() & other.keys():
        left, right = one[name], other[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            difference.note(math.inf, f"{name}: {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}")
        elif not torch.equal(left, right):
            # Equal infinities, as timesteps of clean images have them, are not apart.
            apart = torch.where(left == right, 0.0, (left.double() - right.double()).abs())
            if left.dtype == torch.uint8:
                difference.note(float(apart.mean() / 255), name)
            else:
                finite = right[right.isfinite()].double().abs()
                difference.note(float(apart.max() / finite.max().clamp(min=1.0)), name)
