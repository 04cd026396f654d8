# SPDX-License-Identifier: Apache-2.0
"""What an implementation of the elementwise kernels computes. ``model/fused.py`` makes autograd nodes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

#: The gradients of a norm's input and weight; None where none is needed.
NormGradients = tuple[Tensor | None, Tensor | None]
#: The gradients of the input, and of the weights of both experts if they are needed.
NormAndRotateGradients = tuple[Tensor, Tensor | None, Tensor | None]
#: The gradient of both addends, and of the weights of both experts; None where none is needed.
AddAndNormGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Kernels:
    """Functions on tensors that record nothing for autograd. No function changes its arguments.

    ``x`` is [s, ..., h] for norms, [s, h] where another tensor is added, and [s, groups, heads, d] where rows are rotated. ``und`` and
    ``gen`` ([h], or [heads, d] for rotated rows) are the weights of the two experts; ``und`` serves rows [0, n_und). ``cos`` and ``sin``
    are [s, 1, 1, d / 2] in the dtype of ``x``. ``scale`` is 1 / sqrt(mean(x ** 2) + eps) of each row, in fp32 with a last dimension of 1.

    Attributes:
        norm: ``(x, weight, eps)`` to the normed rows and ``scale``.
        norm_backward: ``(grad, x, weight, scale, needs_x, needs_weight)`` to the gradients that are needed.
        add_and_norm: ``(x, added, und, gen, n_und, eps)`` to ``total`` = x + added, the normed rows of ``total``, and its ``scale``.
            ``total`` has the bits of a plain addition, and its norm is that of these rounded values.
        add_and_norm_backward: ``(grad_total, grad_normed, total, und, gen, n_und, scale, needs_x, needs_weights)`` to the gradients that
            are needed: one for both addends, and those of the weights.
        swiglu: ``gate_and_up`` [s, 2 f] to silu(gate) * up, [s, f].
        swiglu_backward: ``(grad, gate_and_up)`` to the gradient of ``gate_and_up``.
        norm_and_rotate: ``(x, und, gen, n_und, eps, cos, sin)`` to the result and ``scale``.
        norm_and_rotate_backward: ``(grad, x, und, gen, n_und, scale, cos, sin, needs_weights)`` to the gradients.
        rotate: ``(x, cos, sin, sign)`` to ``x`` rotated by the angles (``sign`` 1) or back (-1), half-split.
    """

    norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, bool, bool], NormGradients]
    add_and_norm: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor, Tensor]]
    add_and_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor, bool, bool], AddAndNormGradients]
    swiglu: Callable[[Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor], Tensor]
    norm_and_rotate: Callable[[Tensor, Tensor, Tensor, int, float, Tensor, Tensor], tuple[Tensor, Tensor]]
    norm_and_rotate_backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, Tensor, bool], NormAndRotateGradients
    ]  # fmt: skip
    rotate: Callable[[Tensor, Tensor, Tensor, int], Tensor]
