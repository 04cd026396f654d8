"""What a plan assumes of GPUs and links: data sheet figures, and how much of them training gets. Every figure has a flag."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.costs.flops import peak_tflops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in its usual machine.

    ``memory_gib`` as the data sheet says it; ``link_gbs`` and ``network_gbs`` are GB/s per GPU in one direction, inside a node and
    between nodes; ``source`` names where the figures come from. Dense bf16 peaks are those of `training.accounting`, so that a plan's
    MFU is the one that training will report.
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
        """Dense bf16 peak in TFLOP/s."""
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
    """Figures that a prediction rests on, printed with it. Shares are of peaks; ``reserved_gib`` is what CUDA, NCCL, kernels and a
    fragmented allocator take of the memory."""

    matmul_share: float = 0.6
    attention_share: float = 0.35
    encoder_share: float = 0.35
    link_share: float = 0.75
    network_share: float = 0.75
    reserved_gib: float = 5.0


def gpu_of(arguments: PlanArguments, peak: float = 0.0) -> Gpu:
    """The GPU that the flags describe, with another ``peak`` (TFLOP/s) where that is not 0. Raises ValueError for an unknown kind."""
    known = GPUS.get(arguments.gpu.lower())
    if known is None:
        raise ValueError(f"--gpu {arguments.gpu} is not in the table; choose from {', '.join(GPUS)}, and override its figures by flags")
    given: dict[str, Any] = {
        "memory_gib": arguments.gpu_memory_gib,
        "peak": peak,
        "link_gbs": arguments.link_gbs,
        "network_gbs": arguments.network_gbs,
        "gpus_per_node": arguments.gpus_per_node,
    }
    return replace(known, **{name: value for name, value in given.items() if value})


def assumptions_of(arguments: PlanArguments) -> Assumptions:
    """The shares that the flags give."""
    return Assumptions(**{field.name: getattr(arguments, field.name) for field in fields(Assumptions)})
