"""Groups of tensor-parallel ranks that share one key/value head: they exist where there are more ranks than such heads.

The fused QKV weight is cut evenly over all ranks, so no rank holds a copy of a weight and a checkpoint looks the same on any
layout; what is shared is the activations, put together inside such a group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region

from megatron_bagel.parallel.rank_coordinates import check_rank_order

_group: dist.ProcessGroup | None = None


def initialize_kv_sharing(query_groups: int) -> None:
    """Make the groups for a model of ``query_groups`` key/value heads. Collective over the world; call before the model is built.

    Does nothing where tensor-parallel ranks do not outnumber the heads. Raises ValueError when the heads do not divide the ranks.
    """
    global _group
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    _group = None
    if ranks <= query_groups:
        return
    if ranks % query_groups:
        raise ValueError(f"--tensor_model_parallel_size {ranks} is neither a divisor nor a multiple of the {query_groups} key/value heads")
    share = ranks // query_groups
    # Megatron numbers tensor-parallel ranks one after the other (parallel/rank_coordinates.py).
    check_rank_order()
    for first in range(0, dist.get_world_size(), share):
        group = dist.new_group(list(range(first, first + share)))
        if first <= dist.get_rank() < first + share:
            _group = group


def kv_sharing_group() -> dist.ProcessGroup:
    """The group of this rank. Raises RuntimeError before ``initialize_kv_sharing``."""
    if _group is None:
        raise RuntimeError("tensor-parallel ranks outnumber the key/value heads: call initialize_kv_sharing before building the model")
    return _group


def gather_columns(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s, n] of every rank of the group side by side, [s, ranks * n]; in the backward pass gradients are summed and cut again."""
    return all_gather_last_dim_from_tensor_parallel_region(part, group=group)
