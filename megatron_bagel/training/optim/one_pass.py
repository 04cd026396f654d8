# SPDX-License-Identifier: Apache-2.0
"""AdamW that updates moments, weights and their average in one pass, with moments in fp32 or bf16.

The plain way goes through the shards twice: the average reads every weight again. Here a block of weights that fits into a processor's
cache goes through all operations before the next block, so that memory sees each number once. On a GPU ``torch.compile`` makes one kernel
of the formulas.

With moments in fp32 the numbers on a CPU are those of the plain optimizer and of ``ShardedEma.update``, bit for bit. Moments in bf16 take
half the memory. They are read into fp32, updated there, and rounded once. Megatron-Core's precision-aware optimizer keeps the same state,
but only with Transformer Engine's kernel, which knows nothing of the average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_bagel.platform.device import to_device
from megatron_bagel.platform.groupwise_optimizer import GroupwiseOptimizer

#: The moments' types by flag value.
STATE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
StateDtype = Literal["fp32", "bf16"]
_BLOCK = 1 << 19  # weights of a block; with gradient, moments and average 10 MB, a share of the last cache
_MOMENTS = "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class _Numbers:
    """The numbers of one step: AdamW's, how many steps are done with it, and the decay of the average."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    count: int
    decay: float

    def changing(self, device: torch.device) -> list[Tensor]:
        """Return what changes with the step as tensors: step size, root of the second correction, and decay.

        Numbers would make each step compile a kernel of its own. One copy serves all weights, and the host does not wait for it.
        """
        step_size, root = self.lr / (1 - self.beta1**self.count), (1 - self.beta2**self.count) ** 0.5
        # Copies, because the compiler treats views of one tensor with care.
        return [number.clone() for number in to_device(torch.tensor([step_size, root, self.decay]), device)]


class OnePassAdamW(GroupwiseOptimizer):
    """AdamW over flat fp32 weights, without weight decay. ``averages`` by weight are updated in the same pass with ``decay``.

    Megatron's distributed optimizer keeps, saves and loads the state as that of its FusedAdam; checkpoints have fp32.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], state_dtype: StateDtype) -> None:
        # torch takes no views as weights, and the slices of Megatron's distributed optimizer are views.
        super().__init__([{"params": [torch.zeros(0)]}], {})
        self.param_groups = list(groups)
        if any(group["weight_decay"] for group in self.param_groups):
            raise ValueError("the optimizer in one pass has no weight decay")
        self.state_dtype = STATE_DTYPES[state_dtype]
        self.averages: dict[Tensor, Tensor] = {}
        self.decay = 0.0

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the weights of ``group`` that have a gradient, their moments and averages. The group counts a step even if none has."""
        group["step"] = int(group.get("step", 0)) + 1
        numbers = _Numbers(float(group["lr"]), group["betas"][0], group["betas"][1], group["eps"], group["step"], self.decay)
        weights = [weight for weight in group["params"] if weight.grad is not None]
        changing = numbers.changing(weights[0].device) if weights and weights[0].is_cuda else []
        for weight in weights:
            average = self.averages.get(weight)
            tensors = [weight, weight.grad, *self._moments(weight), *([] if average is None else [average])]
            _update([tensor.view(-1) for tensor in tensors], numbers, changing)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, whose moments may have another type."""
        super().load_state_dict(state_dict)
        for weight in self.state:
            self._moments(weight)

    def _moments(self, weight: Tensor) -> list[Tensor]:
        """Return the moments of a weight. Megatron may have made them like the weight."""
        state: dict[str, Any] = self.state[weight]
        for name in _MOMENTS:
            moment = state.get(name)
            state[name] = torch.zeros_like(weight, dtype=self.state_dtype) if moment is None else moment.to(self.state_dtype)
        return [state[name] for name in _MOMENTS]


def _update(tensors: list[Tensor], numbers: _Numbers, changing: list[Tensor]) -> None:
    """Update flat ``tensors`` in place: weight, gradient, first and second moment, and the average if there is one.

    ``changing`` is ``numbers.changing`` on a GPU.
    """
    if not tensors[0].is_cuda:
        for block in zip(*(tensor.split(_BLOCK) for tensor in tensors), strict=True):
            _update_block(list(block), numbers)
        return
    one_kernel()(tensors, numbers.beta1, numbers.beta2, numbers.eps, *changing)


def _update_block(tensors: list[Tensor], numbers: _Numbers) -> None:
    """Update one block with torch's fused kernel, which the plain optimizer of a CPU uses as well."""
    weight, gradient, first, second = tensors[:4]
    moments = first.float(), second.float()
    adamw(
        [weight], [gradient], [moments[0]], [moments[1]], [], [torch.tensor(float(numbers.count - 1))],
        foreach=False, fused=True, amsgrad=False, beta1=numbers.beta1, beta2=numbers.beta2, lr=numbers.lr, weight_decay=0.0,
        eps=numbers.eps, maximize=False,
    )  # fmt: skip
    if first.dtype != torch.float32:
        first.copy_(moments[0])
        second.copy_(moments[1])
    if len(tensors) == 5:
        tensors[4].lerp_(weight, 1.0 - numbers.decay)


@cache
def one_kernel() -> Callable[..., None]:
    """Return the compiled function of the GPU."""
    return torch.compile(_update_whole, dynamic=True)


def _update_whole(
    tensors: list[Tensor], beta1: float, beta2: float, eps: float, step_size: Tensor, root_of_correction: Tensor, decay: Tensor
) -> None:
    """Apply the same formulas without views, for the compiler to make one kernel of."""
    weight, gradient, first, second = tensors[:4]
    first32 = torch.lerp(first.float(), gradient, 1 - beta1)
    second32 = second.float() * beta2 + gradient * gradient * (1 - beta2)
    updated = weight - step_size * first32 / (second32.sqrt() / root_of_correction + eps)
    weight.copy_(updated)
    first.copy_(first32)
    second.copy_(second32)
    if len(tensors) == 5:
        tensors[4].copy_(torch.lerp(tensors[4], updated, 1.0 - decay))
