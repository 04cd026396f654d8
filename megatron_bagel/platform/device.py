# SPDX-License-Identifier: Apache-2.0
"""Which device this process computes on, which backend its collectives use, and how much memory it has used."""

from __future__ import annotations

import os
import resource
import sys

import torch
from torch.profiler import ProfilerActivity


def has_gpu() -> bool:
    """Return whether this process computes on a CUDA GPU."""
    return torch.cuda.is_available()


def local_rank() -> int:
    """Return the index of this process on its node, as torchrun sets it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """Return the device of every tensor of a step."""
    return torch.device("cuda", local_rank() % torch.cuda.device_count()) if has_gpu() else torch.device("cpu")


def to_device(values: torch.Tensor, target: torch.device | str) -> torch.Tensor:
    """Return ``values`` of the host on ``target``. The host does not wait for the copy to a GPU, which goes through page-locked memory."""
    if torch.device(target).type != "cuda" or values.is_cuda or not values.numel():
        return values.to(target)
    return values.pin_memory().to(target, non_blocking=True)  # torch keeps the page-locked memory until the copy is done


def check_processes() -> None:
    """Check that every process on this node has a GPU, as NCCL requires. Raises ValueError if torchrun started more processes."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if has_gpu() and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes were started on this node, but it shows {torch.cuda.device_count()} GPU(s), and each needs one: "
            f"start torchrun with --nproc_per_node {torch.cuda.device_count()}, or with CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )


def attend_without_plans() -> None:
    """Restrict SDPA on a GPU to its flash and memory-efficient kernels.

    cuDNN's kernel makes a plan for every new shape, and here nearly every call has a new shape: one more token in the cache, or an
    image of another size. In a profile of one generated token on an H100 the plans took 39 % of the host's time.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def backend() -> str:
    """Return the backend of the process group."""
    return "nccl" if has_gpu() else "gloo"


def compiles_kernels(target: torch.device | str) -> bool:
    """Return whether torch.compile compiles kernels for this device; on CPUs they run eagerly."""
    return torch.device(target).type == "cuda"


def device_name() -> str:
    """Return the hardware's name, which is the key of its peak rate; "cpu" without a GPU."""
    return torch.cuda.get_device_name(device()) if has_gpu() else "cpu"


def compute_capability() -> tuple[int, int] | None:
    """Return the compute capability of the GPU, such as (9, 0), or None without a GPU."""
    return torch.cuda.get_device_capability(device()) if has_gpu() else None


def synchronize() -> None:
    """Wait for issued work, before the program reads a clock."""
    if has_gpu():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Return the largest memory so far: allocated on the GPU, or resident in the process on CPUs."""
    if has_gpu():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def device_memory_bytes() -> int | None:
    """Return the memory of the GPU of this process, or None without a GPU."""
    return int(torch.cuda.get_device_properties(device()).total_memory) if has_gpu() else None


def reset_peak_memory() -> None:
    """Forget the largest memory so far. On CPUs the kernel remembers it for the life of the process."""
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()


def resident_memory_bytes() -> int:
    """Return the host memory of this process now (Linux; elsewhere the largest so far). Data workers are separate processes."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return peak_memory_bytes()


def profiled_activities() -> list[ProfilerActivity]:
    """Return what torch's profiler records here: the program, and the GPU if there is one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu() else [])]
