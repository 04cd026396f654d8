# SPDX-License-Identifier: Apache-2.0
"""The elementwise kernels compiled by ``torch.compile``: each function reads its tensors once, in one kernel or a few.

The formulas are those of ``eager.py`` without views that are written to. Only the number of rows is a variable of the kernels. Sizes of the
model and what needs a gradient are constants, so a run compiles each function once and not for every pack. A function that sums over rows
may be compiled again for many rows, which the compiler sums in another way. Results differ from the eager ones by rounding: what stays
inside a kernel is not rounded to bf16 in between. Only the sum of the residual stream is: the backward pass reads it from memory, and the
statistics must be those of the same values.

Only a run that asks for these kernels imports this module, and the compiler with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import mark_dynamic

from megatron_bagel.model.kernels.base import AddAndNormGradients, Kernels, NormAndRotateGradients, NormGradients
from megatron_bagel.model.kernels.eager import EAGER

#: What ``torch.compile`` takes as a backend: a name, or a function of a graph and its inputs.
Backend = str | Callable[..., Any]


def _normed_and_scale(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    values = x.float()
    scale = torch.rsqrt((values * values).mean(-1, keepdim=True) + eps)
    return (values * scale).to(x.dtype), scale


def _through_norm(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient through x -> x * scale(x), given ``normed`` = x * scale."""
    return (grad - normed * (grad * normed).mean(-1, keepdim=True)) * scale


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, scale = _normed_and_scale(x, eps)
    return normed * weight, scale


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs_x: bool, needs_weight: bool) -> NormGradients:
    normed = x.float() * scale
    weight_grad = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if needs_weight else None
    return _through_norm((grad * weight).float(), normed, scale).to(x.dtype) if needs_x else None, weight_grad


def _und_rows(x: Tensor, n_und: Tensor) -> Tensor:
    """Return whether each row of ``x`` [s, ...] belongs to the understanding expert, [s, 1, ...]."""
    return (torch.arange(x.shape[0], device=x.device) < n_und).view(-1, *[1] * (x.dim() - 1))


def _add_and_norm(x: Tensor, added: Tensor, und: Tensor, gen: Tensor, n_und: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x + added
    normed, scale = _normed_and_scale(total, eps)
    return total, normed * torch.where(_und_rows(x, n_und), und, gen), scale


def _add_and_norm_backward(
    grad_total: Tensor, grad_normed: Tensor, total: Tensor, und: Tensor, gen: Tensor, n_und: Tensor, scale: Tensor, needs_x: bool,
    needs_weights: bool,
) -> AddAndNormGradients:  # fmt: skip
    normed, is_und = total.float() * scale, _und_rows(total, n_und)
    grad = und_grad = gen_grad = None
    if needs_weights:
        products = grad_normed * normed
        und_grad = torch.where(is_und, products, 0).sum(0).to(und.dtype)
        gen_grad = torch.where(is_und, 0, products).sum(0).to(und.dtype)
    if needs_x:
        weighted = (grad_normed * torch.where(is_und, und, gen)).float()
        grad = (grad_total + _through_norm(weighted, normed, scale)).to(total.dtype)
    return grad, und_grad, gen_grad


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate_part, up_part = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate_part) * up_part


def _swiglu_backward(grad: Tensor, gate_and_up: Tensor) -> Tensor:
    gate_part, up_part = gate_and_up.chunk(2, dim=-1)
    return torch.cat([torch.ops.aten.silu_backward(grad * up_part, gate_part), grad * F.silu(gate_part)], dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    first_half, second_half = x.chunk(2, dim=-1)
    sin = sin * sign
    return torch.cat([first_half * cos - second_half * sin, second_half * cos + first_half * sin], dim=-1)


def _norm_and_rotate(x: Tensor, und: Tensor, gen: Tensor, n_und: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    normed, scale = _normed_and_scale(x, eps)
    return _rotate(normed * torch.where(_und_rows(x, n_und), und, gen), cos, sin, 1), scale


def _norm_and_rotate_backward(
    grad: Tensor, x: Tensor, und: Tensor, gen: Tensor, n_und: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, needs_weights: bool
) -> NormAndRotateGradients:
    grad, normed, is_und = _rotate(grad, cos, sin, -1).float(), x.float() * scale, _und_rows(x, n_und)
    und_grad = gen_grad = None
    if needs_weights:
        products = grad * normed
        und_grad = torch.where(is_und, products, 0).sum((0, 1)).to(und.dtype)
        gen_grad = torch.where(is_und, 0, products).sum((0, 1)).to(und.dtype)
    return _through_norm(grad * torch.where(is_und, und, gen), normed, scale).to(x.dtype), und_grad, gen_grad


@lru_cache(maxsize=16)
def _count(n_und: int, device: torch.device) -> Tensor:
    """Return ``n_und`` as a tensor: a kernel would be compiled for the value of an integer. All layers of a pack share the tensor."""
    with torch.inference_mode(False):
        return torch.full((), n_und, device=device)


def _variable(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors for a kernel that takes any number of rows. Kernels compute alike whether or not autograd wants gradients."""
    variable = [tensor.detach() for tensor in tensors]
    for tensor in variable:
        mark_dynamic(tensor, 0)
    return variable


class _Compiled:
    """The compiled functions behind the interface. The compiler takes 0 and 1 for constants, so such few rows are computed eagerly."""

    def __init__(self, backend: Backend) -> None:
        def compiled(function: Callable[..., Any], **options: bool) -> Callable[..., Any]:
            # dynamic=False: no size becomes a variable of the kernel but the marked ones. Only inductor has options.
            return torch.compile(function, backend=backend, dynamic=False, options=dict(options) if backend == "inductor" else None)

        self._norm, self._norm_backward = compiled(_norm), compiled(_norm_backward)
        # Without this option, statistics would be those of the sum before it is rounded to bf16.
        self._add_and_norm = compiled(_add_and_norm, emulate_precision_casts=True)
        self._add_and_norm_backward = compiled(_add_and_norm_backward)
        self._swiglu, self._swiglu_backward = compiled(_swiglu), compiled(_swiglu_backward)
        self._norm_and_rotate, self._norm_and_rotate_backward = compiled(_norm_and_rotate), compiled(_norm_and_rotate_backward)
        self._rotate = compiled(_rotate)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if len(x) < 2:
            return EAGER.norm(x, weight, eps)
        return self._norm(*_variable(x), weight.detach(), eps)

    def norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs_x: bool, needs_weight: bool
    ) -> NormGradients:  # fmt: skip
        if len(x) < 2:
            return EAGER.norm_backward(grad, x, weight, scale, needs_x, needs_weight)
        grad, x, scale = _variable(grad.contiguous(), x, scale)
        return self._norm_backward(grad, x, weight.detach(), scale, needs_x, needs_weight)

    def add_and_norm(
        self, x: Tensor, added: Tensor, und: Tensor, gen: Tensor, n_und: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if len(x) < 2:
            return EAGER.add_and_norm(x, added, und, gen, n_und, eps)
        return self._add_and_norm(*_variable(x, added), und.detach(), gen.detach(), _count(n_und, x.device), eps)

    def add_and_norm_backward(
        self, grad_total: Tensor, grad_normed: Tensor, total: Tensor, und: Tensor, gen: Tensor, n_und: int, scale: Tensor, needs_x: bool,
        needs_weights: bool,
    ) -> AddAndNormGradients:  # fmt: skip
        if len(total) < 2:
            return EAGER.add_and_norm_backward(grad_total, grad_normed, total, und, gen, n_und, scale, needs_x, needs_weights)
        grad_total, grad_normed, total, scale = _variable(grad_total.contiguous(), grad_normed.contiguous(), total, scale)
        weights = und.detach(), gen.detach(), _count(n_und, total.device)
        return self._add_and_norm_backward(grad_total, grad_normed, total, *weights, scale, needs_x, needs_weights)

    def swiglu(self, gate_and_up: Tensor) -> Tensor:
        return EAGER.swiglu(gate_and_up) if len(gate_and_up) < 2 else self._swiglu(*_variable(gate_and_up))

    def swiglu_backward(self, grad: Tensor, gate_and_up: Tensor) -> Tensor:
        if len(grad) < 2:
            return EAGER.swiglu_backward(grad, gate_and_up)
        return self._swiglu_backward(*_variable(grad.contiguous(), gate_and_up))

    def norm_and_rotate(
        self, x: Tensor, und: Tensor, gen: Tensor, n_und: int, eps: float, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if len(x) < 2:
            return EAGER.norm_and_rotate(x, und, gen, n_und, eps, cos, sin)
        x, cos, sin = _variable(x, cos, sin)
        return self._norm_and_rotate(x, und.detach(), gen.detach(), _count(n_und, x.device), eps, cos, sin)

    def norm_and_rotate_backward(
        self, grad: Tensor, x: Tensor, und: Tensor, gen: Tensor, n_und: int, scale: Tensor, cos: Tensor, sin: Tensor, needs_weights: bool
    ) -> NormAndRotateGradients:
        if len(x) < 2:
            return EAGER.norm_and_rotate_backward(grad, x, und, gen, n_und, scale, cos, sin, needs_weights)
        grad, x, scale, cos, sin = _variable(grad.contiguous(), x, scale, cos, sin)
        count = _count(n_und, x.device)
        return self._norm_and_rotate_backward(grad, x, und.detach(), gen.detach(), count, scale, cos, sin, needs_weights)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        if len(x) < 2:
            return EAGER.rotate(x, cos, sin, sign)
        return self._rotate(*_variable(x, cos, sin), sign)


def compiled_kernels(backend: Backend = "inductor") -> Kernels:
    """Return the kernels as compiled functions; the first call of each compiles it. ``backend`` is a backend of ``torch.compile``."""
    made = _Compiled(backend)
    return Kernels(**{field.name: getattr(made, field.name) for field in fields(Kernels)})
