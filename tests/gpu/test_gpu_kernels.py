# SPDX-License-Identifier: Apache-2.0
"""Compiled elementwise kernels on a GPU: the numbers of the eager ones on a CPU, few compilations for all packs, fewer kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import device_events
from megatron_bagel.model.fused import add_and_norm, norm_and_rotate, rms_norm, rotate, swiglu
from megatron_bagel.model.kernels.base import Kernels
from megatron_bagel.model.kernels.choice import kernels_named
from megatron_bagel.model.kernels.eager import EAGER
from megatron_bagel.model.rope import rotary_table

DIM, HIDDEN, FFN, EPS = 128, 512, 1024, 1e-6
#: Rows of a pack, and those of the understanding expert.
PACKS = [(0, 0), (1, 1), (2, 1), (100, 64), (257, 0), (1000, 1000), (4096, 1025), (4097, 4095)]
FUNCTIONS = ("norm", "add_and_norm", "swiglu", "rotate", "norm_and_rotate")


def graph(kernels: Kernels, name: str, rows: int, n_und: int, device: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """One function of a pack, and the tensors that get gradients. The numbers are the same on every device."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def leaf(*shape: int) -> Tensor:
        return random(*shape).requires_grad_()

    cos, sin = (table[:, None, None, : DIM // 2].to(device, dtype) for table in rotary_table(torch.arange(rows), DIM, 1e4))
    if name == "norm":
        x, weight = leaf(rows, HIDDEN), leaf(HIDDEN)
        return lambda: rms_norm(x, weight, EPS, kernels), [x, weight]
    if name == "add_and_norm":
        x, added, und, gen = leaf(rows, HIDDEN), leaf(rows, HIDDEN), leaf(HIDDEN), leaf(HIDDEN)

        def mixed() -> Tensor:
            total, normed = add_and_norm(x, added, und, gen, n_und, EPS, kernels)
            return 2 * total + normed  # another gradient for each

        return mixed, [x, added, und, gen]
    if name == "swiglu":
        x = leaf(rows, 2 * FFN)
        return lambda: swiglu(x, kernels), [x]
    x = leaf(rows, 2, 9, DIM)  # queries and keys are a slice of what also holds the values
    if name == "rotate":
        return lambda: rotate(x[:, :, :8], cos, sin, kernels), [x]
    und, gen = leaf(8, DIM), leaf(8, DIM)
    return lambda: norm_and_rotate(x[:, :, :8], und, gen, n_und, EPS, cos, sin, kernels), [x, und, gen]


def both_ways(kernels: Kernels, name: str, rows: int, n_und: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients, in fp64 on the host."""
    function, leaves = graph(kernels, name, rows, n_und, device, dtype)
    out = function()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out.backward(weights)
    return [x.detach().double().cpu() for x in (out, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_cpu(name: str, dtype: torch.dtype) -> None:
    """In the L2 norm over each tensor: fp32 to 1e-5, as sums over thousands of rows have another order; bf16 within 1 %."""
    kernels = kernels_named("compiled")
    for rows, n_und in PACKS:
        ours = both_ways(kernels, name, rows, n_und, "cuda", dtype)
        for mine, other in zip(ours, both_ways(EAGER, name, rows, n_und, "cpu", dtype), strict=True):
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            assert float((mine - other).norm()) <= tolerance * float(other.norm()), (rows, n_und)


def test_a_sum_has_the_bits_of_an_addition_and_its_norm_is_that_of_these_bits() -> None:
    """The compiler would else keep the sum in fp32 until it is stored, and the backward pass would see another one."""
    generator = torch.Generator().manual_seed(0)
    x, added, *weights = (torch.randn(4096, HIDDEN, generator=generator).bfloat16() for _ in range(4))
    weights = [weight[0] for weight in weights]
    on_gpu = [tensor.cuda() for tensor in (x, added, *weights)]
    total, normed, scale = kernels_named("compiled").add_and_norm(*on_gpu, 1025, EPS)
    _, expected, expected_scale = EAGER.add_and_norm(x, added, *weights, 1025, EPS)
    assert torch.equal(total.cpu(), x + added)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-5, atol=0)
    assert float((normed.cpu().double() - expected.double()).norm()) <= 5e-4 * float(expected.double().norm())


def test_other_packs_compile_nothing() -> None:
    """The compiler may choose another way to sum over many rows, but not for each pack."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = []
    for more_rows in (0, 1, 33, 1000):
        for rows, n_und in [*PACKS, (40000, 9000)]:
            for name in FUNCTIONS:
                both_ways(kernels_named("compiled"), name, rows + more_rows, n_und, "cuda", torch.bfloat16)
        compiled.append(counters["stats"]["unique_graphs"])
    # Forward and backward of four functions, rotation in two directions; some of them for several ranges of rows.
    assert 10 <= compiled[0] <= 30 and compiled[-1] == compiled[1], compiled


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fewer_kernels(name: str) -> None:
    """Kernels that run on the device for a result and its gradients."""
    counts = []
    for kernels in (EAGER, kernels_named("compiled")):
        function, _ = graph(kernels, name, 4096, 1025, "cuda", torch.bfloat16)
        weights = torch.ones_like(function())
        function().backward(weights)  # compiles, and makes what later calls share
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function().backward(weights)
            torch.cuda.synchronize()
        counts.append(len(device_events(profile.events())))
    assert 0 < counts[1] < counts[0], counts
