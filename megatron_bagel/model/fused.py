# SPDX-License-Identifier: Apache-2.0
"""The elementwise parts of a layer as single autograd nodes: fewer launches, fewer passes over memory, less kept for backward.

Each function keeps its input and recomputes the cheap intermediate results. What computes forward and backward is the ``kernels`` argument:
plain torch operations by default, or compiled functions (``kernels/choice.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bagel.model.kernels.base import Kernels
from megatron_bagel.model.kernels.eager import EAGER
from megatron_bagel.model.marks import mark


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, kernels: Kernels) -> torch.Tensor:
        normed, scale = kernels.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.kernels = kernels
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        return *ctx.kernels.norm_backward(grad, *ctx.saved_tensors, needs_x, needs_weight), None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, kernels: Kernels = EAGER) -> torch.Tensor:
    """Apply RMSNorm over the last dimension of ``x`` [..., h] with ``weight`` [h]; statistics are fp32."""
    return _RMSNorm.apply(x, weight, eps, kernels)


class _TorchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _torch_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        inputs = x.detach().requires_grad_(needs_x), weight.detach().requires_grad_(needs_weight)
        with torch.enable_grad():
            normed = _torch_norm(*inputs, ctx.eps)
        found = iter(torch.autograd.grad(normed, [tensor for tensor in inputs if tensor.requires_grad], grad))
        return *(next(found) if tensor.requires_grad else None for tensor in inputs), None


def _torch_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # torch computes in fp32 and rounds the result to the type of x, before the weight multiplies.
    return F.rms_norm(x, weight.shape, None, eps) * weight


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply RMSNorm like ``rms_norm`` by torch's function, which is one launch on a GPU.

    Only ``x`` is kept, as ``rms_norm`` does, and the backward pass computes the norm again. Autograd would also keep the result before
    the weight multiplies.
    """
    return _TorchNorm.apply(x, weight, eps)


class _AddAndNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, added: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n_und: int, eps: float, kernels: Kernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed, scale = kernels.add_and_norm(x, added, und, gen, n_und, eps)
        ctx.save_for_backward(total, und, gen, scale)
        ctx.n_und, ctx.kernels = n_und, kernels
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor, grad_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, und, gen, scale = ctx.saved_tensors
        needs_x, needs_added, needs_und, needs_gen = ctx.needs_input_grad[:4]
        grad, und_grad, gen_grad = ctx.kernels.add_and_norm_backward(
            grad_total, grad_normed, total, und, gen, ctx.n_und, scale, needs_x or needs_added, needs_und or needs_gen
        )
        return grad, grad, und_grad, gen_grad, None, None, None


def add_and_norm(
    x: torch.Tensor, added: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n_und: int, eps: float, kernels: Kernels = EAGER
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x`` + ``added`` [s, h] and its RMSNorm, with the weight ``und`` [h] for rows [0, n_und) and ``gen`` for the others."""
    return _AddAndNorm.apply(x, added, und, gen, n_und, eps, kernels)


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return grad^T x, or add it straight to Megatron's gradient buffer if the parameter has one of the same dtype.

    In the second case the returned tensor is uninitialised. DDP only checks that a gradient arrived and reads the mark
    ``grad_added_to_main_grad``, which Megatron's ``gradient_accumulation_fusion`` also sets. This saves a pass over memory per
    weight.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != grad.dtype:
        return grad.t().mm(x)
    buffer.addmm_(grad.t(), x)
    mark(weight, grad_added_to_main_grad=True)
    return torch.empty_like(weight)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad.mm(weight) if needs_x else None,
            weight_gradient(grad, x, weight) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Map ``x`` [s, in] by ``weight`` [out, in] to [s, out], with half the bookkeeping of torch's linear for two dimensions."""
    return _Linear.apply(x, weight, bias)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.kernels = kernels
        return kernels.swiglu(gate_and_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.kernels.swiglu_backward(grad, *ctx.saved_tensors), None


def swiglu(gate_and_up: torch.Tensor, kernels: Kernels = EAGER) -> torch.Tensor:
    """Map [s, 2 f] (gate, then up) to silu(gate) * up, [s, f]."""
    if not torch.is_grad_enabled() and not gate_and_up.shape[0]:
        return gate_and_up.new_empty((0, gate_and_up.shape[1] // 2))
    return _SwiGLU.apply(gate_and_up, kernels)


class _NormAndRotate(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n_und: int, eps: float, cos: torch.Tensor, sin: torch.Tensor,
        kernels: Kernels,
    ) -> torch.Tensor:  # fmt: skip
        rotated, scale = kernels.norm_and_rotate(x, und, gen, n_und, eps, cos, sin)
        ctx.save_for_backward(x, und, gen, scale, cos, sin)
        ctx.n_und, ctx.kernels = n_und, kernels
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, und, gen, scale, cos, sin = ctx.saved_tensors
        needs_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grads = ctx.kernels.norm_and_rotate_backward(grad, x, und, gen, ctx.n_und, scale, cos, sin, needs_weights)
        return *grads, None, None, None, None, None


def norm_and_rotate(
    x: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n_und: int, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    kernels: Kernels = EAGER,
) -> torch.Tensor:  # fmt: skip
    """Apply QK-norm and rotary positions to queries and keys together.

    ``x`` is [s, groups, heads, d]. ``und`` and ``gen`` [heads, d] are the norm weights of the two experts; ``und`` serves rows
    [0, n_und). ``cos`` and ``sin`` are [s, 1, 1, d / 2] in the dtype of ``x``.
    """
    return _NormAndRotate.apply(x, und, gen, n_und, eps, cos, sin, kernels)


class _RotateOnly(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.kernels.rotate(grad, *ctx.saved_tensors, -1), None, None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels = EAGER) -> torch.Tensor:
    """Apply rotary positions without a norm to ``x`` [s, groups, heads, d]; ``cos`` and ``sin`` are [s, 1, 1, d / 2] in its dtype."""
    return _RotateOnly.apply(x, cos, sin, kernels)
