# SPDX-License-Identifier: Apache-2.0
"""Process groups of tensor-parallel ranks that share one key/value head, needed if there are more ranks than such heads.

The fused QKV weight is sharded evenly over all ranks. No rank holds a copy of a weight, and a checkpoint looks the same for any
parallel sizes. The ranks of a group share activations instead, which they gather.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region

from megatron_bagel.parallel.rank_coordinates import check_rank_order

_group: dist.ProcessGroup | None = None


def initialize_kv_sharing(query_groups: int) -> None:
    """Create the process groups for a model of ``query_groups`` key/value heads. Collective; call it before the model is built.

    No groups are created if there are no more tensor-parallel ranks than heads.

    Raises:
        ValueError: If there are more ranks than heads, and the heads do not divide the ranks.
    """
    global _group
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    _group = None
    if ranks <= query_groups:
        return
    if ranks % query_groups:
        raise ValueError(f"--tensor_model_parallel_size {ranks} is neither a divisor nor a multiple of the {query_groups} key/value heads")
    share = ranks // query_groups
    # Megatron numbers tensor-parallel ranks consecutively (``parallel/rank_coordinates.py``).
    check_rank_order()
    for first_rank in range(0, dist.get_world_size(), share):
        group = dist.new_group(list(range(first_rank, first_rank + share)))
        if first_rank <= dist.get_rank() < first_rank + share:
            _group = group


def kv_sharing_group() -> dist.ProcessGroup:
    """Return the process group of this rank. Raises RuntimeError before ``initialize_kv_sharing``."""
    if _group is None:
        raise RuntimeError("tensor-parallel ranks outnumber the key/value heads: call initialize_kv_sharing before building the model")
    return _group


def gather_columns(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate [s, n] of every rank of the group to [s, ranks * n]. The backward pass sums gradients and slices them again."""
    return all_gather_last_dim_from_tensor_parallel_region(part, group=group)
