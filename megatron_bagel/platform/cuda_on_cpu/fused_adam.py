# SPDX-License-Identifier: Apache-2.0
"""AdamW with the interface of apex's and Transformer Engine's FusedAdam, which keeps the step count in the parameter group.

Without either package Megatron-Core falls back to torch's AdamW, which keeps ``step`` per tensor. Its DistributedOptimizer saves
such a state but cannot load it. With this class a checkpoint has the same format with and without those packages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_bagel.platform.groupwise_optimizer import GroupwiseOptimizer


class StepInGroupAdam(GroupwiseOptimizer):
    """Adam or AdamW on torch's fused kernel. ``adam_w_mode`` decouples weight decay, as in FusedAdam."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("optimizer_cuda_graph needs the Adam of Transformer Engine or apex, which is not installed")
        # FusedAdam's groups contain bias_correction, so its checkpoints do as well.
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))
        self.update = adamw if adam_w_mode else adam

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param.data), torch.zeros_like(param.data)
        return state

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of ``group`` that have a gradient. The group counts a step even if none has."""
        group["step"] = int(group.get("step", 0)) + 1
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state_of(param) for param in params]
        self.update(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            # The kernel increments the step count in these temporary tensors. One fill makes them: a copy of each would make the host wait.
            list(torch.full((len(params),), float(group["step"] - 1), device=params[0].device).unbind()),
            foreach=False,
            fused=True,
            capturable=False,
            differentiable=False,
            grad_scale=None,
            found_inf=None,
            has_complex=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def use_where_megatron_fell_back_to_torch() -> None:
    """Set this class as Megatron-Core's FusedAdam, unless it found Transformer Engine's or apex's."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = StepInGroupAdam, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = StepInGroupAdam, True, True
