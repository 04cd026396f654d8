# SPDX-License-Identifier: Apache-2.0
"""CPU replacements for the CUDA calls that Megatron-Core makes unguarded in about thirty lines, none of which are edited.

There are three kinds: functions of ``torch.cuda`` (streams, events, random state), the literal ``device="cuda"``, and the names of
CUDA tensor types. ``platform.install`` installs them only on machines without a GPU.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_bagel.platform import cpu_tuning
from megatron_bagel.platform.cuda_on_cpu import expert_dispatch, single_rank_collectives

_CPU = torch.device("cpu")
_installed = False
_thread = threading.local()


class _Event:
    """A CUDA event on a device that finishes work as soon as it is issued, so only the time of recording matters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, *args: Any) -> None:
        self._seconds = time.perf_counter()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        """Return the time between two events in milliseconds, like CUDA's events."""
        return (other._seconds - self._seconds) * 1e3


class _Stream:
    """A CUDA stream on which all work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class CudaMeansCpu(TorchFunctionMode):
    """Reads "cuda" as "cpu" in every torch call of the thread that entered it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return self._type_name(func(*args))
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)

    @staticmethod
    def _type_name(name: str) -> str:
        """Return CUDA's type name to Megatron-Core's optimizers, which compare ``Tensor.type()`` with 'torch.cuda.*Tensor'."""
        caller = sys._getframe(2).f_code.co_filename.replace("\\", "/")
        return name.replace("torch.", "torch.cuda.", 1) if "megatron/core/optimizer" in caller else name


def enter_thread() -> None:
    """Let the calling thread read "cuda" as "cpu". The mode is per thread: threads that use Megatron-Core's tensors call this.

    The call has no effect without the replacements, or in a thread that has already entered. A forked process counts as the
    thread that forked it.
    """
    if _installed and not getattr(_thread, "entered", False):
        CudaMeansCpu().__enter__()
        _thread.entered = True


def install() -> None:
    """Install the replacements for the process and enter the calling thread."""
    global _installed
    if not _installed:
        _install_streams()
        _install_random_state()
        cpu_tuning.use_huge_pages()
        cpu_tuning.keep_freed_memory()
        single_rank_collectives.install()
        expert_dispatch.install()
        _installed = True
    enter_thread()


def _install_streams() -> None:
    # Typed as Any, because the replacements take any arguments.
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args, **kwargs: None
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None


def _install_random_state() -> None:
    """Use the CPU's generator. Megatron-Core reads its state through torch.cuda and writes it with a private function."""
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    # torch.manual_seed would call torch.cuda again.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    megatron_random._set_cuda_rng_state = set_state
