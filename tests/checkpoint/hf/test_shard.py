# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel shards join to the tensor they were cut from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.checkpoint.hf.shard import take_shard


@given(dim=st.sampled_from([-1, 0, 1]), size=st.sampled_from([1, 2, 4]), blocks=st.sampled_from([1, 2]), unit=st.integers(1, 3))
def test_shards_join_to_the_tensor(dim: int, size: int, blocks: int, unit: int) -> None:
    length = size * blocks * unit
    full = torch.arange(length * length).reshape(length, length)
    shards = [take_shard(full, dim, rank, size, blocks) for rank in range(size)]
    if dim < 0:
        assert all(torch.equal(shard, full) for shard in shards)
        return
    cut = [shard.chunk(blocks, dim) for shard in shards]
    assert torch.equal(torch.cat([pieces[b] for b in range(blocks) for pieces in cut], dim), full)


def test_gate_and_up_are_cut_inside_each_block() -> None:
    full = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    assert take_shard(full, 0, 1, 2, blocks=2).tolist() == [2, 3, 12, 13]


def test_uneven_cut_is_refused_with_the_flag() -> None:
    with pytest.raises(ValueError, match="--tensor-model-parallel-size"):
        take_shard(torch.zeros(6, 2), 0, 0, 4)
