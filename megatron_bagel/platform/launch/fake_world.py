# SPDX-License-Identifier: Apache-2.0
"""A process group of any size in one process: collectives return at once and move nothing. It serves dry runs of a rank's set-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_META = torch.device("meta")


def is_fake() -> bool:
    """Return whether the other ranks of this process group do not exist."""
    return dist.is_initialized() and dist.get_backend() == "fake"


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Make this process ``rank`` of ``world_size`` ranks within the block. Raises RuntimeError inside a real process group.

    A gather of objects returns this rank's object once per rank: the ranks of a run agree about its settings.
    """
    if dist.is_initialized():
        raise RuntimeError("this process already is in a process group; fake_world cannot replace it")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_bagel.platform.launch.process_group import shutdown_distributed

    collectives: Any = dist
    real_all_gather_object = dist.all_gather_object

    def all_gather_object(objects: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
        objects[:] = [value] * len(objects)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    collectives.all_gather_object = all_gather_object
    try:
        yield
    finally:
        collectives.all_gather_object = real_all_gather_object
        shutdown_distributed()


class MetaCountsAsCuda(TorchFunctionMode):
    """Makes tensors without memory look like a GPU's to Megatron-Core's optimizers within the block.

    The optimizers sort parameters by the names of CUDA's tensor types. With ``everywhere``, tensors requested on a device have no
    memory either, and none are copied to a device.
    """

    def __init__(self, everywhere: bool = False) -> None:
        super().__init__()
        self.everywhere = everywhere

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.meta.", "torch.cuda.")
        if self.everywhere and func in (torch.Tensor.cpu, torch.Tensor.cuda) and args[0].is_meta:
            return args[0]
        if self.everywhere and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _META}
        return func(*args, **kwargs)
