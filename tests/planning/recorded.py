# SPDX-License-Identifier: Apache-2.0
"""The collectives that this process issues, as torch's dispatcher sees them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "allgather_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter", "alltoall_base_": "all_to_all", "send": "send", "allreduce_coalesced_": "all_reduce",
    "allgather_into_tensor_coalesced_": "all_gather", "reduce_scatter_tensor_coalesced_": "reduce_scatter", "broadcast_": "broadcast",
}  # fmt: skip


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


class Recorder(TorchDispatchMode):
    """Counts calls of (kind, ranks, bytes): the whole tensor of a gather, reduce or scatter, else what this rank sends.

    A send is between two ranks, whatever its group: with two stages, Megatron-Core sends one of the two ways over the group of the whole
    world when both overlap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS.get(func._schema.name.split("::")[1])
            if kind is not None:
                self._add(kind, args)
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, args: tuple) -> None:
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = 2 if kind == "send" else dist.ProcessGroup.unbox(boxed).size()
        sides = [sum(tensor.nbytes for tensor in _tensors(arg)) for arg in args[:2]]
        size = {"all_to_all": sides[-1], "broadcast": sides[0], "all_reduce": sides[0], "send": sides[0]}.get(kind, max(sides))
        if ranks > 1:
            self.calls[kind, ranks, size] += 1
