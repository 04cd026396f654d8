# SPDX-License-Identifier: Apache-2.0
"""Finds where a program makes the host wait for a GPU, on a machine without one: the operations whose result the host must read."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
#: Operations that read a value of the device, or whose result has a size that only the device knows.
_READS = {
    _ATEN._local_scalar_dense, _ATEN.equal, _ATEN.is_nonzero, _ATEN.nonzero, _ATEN.masked_select, _ATEN.bincount,
    _ATEN._unique2, _ATEN.unique_dim, _ATEN.unique_consecutive, _ATEN.repeat_interleave,
}  # fmt: skip
#: Picking by a mask reads how many elements there are. Writing one value through a mask does not: torch fills it in place.
_PICKS = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}


class HostWaits(AbstractContextManager["HostWaits"]):
    """Counts waits by place: "file: function" of the innermost code of this package or of Megatron-Core.

    ``numpy()`` is not counted, because it refuses tensors of a GPU. Copies to the device are not seen: on a CPU there are none.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> HostWaits:
        self._stack.enter_context(_Reads(self._count))
        for owner, name in ((torch.Tensor, "tolist"), (torch.Tensor, "cpu"), (torch.cuda, "synchronize")):
            self._stack.enter_context(_counted(owner, name, self._count))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _count(self) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if {"megatron", "megatron_bagel"} & set(path.parts) and "tests" not in path.parts and "cuda_on_cpu" not in path.parts:
                self.places[f"{path.stem}: {frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back
        self.places["elsewhere"] += 1


class _Reads(TorchDispatchMode):
    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        operation = func.overloadpacket
        if operation in _READS or (operation in _PICKS and self._by_mask(operation, args)):
            self._count()
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _by_mask(operation: Any, args: tuple) -> bool:
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masks and (operation is _ATEN.index or args[2].numel() != 1)


@contextmanager
def _counted(owner: Any, name: str, count: Callable[[], None]) -> Any:
    original, inside = getattr(owner, name), False

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # a torch function mode calls the method by its name once more
            return original(*args, **kwargs)
        count()
        inside = True
        try:
            return original(*args, **kwargs)
        finally:
            inside = False

    setattr(owner, name, counting)
    try:
        yield
    finally:
        setattr(owner, name, original)
