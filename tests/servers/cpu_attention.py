# SPDX-License-Identifier: Apache-2.0
"""vllm-omni's SDPA backend on a CPU: its call for CUDA is PyTorch's attention, which every device has."""

from __future__ import annotations

from typing import Any

from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend, SDPAImpl


class CpuImpl(SDPAImpl):
    """The backend's own computation, which no platform but a GPU's dispatches to."""

    def forward(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Any:
        """Return the attention's output."""
        return self.forward_cuda(query, key, value, attn_metadata)


class CpuBackend(SDPABackend):
    """The backend with that computation."""

    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        """Return the class that computes."""
        return CpuImpl
