"""The Transformer Engine spec, built against stand-ins of its three classes: sizes, marks and the whole layer's arithmetic.

Not run on a GPU here; what is checked is that the layer asks Transformer Engine for the right things and needs nothing else.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from megatron_bagel.model.specs import LOCAL, layer_spec, spec_modules
from tests.model.tiny import tiny_arch, tiny_config


class _Linear(nn.Linear):
    """transformer_engine.pytorch.Linear's constructor, torch's arithmetic."""

    def __init__(self, in_features, out_features, bias, init_method, params_dtype, parallel_mode):
        assert parallel_mode is None
        super().__init__(in_features, out_features, bias=bias, dtype=params_dtype)
        init_method(self.weight.data)


class _RMSNorm(nn.RMSNorm):
    def __init__(self, hidden_size, eps, params_dtype):
        super().__init__(hidden_size, eps=eps, dtype=params_dtype)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    module.Linear, module.RMSNorm, package.pytorch = _Linear, _RMSNorm, module
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)


@pytest.mark.usefixtures("single_rank", "stand_in")
@pytest.mark.parametrize("kind", ["Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"])
def test_same_weights_same_result_as_local(kind: str) -> None:
    from megatron.core.transformer.spec_utils import build_module

    from tests.model.tiny import random_context

    arch = tiny_arch(kind)
    config = tiny_config(arch)
    layers = [build_module(layer_spec(arch.llm, modules), config=config) for modules in (LOCAL, spec_modules("transformer_engine"))]
    state = {name: value for name, value in layers[0].state_dict().items() if value is not None and "_extra_state" not in name}
    missing, unexpected = layers[1].load_state_dict(state, strict=False)
    assert not unexpected and all("_extra_state" in name for name in missing)
    hidden, context = random_context(arch)
    torch.testing.assert_close(layers[1](hidden, packed_seq_params=context)[0], layers[0](hidden, packed_seq_params=context)[0])
    ours = {name: (tuple(p.shape), getattr(p, "partition_dim", None)) for name, p in layers[0].named_parameters()}
    theirs = {name: (tuple(p.shape), getattr(p, "partition_dim", None)) for name, p in layers[1].named_parameters()}
    assert ours == theirs


def test_absent_engine_is_named() -> None:
    if "transformer_engine" in sys.modules:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ValueError, match="transformer-engine"):
        spec_modules("transformer_engine")
    with pytest.raises(ValueError, match="unknown"):
        spec_modules("magic")
