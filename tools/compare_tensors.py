# SPDX-License-Identifier: Apache-2.0
"""Compares tensors of two checkpoints or weight files, one pair in memory at a time, element by element."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from tools.compare_values import Rule, Tally

#: Elements compared at once, so that the temporaries of a large tensor stay small.
CHUNK = 1 << 22
#: Key biases of the vision tower. Softmax does not see them, so their true gradient is zero, and what Adam moves them by is rounding.
_NO_GRADIENT = re.compile(r"(^|\.)vision_model\..*\bk_proj\.bias$")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorSource(Protocol):
    """Holds named tensors: a ``CheckpointWeights``, or a ``WeightFile`` around a ``SafetensorsReader``."""

    def keys(self) -> list[str]: ...

    def spec(self, key: str) -> TensorSpec: ...

    def read(self, key: str) -> Tensor: ...


def is_rounding_alone(name: str) -> bool:
    """Return whether training determines nothing of a tensor: its gradient is zero in exact arithmetic and rounding noise in floats.

    Adam divides a gradient by its own size, so with a tiny epsilon the noise becomes full steps, which differ between parallel layouts.
    ``name`` is that of a weight, its average or a moment of the optimizer, in a checkpoint or a model folder.
    """
    return _NO_GRADIENT.search(name) is not None


def compare_tensors(left: TensorSource, right: TensorSource, tally: Tally, rule: Rule) -> None:
    """Count every tensor by name, in the order of their layers. Tensors of rounding alone count only where bits are compared."""
    left_keys, right_keys = (dict.fromkeys(sorted(source.keys(), key=_natural)) for source in (left, right))
    tally.note_one_sided(left_keys, right_keys)
    for key in left_keys:
        if key not in right_keys or (is_rounding_alone(key) and not rule.bitwise):
            continue
        left_spec, right_spec = left.spec(key), right.spec(key)
        if left_spec != right_spec:
            tally.add(key, f"{_shape_and_type(left_spec)} and {_shape_and_type(right_spec)}", math.inf, accepted=False)
        else:
            _compare_pair(key, left.read(key), right.read(key), tally, rule)


def _compare_pair(key: str, left: Tensor, right: Tensor, tally: Tally, rule: Rule) -> None:
    shape = left.shape
    left, right = left.contiguous().view(-1), right.contiguous().view(-1)
    scale = max(_largest(left), _largest(right))
    exact = rule.bitwise or not left.is_floating_point()
    count, first, gap = 0, -1, 0.0
    for start, left_part, right_part in _chunks(left, right):
        bits = _bits(left_part) != _bits(right_part)
        if not bits.any():
            continue
        distances = _distances(left_part, right_part)
        gap = max(gap, float(distances.max()))
        refused = bits if exact else distances > rule.tolerance * scale
        if count == 0 and refused.any():
            first = start + int(refused.to(torch.uint8).argmax())
        count += int(refused.sum())
    relative = gap / scale if gap and scale else gap
    description = ""
    if count:
        values = f"{left[first].item()!r} and {right[first].item()!r}"
        index = [int(number) for number in np.unravel_index(first, tuple(shape))]
        distance = f"by {gap:.3g} at most ({relative:.3g} relative)"
        description = f"element {index} is {values}; {count} of {left.numel()} elements differ, {distance}"
    tally.add(key, description, relative, accepted=not count)


def _chunks(left: Tensor, right: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for start in range(0, left.numel(), CHUNK):
        yield start, left[start : start + CHUNK], right[start : start + CHUNK]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Return |left - right| in fp64: 0 where both are NaN or the same infinity, infinity where only one of them is finite."""
    left, right = left.double(), right.double()
    distances = (left - right).abs()
    same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(same, 0.0, torch.nan_to_num(distances, nan=math.inf, posinf=math.inf))


def _largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude. Differences of a tensor are relative to it."""
    parts = (tensor[start : start + CHUNK].double().abs() for start in range(0, tensor.numel(), CHUNK))
    return max((float(torch.where(part.isfinite(), part, 0.0).max()) for part in parts), default=0.0)


def _shape_and_type(spec: TensorSpec) -> str:
    shape, dtype = spec
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key) if part]
