# SPDX-License-Identifier: Apache-2.0
"""The part of a torch optimizer that does not depend on its formula: the closure, and the way through the parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch


class GroupwiseOptimizer(torch.optim.Optimizer):
    """An optimizer that updates one parameter group after the other. A subclass defines ``update_group``."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and return what ``closure`` returned."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            self.update_group(group)
        return loss

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of ``group`` that have a gradient. No gradients are recorded here."""
        raise NotImplementedError
