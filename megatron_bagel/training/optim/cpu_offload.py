# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's hybrid optimizer: fp32 weights, moments and updates of a share of the parameters are in host memory.

It takes the parameters in their order until their elements reach the share, keeps pinned copies of their gradients on the host, updates
there with torch's AdamW, and copies the new weights back as bf16. The other parameters are updated on the GPU. Megatron-Core runs it on
the code path of its precision-aware optimizer, whose gradients are ``decoupled_grad`` instead of ``grad`` and whose main weights are not
``main_param``. It has not run on a GPU with this package yet.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def offload_settings(fraction: float, overlap: bool) -> dict[str, Any]:
    """Return the fields of Megatron's ``OptimizerConfig`` that make the optimizer hybrid."""
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "overlap_cpu_optimizer_d2h_h2d": overlap,
        "use_precision_aware_optimizer": True,
    }


def is_hybrid(leaf: DistributedOptimizer) -> bool:
    """Return whether an optimizer of Megatron's chain updates in host memory."""
    return isinstance(leaf.optimizer, HybridDeviceOptimizer)


def hybrid_main_weight(leaf: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return this rank's slice of the fp32 main weight of a model parameter, flat, on the device that updates it.

    It is looked up each time, because the hybrid optimizer makes new copies when it loads a state.
    """
    group, number = leaf.model_param_group_index_map[parameter]
    shard = leaf.optimizer.param_groups[group]["params"][number]
    main: torch.Tensor = leaf.optimizer.param_to_inner_param[shard]
    return main.detach()
