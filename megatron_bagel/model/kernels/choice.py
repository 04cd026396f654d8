# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses the elementwise kernels of a decoder (``--fused_kernels``)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from megatron_bagel.model.kernels.base import Kernels
from megatron_bagel.model.kernels.eager import EAGER

KernelsName = Literal["eager", "compiled"]


class UsesKernels:
    """A module that computes with elementwise kernels: the eager ones, until ``use_kernels`` gives it others."""

    kernels: Kernels = EAGER


def kernels_named(name: KernelsName) -> Kernels:
    """Return the kernels of a name."""
    if name == "eager":
        return EAGER
    # Imported here because it imports torch's compiler, which takes seconds.
    from megatron_bagel.model.kernels.compiled import compiled_kernels

    return compiled_kernels()


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let every module of ``model`` that has a choice compute with ``kernels``. Weights and results of checkpoints do not change."""
    for module in model.modules():
        if isinstance(module, UsesKernels):
            module.kernels = kernels
