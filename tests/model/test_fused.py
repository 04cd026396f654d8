# SPDX-License-Identifier: Apache-2.0
"""Fused parts equal their plain formulas, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_bagel.model.fused import linear, norm_and_rotate, rms_norm, rotate, swiglu, torch_rms_norm
from megatron_bagel.model.rope import rotary_table

EPS = 1e-6


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None, None] + torch.cat((-second, first), -1) * sin[:, None, None]


def agree(fused, plain, *inputs: torch.Tensor) -> None:
    results = []
    for function in (fused, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_fused_parts_equal_plain_ones(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    agree(lambda x, w: rms_norm(x, w, EPS), plain_norm, random(rows, 16), random(16))
    agree(lambda x, w: torch_rms_norm(x, w, EPS), plain_norm, random(rows, 16), random(16))
    agree(swiglu, lambda x: F.silu(x[:, :6]) * x[:, 6:], random(rows, 12))
    cos, sin = rotary_table(torch.arange(rows), 8, 1e4)
    half = [table[:, None, None, :4] for table in (cos, sin)]
    agree(linear, F.linear, random(rows, 8), random(5, 8), random(5))
    agree(lambda x: rotate(x, *half), lambda x: plain_rotate(x, cos, sin), random(rows, 2, 3, 8))
    for n_und in {0, rows // 2, rows}:

        def plain(x: torch.Tensor, und: torch.Tensor, gen: torch.Tensor, n: int = n_und) -> torch.Tensor:
            return plain_rotate(torch.cat([plain_norm(x[:n], und), plain_norm(x[n:], gen)]), cos, sin)

        fused = lambda x, und, gen, n=n_und: norm_and_rotate(x, und, gen, n, EPS, *half)  # noqa: E731
        agree(fused, plain, random(rows, 2, 3, 8), random(3, 8), random(3, 8))


def test_bfloat16_keeps_its_dtype_and_fp32_statistics() -> None:
    x = torch.randn(4, 64, dtype=torch.bfloat16) * 100
    weight = torch.ones(64, dtype=torch.bfloat16)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain_norm(x.float(), weight.float()), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs_x, needs_weight", [(True, True), (True, False), (False, True)])
def test_the_norm_of_gpus_rounds_before_the_weight_and_keeps_only_its_input(
    dtype: torch.dtype, needs_x: bool, needs_weight: bool
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = ((torch.randn(shape, generator=generator) * 3).to(dtype) for shape in ((5, 64), (64,), (5, 64)))
    kept: list[torch.Tensor] = []
    results = []
    for function in (lambda x, w: torch_rms_norm(x, w, EPS), lambda x, w: F.rms_norm(x.float(), w.shape, None, EPS).to(x.dtype) * w):
        leaves = [x.clone().requires_grad_(needs_x), weight.clone().requires_grad_(needs_weight)]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            out = function(*leaves)
        if not results:
            assert sum(tensor.nbytes for tensor in kept) == x.nbytes + weight.nbytes
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    (ours, *our_grads), (theirs, *their_grads) = results
    assert torch.equal(ours, theirs) and len(our_grads) == len(their_grads) == needs_x + needs_weight
    for mine, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other)


def test_weight_gradients_go_straight_to_megatrons_buffer() -> None:
    x, y = torch.randn(6, 8), torch.randn(3, 8)
    plain, buffered = (torch.nn.Parameter(torch.linspace(-1, 1, 40).reshape(5, 8)) for _ in range(2))
    buffered.main_grad, buffered.grad_added_to_main_grad = torch.zeros(5, 8), False
    for batch in (x, y):  # two microbatches add up
        linear(batch, plain).square().sum().backward()
        linear(batch, buffered).square().sum().backward()
        assert buffered.grad_added_to_main_grad and buffered.grad is not None
        buffered.grad = None  # as DDP's hook does
    torch.testing.assert_close(buffered.main_grad, plain.grad)


def test_a_buffer_of_another_dtype_is_left_to_megatron() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 8, dtype=torch.bfloat16))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(5, 8), False
    linear(torch.randn(6, 8, dtype=torch.bfloat16), weight).sum().backward()
    assert not weight.grad_added_to_main_grad and bool(weight.grad.any()) and not weight.main_grad.any()
