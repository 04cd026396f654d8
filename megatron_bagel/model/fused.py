# SPDX-License-Identifier: Apache-2.0
"""The elementwise parts of a layer as single autograd nodes: fewer launches, fewer passes over memory, less kept for backward.

Each function keeps its input and recomputes the cheap intermediate results. It uses plain torch operations, so it runs on any device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bagel.model.marks import mark


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x ** 2) + eps) over the last dimension, fp32 [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(grad: torch.Tensor, normed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the gradient through x -> x * scale(x), given ``normed`` = x * scale. Overwrites ``grad``."""
    mean = torch.mul(grad, normed).sum(-1, keepdim=True)
    return grad.addcmul_(normed, mean, value=-1 / grad.shape[-1]).mul_(scale)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        # The weight multiplies after the cast back to the input's dtype, as in Qwen2.
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        return _norm_backward((grad * weight).float(), normed, scale).to(x.dtype), weight_grad, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply RMSNorm over the last dimension of ``x`` [..., h] with ``weight`` [h]; statistics are fp32."""
    return _RMSNorm.apply(x, weight, eps)


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
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        gate_part, up_part = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate_part).mul_(up_part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate_part, up_part = gate_and_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_and_up)
        gate_grad, up_grad = gradient.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate_part), out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up_part, gate_part, grad_input=gate_grad)
        return gradient


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Map [s, 2 f] (gate, then up) to silu(gate) * up, [s, f]."""
    if not torch.is_grad_enabled() and not gate_and_up.shape[0]:
        return gate_and_up.new_empty((0, gate_and_up.shape[1] // 2))
    return _SwiGLU.apply(gate_and_up)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Rotate ``x`` by the angles (``sign`` 1) or back (-1), half-split; ``cos`` and ``sin`` broadcast over half of ``x``."""
    rotated = torch.empty_like(x)
    (first_half, second_half), (rotated_first, rotated_second) = x.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    torch.mul(first_half, cos, out=rotated_first)
    rotated_first.addcmul_(second_half, sin, value=-sign)
    torch.mul(second_half, cos, out=rotated_second)
    rotated_second.addcmul_(first_half, sin, value=sign)
    return rotated


class _NormAndRotate(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n_und: int, eps: float, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, und, gen, scale, cos, sin)
        ctx.n_und = n_und
        normed = (x * scale).to(x.dtype)
        normed[:n_und].mul_(und)
        normed[n_und:].mul_(gen)
        return _rotate(normed, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, und, gen, scale, cos, sin = ctx.saved_tensors
        n_und = ctx.n_und
        grad = _rotate(grad, cos, sin, -1).float()
        normed = x * scale
        weight_grads: list[torch.Tensor | None] = [None, None]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            products = (grad * normed).sum(1)
            weight_grads = [part.sum(0).to(und.dtype) for part in products.split([n_und, len(products) - n_und])]
        grad[:n_und].mul_(und)
        grad[n_und:].mul_(gen)
        return _norm_backward(grad, normed, scale).to(x.dtype), *weight_grads, None, None, None, None


def norm_and_rotate(
    x: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n_und: int, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Apply QK-norm and rotary positions to queries and keys together.

    ``x`` is [s, groups, heads, d]. ``und`` and ``gen`` [heads, d] are the norm weights of the two experts; ``und`` serves rows
    [0, n_und). ``cos`` and ``sin`` are [s, 1, 1, d / 2] in the dtype of ``x``.
    """
    return _NormAndRotate.apply(x, und, gen, n_und, eps, cos, sin)


class _RotateOnly(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions without a norm to ``x`` [s, groups, heads, d]; ``cos`` and ``sin`` are [s, 1, 1, d / 2] in its dtype."""
    return _RotateOnly.apply(x, cos, sin)
