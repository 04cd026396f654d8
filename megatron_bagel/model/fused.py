"""The elementwise parts of a layer as single autograd nodes: fewer launches, fewer passes over memory, less kept for backward.

Each keeps its input and recomputes the cheap rest. Plain torch operations only, so they run anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x ** 2) + eps) over the last dimension, fp32 [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_backward(grad: torch.Tensor, normed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Gradient through x -> x * scale(x), given x * scale; overwrites ``grad``."""
    mean = torch.mul(grad, normed).sum(-1, keepdim=True)
    return grad.addcmul_(normed, mean, value=-1 / grad.shape[-1]).mul_(scale)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        # The weight multiplies after the cast back to the input's dtype, as Qwen2 does it.
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
    """RMSNorm over the last dimension; statistics in fp32. ``x`` [..., h], ``weight`` [h]."""
    return _RMSNorm.apply(x, weight, eps)


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad^T x, added straight to Megatron's gradient buffer where the parameter has one of its dtype.

    What is returned then holds no numbers: DDP only looks that a gradient arrived (``grad_added_to_main_grad``, the mark that
    Megatron's gradient_accumulation_fusion sets too). A pass over memory less per weight.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != grad.dtype:
        return grad.t().mm(x)
    buffer.addmm_(grad.t(), x)
    weight.grad_added_to_main_grad = True
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
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            grad.mm(weight) if need_x else None,
            _weight_gradient(grad, x, weight) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [s, in], ``weight`` [out, in] -> [s, out], with half the bookkeeping of torch's for two dimensions."""
    return _Linear.apply(x, weight, bias)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        return out


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """[s, 2 f] (gate, then up) -> silu(gate) * up, [s, f]."""
    if not torch.is_grad_enabled() and not both.shape[0]:
        return both.new_empty((0, both.shape[1] // 2))
    return _SwiGLU.apply(both)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Half-split rotation by the angles (``sign`` 1) or back (-1); ``cos`` and ``sin`` broadcast over half of ``x``."""
    out = torch.empty_like(x)
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin, value=sign)
    return out


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
        weights: list[torch.Tensor | None] = [None, None]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            products = (grad * normed).sum(1)
            weights = [part.sum(0).to(und.dtype) for part in products.split([n_und, len(products) - n_und])]
        grad[:n_und].mul_(und)
        grad[n_und:].mul_(gen)
        return _norm_backward(grad, normed, scale).to(x.dtype), *weights, None, None, None, None


def norm_and_rotate(
    x: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n_und: int, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """QK-norm and rotary positions of queries and keys together.

    ``x`` [s, groups, heads, d]; ``und`` and ``gen`` [heads, d] are the norm weights of the two experts, the first of which serves
    rows [0, n_und); ``cos`` and ``sin`` [s, 1, 1, d / 2] in the dtype of ``x``.
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
    """Rotary positions alone: ``x`` [s, groups, heads, d], ``cos`` and ``sin`` [s, 1, 1, d / 2] in its dtype."""
    return _RotateOnly.apply(x, cos, sin)
