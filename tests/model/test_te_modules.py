# SPDX-License-Identifier: Apache-2.0
"""The Transformer Engine spec, built against stand-ins of its four classes: sizes, marks and the whole layer's arithmetic.

Not run on a GPU here; what is checked is that the layer asks Transformer Engine for the right things and needs nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import build_module
from torch import nn

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.model.pack_context import PackContext
from megatron_bagel.model.specs import LOCAL, layer_spec, spec_modules
from tests.model.tiny import random_context, tiny_arch, tiny_config


class _Linear(nn.Linear):
    """transformer_engine.pytorch.Linear's constructor and marks, torch's arithmetic."""

    def __init__(self, in_features, out_features, bias, init_method, params_dtype, parallel_mode):
        assert parallel_mode is None
        super().__init__(in_features, out_features, bias=bias, dtype=params_dtype)
        init_method(self.weight.data)
        # With parallel_mode=None it is whole for Transformer Engine, which marks it all the same.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)


class _RMSNorm(nn.RMSNorm):
    def __init__(self, hidden_size, eps, params_dtype):
        super().__init__(hidden_size, eps=eps, dtype=params_dtype)

    def forward(self, x):
        assert len(x), "Transformer Engine's kernel refuses a norm of no rows"
        return super().forward(x)


class _GroupedLinear(nn.Module):
    """transformer_engine.pytorch.GroupedLinear's constructor and weights by number; the first weight decides what has gradients."""

    calls: list[list[int]] = []

    def __init__(self, num_gemms, in_features, out_features, bias, params_dtype, parallel_mode, device):
        assert parallel_mode is None and device == "meta"
        super().__init__()
        for number in range(num_gemms):
            made = nn.Linear(in_features, out_features, bias=bias, dtype=params_dtype, device=device)
            setattr(self, f"weight{number}", made.weight)
            setattr(self, f"bias{number}", made.bias)

    def forward(self, inp, m_splits):
        _GroupedLinear.calls.append(m_splits)
        weights, biases = ([getattr(self, f"{name}{i}") for i in range(len(m_splits))] for name in ("weight", "bias"))
        if not weights[0].requires_grad:
            weights = [weight.detach() for weight in weights]
        groups = zip(inp.split(m_splits), weights, biases, strict=True)
        return torch.cat([nn.functional.linear(rows, weight, bias) for rows, weight, bias in groups])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    module.Linear, module.RMSNorm, module.GroupedLinear, package.pytorch = _Linear, _RMSNorm, _GroupedLinear, module
    monkeypatch.setattr(_GroupedLinear, "calls", [])
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    # Its classes derive from the engine's, so the module is imported anew with the stand-ins and forgotten with them.
    monkeypatch.delitem(sys.modules, "megatron_bagel.model.te_modules", raising=False)
    yield
    sys.modules.pop("megatron_bagel.model.te_modules", None)


def _layers(kind: str) -> tuple[BagelArch, list[nn.Module]]:
    """A local layer and one of Transformer Engine's parts, with the same weights."""
    arch = tiny_arch(kind)
    config = tiny_config(arch)
    layers = [build_module(layer_spec(arch.llm, modules), config=config) for modules in (LOCAL, spec_modules("transformer_engine"))]
    state = {name: value for name, value in layers[0].state_dict().items() if value is not None and "_extra_state" not in name}
    missing, unexpected = layers[1].load_state_dict(state, strict=False)
    assert not unexpected and all("_extra_state" in name for name in missing)
    return arch, layers


def _run(layer: nn.Module, hidden: torch.Tensor, context: PackContext) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = layer(hidden, packed_seq_params=context)[0]
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("single_rank", "stand_in")
@pytest.mark.parametrize(("n_und", "n_gen"), [(5, 4), (5, 0), (0, 4)])
@pytest.mark.parametrize(("kind", "grouped"), [("Qwen2MoTDecoderLayer", 4), ("Qwen2MoEDecoderLayer", 2), ("Qwen2DecoderLayer", 0)])
def test_same_weights_same_result_as_local(kind: str, grouped: int, n_und: int, n_gen: int) -> None:
    """What exists twice (in MoT: QKV, projection, both MLP matrices) is one grouped product of the two experts."""
    arch, layers = _layers(kind)
    ours, theirs = (_run(layer, *random_context(arch, n_und, n_gen)) for layer in layers)
    torch.testing.assert_close(theirs, ours)
    assert _GroupedLinear.calls == [[n_und, n_gen]] * grouped
    marks = [{name: (tuple(p.shape), getattr(p, "partition_dim", None)) for name, p in layer.named_parameters()} for layer in layers]
    assert marks[0] == marks[1]


@pytest.mark.usefixtures("single_rank", "stand_in")
def test_a_frozen_expert_is_not_grouped_with_one_that_trains() -> None:
    arch, layers = _layers("Qwen2MoTDecoderLayer")
    for layer in layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(".und." not in name)
    ours, theirs = (_run(layer, *random_context(arch)) for layer in layers)
    torch.testing.assert_close(theirs, ours)
    assert theirs[1] and all(".gen." in name for name in theirs[1]) and not _GroupedLinear.calls


@pytest.mark.usefixtures("single_rank", "stand_in")
def test_hooks_of_both_owners_run_before_their_weights_are_used() -> None:
    """Megatron's overlap of gathering with the forward pass waits in such hooks."""
    arch, (_, layer) = _layers("Qwen2MoTDecoderLayer")
    waited: list[tuple[str, int]] = []
    for name, module in layer.named_modules():
        if isinstance(module, _Linear):
            module.register_forward_pre_hook(lambda _module, _rows, name=name: waited.append((name, len(_GroupedLinear.calls))))
    hidden, context = random_context(arch)
    layer(hidden, packed_seq_params=context)
    linears = ("self_attention.{}.linear_qkv", "self_attention.{}.linear_proj", "mlp.{}.linear_fc1", "mlp.{}.linear_fc2")
    assert waited == [(linear.format(expert), number) for number, linear in enumerate(linears) for expert in ("und", "gen")]


@pytest.mark.usefixtures("single_rank", "stand_in")
@pytest.mark.parametrize(("n_und", "n_gen", "rows"), [(5, 4, [32, 32]), (33, 0, [64, 32]), (32, 64, [32, 64])])
def test_fp8_products_get_whole_multiples_of_rows(n_und: int, n_gen: int, rows: list[int]) -> None:
    """Rows of zeros, which leave results and gradients as they are."""
    arch = tiny_arch("Qwen2MoTDecoderLayer")
    config = tiny_config(arch)
    local = build_module(layer_spec(arch.llm, LOCAL), config=config)
    config.fp8 = "hybrid"  # the context of FP8 arithmetic is Megatron-Core's TransformerBlock's, not the layer's
    engine = build_module(layer_spec(arch.llm, spec_modules("transformer_engine")), config=config)
    engine.load_state_dict({name: value for name, value in local.state_dict().items() if value is not None}, strict=False)
    ours, theirs = (_run(layer, *random_context(arch, n_und, n_gen)) for layer in (local, engine))
    torch.testing.assert_close(theirs, ours)
    assert _GroupedLinear.calls == [rows] * 4


def test_absent_engine_is_named() -> None:
    if "transformer_engine" in sys.modules:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ValueError, match="transformer-engine"):
        spec_modules("transformer_engine")
    with pytest.raises(ValueError, match="unknown"):
        spec_modules("magic")
