# SPDX-License-Identifier: Apache-2.0
"""Layers whose kernels are not the eager ones add the attention and normalise the sum in one node, with the results of the plain path.

The kernels here compute as the eager ones do and only are another object, so nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.costs.freezing import FreezeSettings, freeze
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.model import layer
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.kernels.base import Kernels
from megatron_bagel.model.kernels.choice import use_kernels
from megatron_bagel.model.kernels.eager import EAGER
from megatron_bagel.model.layer import MoTLayer
from megatron_bagel.model.pack_context import PackContext
from megatron_bagel.model.sparse_mlp import set_global_tokens
from tests.distributed import run_ranks
from tests.model.test_bagel import KINDS, MIXED
from tests.model.test_sparse_experts import sparse_arch
from tests.model.tiny import EmptyPlan, microbatch, random_context, tiny_arch
from tests.strategies import SPEC

OTHER = replace(EAGER)
WORDS = [Sample("set", 0, 0, (Item("text", ids=np.arange(5, 9), loss=True),))]
PICTURE = [Sample("set", 0, 0, (Item("vae", image=0, height=32, width=32, loss=True),))]
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
WHOLE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def decoder(arch: BagelArch, kernels: Kernels, freeze_und: bool = False, **flags: Any) -> BagelModel:
    """A decoder with norms that hide no swap, the same for all kernels."""
    torch.manual_seed(0)
    config = transformer_config(arch.llm, MegatronArguments(**flags))
    model = build_decoder(arch, config, freeze_und=freeze_und)
    freeze(model, None, FreezeSettings(und=freeze_und))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    use_kernels(model, kernels)
    return model


def step(model: BagelModel, arch: BagelArch, plan: list[Sample], padding: int) -> dict[str, Tensor | None]:
    """Losses and gradients, those of replicated weights summed over tensor-parallel ranks."""
    batch = microbatch(plan, arch, SPEC)
    batch = microbatch(plan, arch, SPEC, padding=padding + (batch.length + padding) % 2)
    if arch.llm.sparse is not None:
        set_global_tokens(model, batch.n_und, batch.n_vae)
    ce, mse = model(batch)
    (ce.sum() + mse.sum()).backward()
    found: dict[str, Tensor | None] = {"ce": ce.detach(), "mse": mse.detach()}
    for name, weight in model.named_parameters():
        if getattr(weight, "sequence_parallel", False):
            dist.all_reduce(weight.grad)
        found[name] = weight.grad
    return found


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    for name, expected in theirs.items():
        found = ours[name]
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            # A key's bias has no true gradient, because softmax does not see it. It is part of this bias.
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def both(arch: BagelArch, plan: list[Sample], padding: int = 3, freeze_und: bool = False, **flags: Any) -> list[dict[str, Tensor | None]]:
    """A step with other kernels, and one with eager ones."""
    return [step(decoder(arch, kernels, freeze_und, **flags), arch, plan, padding) for kernels in (OTHER, EAGER)]


@pytest.mark.parametrize("freeze_und", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_and_pack(single_rank: None, kind: str, freeze_und: bool) -> None:
    """Also which weights get a gradient: those of an expert without rows do, frozen ones do not."""
    for plan in (MIXED, WORDS, PICTURE):
        assert_same(*both(tiny_arch(kind), plan, freeze_und=freeze_und))


@pytest.mark.parametrize("freeze_und", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("sparse", [{}, {"sparse_kinds": ("gen",)}, {"kind": KINDS[2]}], ids=["both", "gen", "shared"])
def test_sparse_experts(single_rank: None, sparse: dict[str, Any], freeze_und: bool) -> None:
    """The auxiliary losses reach the norm of a shared MLP through understanding tokens, even if those are frozen otherwise."""
    for recompute in ({}, SELECTIVE):
        assert_same(*both(sparse_arch(2, **sparse), MIXED, freeze_und=freeze_und, moe_aux_loss_coeff=0.1, **recompute))


@pytest.mark.parametrize("recompute", [SELECTIVE, WHOLE], ids=["selective", "full"])
def test_recomputation(single_rank: None, recompute: dict[str, Any]) -> None:
    assert_same(*both(tiny_arch(), MIXED, **recompute))


def on_rank(kind: str, sequence_parallel: bool, padding: int) -> None:
    flags = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel, **SELECTIVE}
    for plan in (MIXED, WORDS):
        assert_same(*both(tiny_arch(kind), plan, padding, **flags))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_tensor_parallel_ranks(kind: str) -> None:
    """With much padding, the second rank of sequence parallelism has no row of an expert but generation tokens, or only padding."""

    def all_cases() -> None:
        for sequence_parallel, padding in ((True, 0), (True, 40), (False, 3)):
            on_rank(kind, sequence_parallel, padding)

    run_ranks(all_cases, 2, parallel={"tensor_model_parallel_size": 2})


def test_each_rank_counts_its_own_rows() -> None:
    rows = torch.arange(12)
    for n_und, n_gen, ranks in [(5, 4, 2), (0, 9, 3), (9, 0, 4), (3, 3, 6), (12, 0, 2), (1, 11, 12)]:
        context = PackContext.of(n_und, n_gen, rows, EmptyPlan(), 8, 1e4, torch.float32)
        for first_slot in range(0, 12, 12 // ranks):
            own = rows[first_slot : first_slot + 12 // ranks]
            assert context.und_rows(len(own), first_slot) == len(context.rows_by_expert(own, first_slot)[0]) == int((own < n_und).sum())


def run_layer(changed: Callable[[MoTLayer], None] = lambda _: None, kernels: Kernels = OTHER, trained: bool = True) -> list[Tensor]:
    """The result of a decoder of one layer, and the gradient of its input."""
    arch = tiny_arch(num_hidden_layers=1)
    model = decoder(arch, kernels).requires_grad_(trained)
    changed(model.decoder.layers[0])
    hidden, context = random_context(arch)
    hidden.requires_grad_()
    out = model.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)
    out.square().sum().backward()
    return [out.detach(), hidden.grad]


def test_weights_that_do_not_train(single_rank: None) -> None:
    for ours, theirs in zip(run_layer(trained=False), run_layer(kernels=EAGER, trained=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_weights_are_read_in_a_call_of_their_module(single_rank: None) -> None:
    """Overlapped parameter gathering waits in hooks on calls."""
    called = []

    def watched(one: MoTLayer) -> None:
        for module in one.pre_mlp_layernorm.modules_of_both:
            module.register_forward_pre_hook(lambda *_: called.append(1))

    run_layer(watched)
    assert len(called) == 2


def test_eager_layers_and_norms_of_another_class_keep_their_path(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("the fused path")

    def foreign(one: MoTLayer) -> None:
        for expert in ("und", "gen"):
            setattr(one.pre_mlp_layernorm, expert, torch.nn.RMSNorm(32, eps=1e-6))

    monkeypatch.setattr(layer, "add_and_norm", refused)
    run_layer(kernels=EAGER)
    run_layer(foreign)
    with pytest.raises(AssertionError, match="the fused path"):
        run_layer()


class Passes(TorchDispatchMode):
    """Counts operations that are no views; a function of the kernels counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self.inside and not function.is_view:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def kernels(self) -> Kernels:
        """The eager kernels, of which each call counts as one pass."""

        def counted(name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.names.append(name)
                self.inside = True
                try:
                    return getattr(EAGER, name)(*args)
                finally:
                    self.inside = False

            return call

        return Kernels(**{field.name: counted(field.name) for field in fields(Kernels)})


def test_a_layer_takes_fewer_passes(single_rank: None) -> None:
    """One node replaces, each way: two norms and an addition."""

    def passes(kernels_of_layer: Kernels | None = None) -> list[str]:
        def built(one: MoTLayer) -> None:
            if kernels_of_layer is not None:
                one.kernels = kernels_of_layer
            counter.names.clear()

        with Passes() as counter:
            run_layer(built, counter.kernels())
        return counter.names

    passes()  # computes what later calls share
    apart, fused = passes(EAGER), passes()
    assert len(apart) - len(fused) == 4, (apart, fused)
    assert fused.count("add_and_norm") == fused.count("add_and_norm_backward") == 1
    assert [apart.count(name) - fused.count(name) for name in ("norm", "norm_backward", "aten::add.Tensor")] == [2, 2, 2]
