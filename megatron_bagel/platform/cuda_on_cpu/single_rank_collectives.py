# SPDX-License-Identifier: Apache-2.0
"""Megatron's DDP without copies in process groups of one rank, where gloo copies the full gradient buffer and NCCL does nothing.

With one rank the shard that a reduce-scatter writes and an all-gather reads is the buffer itself, so both are the identity.
On a model of 53 million parameters the two copies took half of the optimizer's time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist


def _has_one_rank(group: dist.ProcessGroup | None) -> bool:
    return dist.get_world_size(group) == 1


def _skip_on_one_rank(collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(output: torch.Tensor, source: torch.Tensor, *args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> Any:
        if _has_one_rank(group) and output.data_ptr() == source.data_ptr() and output.numel() == source.numel():
            return None
        return collective(output, source, *args, group=group, **kwargs)

    return run


def _skip_coalescing_on_one_rank(manager: Callable[..., AbstractContextManager[Any]]) -> Callable[..., AbstractContextManager[Any]]:
    def run(group: dist.ProcessGroup | None = None, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        if _has_one_rank(group):
            # A handle without work to wait for, because the calls inside run at once.
            return nullcontext(dist.distributed_c10d._CoalescingManager())
        return manager(group, *args, **kwargs)

    return run


def install() -> None:
    """Install the shortcuts in Megatron's gradient buffers. Call it once, before a model is wrapped."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    buffers.dist_reduce_scatter_func = _skip_on_one_rank(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _skip_on_one_rank(buffers.dist_all_gather_func)
    buffers._coalescing_manager = _skip_coalescing_on_one_rank(buffers._coalescing_manager)
