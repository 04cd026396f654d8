# SPDX-License-Identifier: Apache-2.0
"""The elementwise kernels as plain torch operations, written for few launches and few passes over memory. They run on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bagel.model.kernels.base import AddAndNormGradients, Kernels, NormAndRotateGradients, NormGradients


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x ** 2) + eps) over the last dimension, fp32 [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _through_norm(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient through x -> x * scale(x), given ``normed`` = x * scale. Overwrites ``grad``."""
    mean = torch.mul(grad, normed).sum(-1, keepdim=True)
    return grad.addcmul_(normed, mean, value=-1 / grad.shape[-1]).mul_(scale)


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = _inverse_rms(x, eps)
    # The weight multiplies after the cast back to the input's dtype, as in Qwen2.
    return (x * scale).to(x.dtype).mul_(weight), scale


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs_x: bool, needs_weight: bool) -> NormGradients:
    normed = x * scale
    weight_grad = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if needs_weight else None
    return _through_norm((grad * weight).float(), normed, scale).to(x.dtype) if needs_x else None, weight_grad


def _weighted(x: Tensor, und: Tensor, gen: Tensor, n_und: int) -> Tensor:
    """Multiply rows [0, n_und) by ``und`` and the others by ``gen``, in place; return ``x``."""
    x[:n_und].mul_(und)
    x[n_und:].mul_(gen)
    return x


def _add_and_norm(x: Tensor, added: Tensor, und: Tensor, gen: Tensor, n_und: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x + added
    scale = _inverse_rms(total, eps)
    return total, _weighted((total * scale).to(total.dtype), und, gen, n_und), scale


def _add_and_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, und: Tensor, gen: Tensor, n_und: int, scale: Tensor, needs_x: bool,
    needs_weights: bool,
) -> AddAndNormGradients:  # fmt: skip
    normed = total * scale
    grad, weight_grads = None, [None, None]
    if needs_weights:
        weight_grads = [part.sum(0).to(und.dtype) for part in (grad_normed * normed).split([n_und, len(normed) - n_und])]
    if needs_x:
        weighted = _weighted(grad_normed.clone(), und, gen, n_und).float()
        grad = _through_norm(weighted, normed, scale).to(total.dtype).add_(grad_total)
    return grad, weight_grads[0], weight_grads[1]


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate_part, up_part = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate_part).mul_(up_part)


def _swiglu_backward(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    gate_part, up_part = gate_and_up.chunk(2, dim=-1)
    gradient = torch.empty_like(gate_and_up)
    gate_grad, up_grad = gradient.chunk(2, dim=-1)
    torch.mul(grad, F.silu(gate_part), out=up_grad)
    torch.ops.aten.silu_backward.grad_input(grad * up_part, gate_part, grad_input=gate_grad)
    return gradient


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    rotated = torch.empty_like(x)
    (first_half, second_half), (rotated_first, rotated_second) = x.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    torch.mul(first_half, cos, out=rotated_first)
    rotated_first.addcmul_(second_half, sin, value=-sign)
    torch.mul(second_half, cos, out=rotated_second)
    rotated_second.addcmul_(first_half, sin, value=sign)
    return rotated


def _norm_and_rotate(x: Tensor, und: Tensor, gen: Tensor, n_und: int, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    scale = _inverse_rms(x, eps)
    return _rotate(_weighted((x * scale).to(x.dtype), und, gen, n_und), cos, sin, 1), scale


def _norm_and_rotate_backward(
    grad: Tensor, x: Tensor, und: Tensor, gen: Tensor, n_und: int, scale: Tensor, cos: Tensor, sin: Tensor, needs_weights: bool
) -> NormAndRotateGradients:
    grad = _rotate(grad, cos, sin, -1).float()
    normed = x * scale
    weight_grads: list[Tensor | None] = [None, None]
    if needs_weights:
        products = (grad * normed).sum(1)
        weight_grads = [part.sum(0).to(und.dtype) for part in products.split([n_und, len(products) - n_und])]
    grad = _through_norm(_weighted(grad, und, gen, n_und), normed, scale)
    return grad.to(x.dtype), weight_grads[0], weight_grads[1]


EAGER = Kernels(
    norm=_norm,
    norm_backward=_norm_backward,
    add_and_norm=_add_and_norm,
    add_and_norm_backward=_add_and_norm_backward,
    swiglu=_swiglu,
    swiglu_backward=_swiglu_backward,
    norm_and_rotate=_norm_and_rotate,
    norm_and_rotate_backward=_norm_and_rotate_backward,
    rotate=_rotate,
)
