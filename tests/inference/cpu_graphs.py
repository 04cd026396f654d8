# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs played on a CPU: a capture notes the operations, and a replay issues them again on the memory that they had.

As on a GPU, Python does not run in a replay and the results of a capture lie where they lay. So a pass that needs something new from the
host, or memory that has moved, gives other numbers here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def tensors_of(*values: Any) -> list[Tensor]:
    """The tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Noted(TorchDispatchMode):
    """Notes every operation with its arguments and its results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in tensors_of(args, kwargs):
                self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        # Aliases, because Megatron-Core gives some tensors other memory later (``make_viewless_tensor``).
        aliased_args, aliased_kwargs = tree_map_only(Tensor, Tensor.detach, (args, dict(kwargs)))
        result = func(*args, **kwargs)
        self.operations.append((func, aliased_args, aliased_kwargs, tree_map_only(Tensor, Tensor.detach, result)))
        return result


class CpuGraph:
    """Stands in for ``torch.cuda.CUDAGraph``."""

    replays = 0

    def __init__(self) -> None:
        self.noted = Noted()

    def replay(self) -> None:
        CpuGraph.replays += 1
        for func, args, kwargs, results in self.noted.operations:
            for now, then in zip(tensors_of(func(*args, **kwargs)), tensors_of(results), strict=True):
                if now.data_ptr() != then.data_ptr():
                    then.copy_(now)


@contextmanager
def capture(graph: CpuGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """Stands in for ``torch.cuda.graph``. A capture executes nothing, so what it overwrote is put back."""
    with graph.noted:
        yield
    for tensor, value in reversed(list(graph.noted.before.values())):
        tensor.copy_(value)


@pytest.fixture
def cpu_graphs(monkeypatch: pytest.MonkeyPatch) -> type[CpuGraph]:
    """Graphs of ``torch.cuda`` on this CPU, and models that may be captured."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CpuGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for loop in ("denoising_loop", "token_loop"):
        monkeypatch.setattr(f"megatron_bagel.inference.core.{loop}.launched_because", lambda engine: None)
    monkeypatch.setattr(CpuGraph, "replays", 0)
    return CpuGraph
