"""Which device this process computes on, what its collectives run on, and how much memory it has used."""

from __future__ import annotations

import os
import resource
import sys

import torch
from torch.profiler import ProfilerActivity


def has_gpu() -> bool:
    """Whether this process computes on a CUDA GPU."""
    return torch.cuda.is_available()


def local_rank() -> int:
    """Index of this process on its node, as torchrun gives it; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """The device of every tensor of a step."""
    return torch.device("cuda", local_rank() % torch.cuda.device_count()) if has_gpu() else torch.device("cpu")


def check_processes() -> None:
    """Raises ValueError when torchrun started more processes on this node than it has GPUs: NCCL wants a GPU for each."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if has_gpu() and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes were started on this node, but it shows {torch.cuda.device_count()} GPU(s), and each process needs its "
            f"own: start torchrun with --nproc_per_node {torch.cuda.device_count()}, or with CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )


def attend_without_plans() -> None:
    """Leave SDPA on a GPU to its flash and memory-efficient kernels. cuDNN's makes a plan for every new shape, and here nearly every
    call has one: a token more in the cache, an image of another size. In a profile of one written
    token on an H100 it took 39 % of the host's time.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def backend() -> str:
    """Backend of the process group."""
    return "nccl" if has_gpu() else "gloo"


def compiles_kernels(where: torch.device | str) -> bool:
    """Whether kernels for this device are compiled with torch.compile; on CPU they run eagerly."""
    return torch.device(where).type == "cuda"


def device_name() -> str:
    """What the hardware calls itself, for looking up its peak rate; "cpu" without a GPU."""
    return torch.cuda.get_device_name(device()) if has_gpu() else "cpu"


def synchronize() -> None:
    """Wait for issued work, before a clock is read."""
    if has_gpu():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Largest memory so far: allocated on the GPU, or resident in the process on CPU."""
    if has_gpu():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def resident_memory_bytes() -> int:
    """Host memory of this process now (Linux; elsewhere the largest so far). Workers that load data are processes of their own."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return peak_memory_bytes()


def profiled_activities() -> list[ProfilerActivity]:
    """What torch's profiler records here: the program, and the GPU where there is one."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu() else [])]
