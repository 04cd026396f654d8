# SPDX-License-Identifier: Apache-2.0
"""Assumptions about GPUs and links: figures from data sheets, and the share of them that training reaches. Each has a flag."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.costs.flops import peak_tflops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its usual machine.

    Attributes:
        name: The name of the GPU.
        memory_gib: The memory according to the data sheet.
        link_gbs: GB/s per GPU in one direction inside a node.
        network_gbs: GB/s per GPU in one direction between nodes.
        gpus_per_node: The number of GPUs in a node.
        source: Where the figures come from.
        peak: Dense bf16 TFLOP/s; 0 for the rate in ``costs/flops.py``, with which training reports its MFU.
    """

    name: str
    memory_gib: float
    link_gbs: float
    network_gbs: float
    gpus_per_node: int
    source: str
    peak: float = 0.0

    @property
    def tflops(self) -> float:
        """Return the dense bf16 peak in TFLOP/s."""
        return self.peak or peak_tflops(self.name)


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100", 80, 450, 50, 8, "NVIDIA H100 SXM data sheet (NVLink 900 GB/s both ways); DGX H100: one 400 Gb/s port per GPU"),
    "h200": Gpu("H200", 141, 450, 50, 8, "NVIDIA H200 SXM data sheet; DGX H200: one 400 Gb/s port per GPU"),
    "h800": Gpu("H800", 80, 200, 50, 8, "NVIDIA H800 SXM: an H100 with NVLink of 400 GB/s both ways"),
    "h20": Gpu("H20", 96, 450, 50, 8, "NVIDIA H20 SXM data sheet"),
    "a100": Gpu("A100", 80, 300, 25, 8, "NVIDIA A100 80GB SXM data sheet (NVLink 600 GB/s both ways); DGX A100: one 200 Gb/s port per GPU"),
    "a100-40gb": Gpu("A100", 40, 300, 25, 8, "NVIDIA A100 40GB SXM data sheet; DGX A100: one 200 Gb/s port per GPU"),
    "a800": Gpu("A800", 80, 200, 25, 8, "NVIDIA A800 SXM: an A100 with NVLink of 400 GB/s both ways"),
    "b200": Gpu("B200", 180, 900, 50, 8, "NVIDIA DGX B200 data sheet (1,440 GB, 72 PFLOP/s of sparse FP8 for 8 GPUs)"),
    "mi300x": Gpu("MI300X", 192, 448, 50, 8, "AMD Instinct MI300X data sheet (7 Infinity Fabric links of 64 GB/s); 400 Gb/s port per GPU"),
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a prediction, which are printed with it.

    Shares are fractions of peak rates. ``reserved_gib`` is the memory that CUDA, NCCL, kernels and a fragmented allocator take.
    """

    matmul_share: float = 0.6
    attention_share: float = 0.35
    encoder_share: float = 0.35
    link_share: float = 0.75
    network_share: float = 0.75
    reserved_gib: float = 5.0


def gpu_of(arguments: PlanArguments, peak: float = 0.0) -> Gpu:
    """Return the GPU that the flags describe, with ``peak`` (TFLOP/s) if it is not 0. Raises ValueError for an unknown kind."""
    gpu = GPUS.get(arguments.gpu.lower())
    if gpu is None:
        raise ValueError(f"--gpu {arguments.gpu} is not in the table; choose one of {', '.join(GPUS)}, and change its figures with flags")
    overrides: dict[str, Any] = {
        "memory_gib": arguments.gpu_memory_gib,
        "peak": peak,
        "link_gbs": arguments.link_gbs,
        "network_gbs": arguments.network_gbs,
        "gpus_per_node": arguments.gpus_per_node,
    }
    return replace(gpu, **{name: value for name, value in overrides.items() if value})


def assumptions_of(arguments: PlanArguments) -> Assumptions:
    """Return the assumptions that the flags give."""
    return Assumptions(**{field.name: getattr(arguments, field.name) for field in fields(Assumptions)})
