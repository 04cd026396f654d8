# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels equal the eager ones, forward and backward, and packs of many lengths need one compilation of each.

Traced kernels (backend ``aot_eager``) show what the compiler is given, in a moment. One test compiles in earnest, in a process of its own,
because a process with the compiler's threads must not fork ranks for later tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bagel.config.kernel_rules import missing_for_compiling
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.fused import add_and_norm, norm_and_rotate, rms_norm, rotate, swiglu
from megatron_bagel.model.kernels.base import Kernels
from megatron_bagel.model.kernels.choice import kernels_named, use_kernels
from megatron_bagel.model.kernels.eager import EAGER
from megatron_bagel.model.norm import RMSNorm
from megatron_bagel.model.rope import rotary_table
from tests.distributed import run_ranks
from tests.model.test_bagel import MIXED
from tests.model.tiny import microbatch, tiny_arch, tiny_config
from tests.strategies import SPEC

EPS, DIM = 1e-6, 8
#: The largest relative difference in the L2 norm over a tensor.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
#: Rows of a pack, and those of the understanding expert.
PACKS = [(0, 0), (1, 0), (1, 1), (2, 1), (7, 0), (7, 3), (8, 8), (31, 1), (32, 31), (100, 64), (257, 200), (400, 7)]
#: Packs for which the compiler may sum the gradients of weights in another way.
LONG_PACKS = [(5000, 100), (4097, 4000), (9000, 9), (70000, 30000)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def traced(backend: Any = "aot_eager") -> Kernels:
    from megatron_bagel.model.kernels.compiled import compiled_kernels

    return compiled_kernels(backend)


def mixed(total: Tensor, normed: Tensor) -> Tensor:
    """One tensor of two results, with another gradient for each. These gradients are whole tensors in memory, as in a model."""
    return 2 * total + normed


def results(kernels: Kernels, rows: int, n_und: int, dtype: torch.dtype, trained: tuple[bool, bool] = (True, True)) -> dict[str, Tensor]:
    """What every function gives for a pack, and the gradients. ``trained`` says whether inputs and weights get one.

    Sizes are those of ``tiny_arch``, so that its layers use the same kernels.
    """
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    cos, sin = (table[:, None, None, : DIM // 2].to(dtype) for table in rotary_table(torch.arange(rows), DIM, 1e4))
    # Queries and keys are a slice of what also holds the values, as in a layer.
    cases: dict[str, tuple[Callable[..., Tensor], list[Tensor], list[Tensor]]] = {
        "norm": (lambda x, weight: rms_norm(x, weight, EPS, kernels), [random(rows, 32)], [random(32)]),
        "swiglu": (lambda x: swiglu(x, kernels), [random(rows, 96)], []),
        "rotate": (lambda x: rotate(x, cos, sin, kernels), [random(rows, 2, 4, DIM)[:, :, :3]], []),
        "both": (
            lambda x, und, gen: norm_and_rotate(x, und, gen, n_und, EPS, cos, sin, kernels),
            [random(rows, 2, 4, DIM)[:, :, :3]],
            [random(3, DIM), random(3, DIM)],
        ),
        "add and norm": (
            lambda x, added, und, gen: mixed(*add_and_norm(x, added, und, gen, n_und, EPS, kernels)),
            [random(rows, 32), random(rows, 32)],
            [random(32), random(32)],
        ),
    }
    found: dict[str, Tensor] = {}
    for name, (function, inputs, weights) in cases.items():
        leaves = [leaf.requires_grad_(train) for tensors, train in zip((inputs, weights), trained, strict=True) for leaf in tensors]
        out = function(*leaves)
        if out.requires_grad:
            (out * random(*out.shape)).sum().backward()
        found[name] = out.detach()
        found |= {f"{name}, gradient {number}": leaf.grad for number, leaf in enumerate(leaves) if leaf.grad is not None}
    return found


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert float((ours[name].double() - tensor.double()).norm()) <= tolerance * float(tensor.double().norm()), name


@pytest.mark.parametrize(
    ("dtype", "trained"),
    [*itertools.product([torch.float32], itertools.product([True, False], repeat=2)), (torch.bfloat16, (True, True))],
)
def test_equal_to_eager_whatever_trains(dtype: torch.dtype, trained: tuple[bool, bool]) -> None:
    kernels = traced()
    for rows, n_und in PACKS[:8]:
        assert_near(results(kernels, rows, n_und, dtype, trained), results(EAGER, rows, n_und, dtype, trained), TOLERANCES[dtype])


def test_packs_of_all_lengths_need_one_compilation_of_each_function() -> None:
    """Forward and backward of four functions, and rotation in two directions. No weight's value or gradient counts either."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    kernels = traced(counter)
    for rows, n_und in PACKS:
        results(kernels, rows, n_und, torch.float32)
    assert counter.frame_count == 10
    for (rows, n_und), grads in itertools.product(PACKS, (True, False)):
        with torch.set_grad_enabled(grads):
            results(kernels, rows + 1, n_und, torch.float32, (grads, grads))
    assert counter.frame_count == 10


def test_only_a_choice_of_compiled_kernels_changes_a_model(single_rank: None) -> None:
    arch = tiny_arch()
    norms = [module for module in build_decoder(arch, tiny_config(arch)).modules() if isinstance(module, RMSNorm)]
    assert norms and all(module.kernels is EAGER for module in norms) and kernels_named("eager") is EAGER
    model = build_decoder(arch, tiny_config(arch), fused_kernels="compiled")
    chosen = {id(module.kernels) for module in model.modules() if hasattr(module, "kernels")}
    assert len(chosen) == 1 and id(EAGER) not in chosen


def step(kernels: Kernels, **settings: Any) -> dict[str, Tensor]:
    """Losses and gradients of a small decoder on a pack."""
    torch.manual_seed(0)
    arch = tiny_arch()
    model = build_decoder(arch, tiny_config(arch, **settings))
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    use_kernels(model, kernels)
    ce, mse = model(microbatch(MIXED, arch, SPEC, padding=3))
    (ce.sum() + mse.sum()).backward()
    return {"ce": ce.detach(), "mse": mse.detach(), **{name: weight.grad for name, weight in model.named_parameters()}}


RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}


def near_in_a_step(kernels: Kernels, **settings: Any) -> None:
    ours, theirs = step(kernels, **settings), step(EAGER)
    losses = {"ce", "mse"}
    assert_near({name: ours.pop(name) for name in losses}, {name: theirs.pop(name) for name in losses}, 5e-7)
    for name, gradient in theirs.items():
        # A key's bias has no true gradient, because softmax does not see it. It is part of this bias.
        assert float((ours[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


@pytest.mark.parametrize("settings", [{}, RECOMPUTE], ids=["plain", "recompute"])
def test_a_whole_step_equals_eager(single_rank: None, settings: dict[str, Any]) -> None:
    near_in_a_step(traced(), **settings)


def the_norm_is_that_of_the_rounded_sum(kernels: Kernels) -> None:
    """The sum has the bits of a plain addition in bf16, and so has its norm but for a rounding of few elements."""
    generator = torch.Generator().manual_seed(0)
    x, added = torch.randn(2, 200, 256, generator=generator).bfloat16()
    weights = torch.randn(2, 256, generator=generator).bfloat16()
    total, normed, scale = kernels.add_and_norm(x, added, *weights, 77, EPS)
    _, expected, expected_scale = EAGER.add_and_norm(x, added, *weights, 77, EPS)
    assert torch.equal(total, x + added)
    assert_near({"scale": scale}, {"scale": expected_scale}, 1e-6)
    assert_near({"normed": normed}, {"normed": expected}, 5e-4)


def compiled_in_earnest() -> list[int]:
    """Compare kernels of torch's default compiler; return how many it compiled for usual packs, a long pack, and all packs in fp32."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    counters.clear()
    kernels = kernels_named("compiled")
    with config.patch(compile_threads=1):
        for rows, n_und in PACKS:
            assert_near(results(kernels, rows, n_und, torch.float32), results(EAGER, rows, n_und, torch.float32), 1e-6)
        near_in_a_step(kernels)
        compiled = [counters["stats"]["unique_graphs"]]
        for rows, n_und in LONG_PACKS:
            assert_near(results(kernels, rows, n_und, torch.float32), results(EAGER, rows, n_und, torch.float32), 1e-5)
            compiled.append(counters["stats"]["unique_graphs"])
        assert_near(results(kernels, 100, 64, torch.bfloat16), results(EAGER, 100, 64, torch.bfloat16), 1e-2)
        the_norm_is_that_of_the_rounded_sum(kernels)
        # Here swiglu is compiled once more for the backward pass, which does not know the mode that stands in for CUDA on a CPU.
        near_in_a_step(kernels, **RECOMPUTE)
    return [compiled[0], compiled[1], compiled[-1]]


@pytest.mark.skipif(missing_for_compiling(has_gpu=False) is not None, reason="this machine has no C++ compiler")
def test_kernels_of_the_compiler_equal_eager_ones() -> None:
    ((usual, long, all_packs),) = run_ranks(compiled_in_earnest, 1, parallel={})
    assert usual == 10 and long == all_packs <= 13
