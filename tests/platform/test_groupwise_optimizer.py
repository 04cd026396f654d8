# SPDX-License-Identifier: Apache-2.0
"""A step goes through the parameter groups in order, without recording gradients, and returns what its closure returned."""

from __future__ import annotations

from typing import Any

import torch

from megatron_bagel.platform.groupwise_optimizer import GroupwiseOptimizer


class Descent(GroupwiseOptimizer):
    """Plain gradient descent."""

    def update_group(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            param.sub_(group["lr"] * param.grad)


def test_a_step_updates_every_group_and_returns_the_loss() -> None:
    slow, fast = (torch.nn.Parameter(torch.tensor([2.0])) for _ in range(2))
    optimizer = Descent([{"params": [slow], "lr": 0.25}, {"params": [fast], "lr": 0.5}], {})

    def closure() -> float:
        with torch.enable_grad():
            loss = (slow + 3 * fast).square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 64.0
    assert (slow.item(), fast.item()) == (2.0 - 0.25 * 16, 2.0 - 0.5 * 48)
    assert slow.is_leaf and slow.requires_grad
    assert optimizer.step() is None
    assert (slow.item(), fast.item()) == (2.0 - 0.5 * 16, 2.0 - 1.0 * 48)
