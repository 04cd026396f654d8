# SPDX-License-Identifier: Apache-2.0
"""The only place that knows CUDA from CPU, and one Megatron-Core release from another.

Entry points call ``install()`` before they import anything of Megatron-Core.
"""

import os

from megatron_bagel.platform.cuda_on_cpu.patches import enter_thread
from megatron_bagel.platform.device import attend_without_plans, backend, compiles_kernels, device, has_gpu, peak_memory_bytes
from megatron_bagel.platform.lean_imports import lean_imports

__all__ = ["backend", "compiles_kernels", "device", "enter_thread", "has_gpu", "install", "install_for_streaming", "peak_memory_bytes"]


def install() -> None:
    """Make Megatron-Core run on this machine: CPU replacements without a GPU, and an Adam that it can checkpoint.

    With a GPU no function of torch.cuda is replaced. A second call only enters the calling thread.
    """
    with lean_imports():
        from megatron_bagel.platform import megatron_compat, multi_tensor
        from megatron_bagel.platform.cuda_on_cpu import fused_adam, patches

    megatron_compat.check_versions()
    megatron_compat.define_router_gemm()
    if has_gpu():
        attend_without_plans()
    else:
        patches.install()
    fused_adam.use_where_megatron_fell_back_to_torch()
    multi_tensor.use_where_megatron_has_stand_ins()


def install_for_streaming() -> None:
    """Install for work that passes through many tensors once: freed memory goes back, where training keeps it for its next step."""
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "131072")  # the C library's default; that it is set is what counts
    install()
