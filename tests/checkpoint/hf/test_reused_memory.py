# SPDX-License-Identifier: Apache-2.0
"""Memory is lent to one tensor at a time, and a converted model stays small in memory."""

from __future__ import annotations

import io

import torch

from megatron_bagel.checkpoint.hf.reused_memory import ReusedMemory

MIB = 1 << 20


def test_memory_is_lent_again_only_when_it_came_back() -> None:
    memory = ReusedMemory()
    first, second = memory.tensor((MIB,), torch.float32), memory.tensor((MIB,), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    place = first.data_ptr()
    assert memory.give_back(first)
    third = memory.tensor((1024, 1024), torch.bfloat16)  # half as large
    assert third.data_ptr() == place and third.shape == (1024, 1024) and third.dtype == torch.bfloat16


def test_the_storage_is_as_large_as_the_tensor() -> None:
    """torch.save writes the whole storage of a tensor."""
    memory = ReusedMemory()
    memory.give_back(memory.tensor((4 * MIB,), torch.uint8))
    tensor = memory.tensor((2 * MIB,), torch.uint8).zero_()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    file = io.BytesIO()
    torch.save(tensor, file)
    assert len(file.getvalue()) < 2.1 * MIB


def test_a_small_tensor_does_not_occupy_large_memory() -> None:
    memory = ReusedMemory()
    large = memory.tensor((16 * MIB,), torch.uint8)
    memory.give_back(large)
    small = memory.tensor((2 * MIB,), torch.uint8)
    assert small.data_ptr() != large.data_ptr()
    assert memory.tensor((15 * MIB,), torch.uint8).data_ptr() == large.data_ptr()


def test_tensors_from_elsewhere_are_left_alone() -> None:
    memory = ReusedMemory()
    assert not memory.give_back(torch.zeros(2 * MIB))
    assert not memory.give_back(memory.tensor((3,), torch.float32))  # too small to be lent
    tensor = memory.tensor((2 * MIB,), torch.uint8)
    assert memory.give_back(tensor) and not memory.give_back(tensor)
