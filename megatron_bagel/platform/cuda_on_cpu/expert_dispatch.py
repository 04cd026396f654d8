# SPDX-License-Identifier: Apache-2.0
"""What Megatron-Core's dispatchers of tokens to experts expect of NCCL and a GPU: sizes as host numbers, and groups of unequal sizes.

gloo has neither a gather of tensors of different sizes nor their reduce-scatter. Both are built from its all-to-all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return the sizes as Megatron-Core's function does for a GPU's tensor."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_unequal(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    def run(outputs: list[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False) -> Any:
        if async_op or all(output.shape == tensor.shape for output in outputs):
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        rows = [len(output) for output in outputs]
        received = tensor.new_empty((sum(rows), *tensor.shape[1:]))
        dist.all_to_all_single(received, torch.cat([tensor] * len(rows)), rows, [len(tensor)] * len(rows), group=group)
        for output, part in zip(outputs, received.split(rows), strict=True):
            output.copy_(part)
        return None

    return run


def _reduce_scatter_unequal(output: torch.Tensor, inputs: list[torch.Tensor], *, group: dist.ProcessGroup | None = None) -> None:
    """Sum the parts that all ranks have for this rank, in rank order."""
    ranks = dist.get_world_size(group)
    received = output.new_empty((ranks * len(output), *output.shape[1:]))
    dist.all_to_all_single(received, torch.cat(list(inputs)), [len(output)] * ranks, [len(part) for part in inputs], group=group)
    torch.sum(received.view(ranks, *output.shape), 0, out=output)


def install() -> None:
    """Install the replacements. Call it once."""
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = _to_cpu
    collectives: Any = dist
    collectives.all_gather = _gather_unequal(dist.all_gather)
    collectives.reduce_scatter = _reduce_scatter_unequal
