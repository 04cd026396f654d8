# SPDX-License-Identifier: Apache-2.0
"""Weights that are NaN or infinite are refused when they are read, and the message names file and tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_bagel.checkpoint.hf.finite_weights import refuse_not_finite
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_of_such_values_is_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    save_file({"good": torch.ones(3), "broken": torch.full((100, 300), value, dtype=dtype)}, tmp_path / "ema.safetensors")
    reader = SafetensorsReader(tmp_path / "ema.safetensors")
    assert torch.equal(reader.get("good"), torch.ones(3))
    with pytest.raises(ValueError, match=r"ema\.safetensors: tensor broken holds NaN or infinite values"):
        reader.get("broken")
    assert SafetensorsReader(tmp_path / "ema.safetensors", "none").get("broken").shape == (100, 300)


def test_a_single_value_is_found_by_the_full_check(tmp_path: Path) -> None:
    weight = torch.zeros(400, 300)
    weight[0, 1] = float("nan")
    refuse_not_finite(weight, "weight", tmp_path)  # the sample does not meet it
    with pytest.raises(ValueError, match=r"1 of the 120000 that were checked"):
        refuse_not_finite(weight, "weight", tmp_path, "full")


def test_large_finite_values_pass(tmp_path: Path) -> None:
    """Their sum is infinite, but they are not."""
    refuse_not_finite(torch.full((100,), torch.finfo(torch.float32).max), "weight", tmp_path, "full")


def test_whole_numbers_and_empty_tensors_pass(tmp_path: Path) -> None:
    refuse_not_finite(torch.ones(3, dtype=torch.int64), "count", tmp_path)
    refuse_not_finite(torch.zeros(0, 4), "empty", tmp_path)


def test_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "ema.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"ema\.safetensors is a Git LFS pointer"):
        SafetensorsReader(tmp_path / "ema.safetensors")


def test_an_index_without_a_map_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ema.safetensors.index.json"
    for content, reason in (("{}", "has no weight_map"), ("[" * 200_000, "nested deeper than"), ('{"weight_map": {"a": 1}}', "weight_map")):
        path.write_text(content)
        with pytest.raises(ValueError, match=reason) as caught:
            SafetensorsReader(path)
        assert str(path) in str(caught.value)
