# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine itself: a layer of its parts gives what the local one gives, and a run trains with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from torch import nn

from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.model.pack_context import PackContext
from megatron_bagel.model.specs import LOCAL, layer_spec, spec_modules
from tests.gpu.commands import train
from tests.model.tiny import EmptyPlan, tiny_arch
from tests.runs import make_world

pytest.importorskip("transformer_engine.pytorch")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


def layers(kind: str, bf16: bool) -> list[nn.Module]:
    """A local layer and one of Transformer Engine's parts, with the same weights."""
    arch = tiny_arch(kind, **SIZES)
    config = transformer_config(arch.llm, bf16=bf16, on_cpu=False)
    made = [build_module(layer_spec(arch.llm, modules), config=config) for modules in (LOCAL, spec_modules("transformer_engine"))]
    state = {name: value for name, value in made[0].state_dict().items() if value is not None and "_extra_state" not in name}
    missing, unexpected = made[1].load_state_dict(state, strict=False)
    assert not unexpected and all("_extra_state" in name for name in missing)
    return [layer.cuda() for layer in made]


def both_ways(layer: nn.Module, n_und: int, n_gen: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, arch = n_und + n_gen, tiny_arch(**SIZES)
    hidden = torch.randn(tokens, 1, arch.llm.hidden_size, generator=generator).to("cuda", dtype).requires_grad_()
    positions = torch.arange(tokens, device="cuda")
    context = PackContext.of(n_und, n_gen, positions, EmptyPlan(), arch.llm.head_dim, 1e4, dtype)
    out = layer(hidden, packed_seq_params=context)[0]
    (out * torch.randn(out.shape, generator=generator).to("cuda", dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "hidden": hidden.grad, **gradients}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n_und", "n_gen"), [(48, 80), (64, 0), (0, 64)])
@pytest.mark.parametrize("kind", ["Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"])
def test_same_weights_same_result_as_local(kind: str, n_und: int, n_gen: int, dtype: torch.dtype) -> None:
    """Relative to the L2 norm of each tensor: 1e-2, as cuBLAS may use TF32 for fp32 in Transformer Engine, and bf16 rounds more."""
    ours, theirs = (both_ways(layer, n_und, n_gen, dtype) for layer in layers(kind, dtype is torch.bfloat16))
    for name, local in ours.items():
        scale = float(local.float().norm())
        there = theirs.get(name)
        if there is None:
            assert scale == 0, name
            continue
        assert float((there.float() - local.float()).norm()) <= 1e-2 * scale, name


def test_a_run_trains_with_it(tmp_path: Path) -> None:
    """The same losses as the local layers within bf16's rounding, and its checkpoint continues with the local ones."""
    world = make_world(tmp_path / "world")
    local = train(world, tmp_path / "local", bf16=True)
    there = train(world, tmp_path / "te", bf16=True, transformer_impl="transformer_engine", total_steps=2)
    assert [record["loss"] for record in there] == pytest.approx([record["loss"] for record in local[:2]], rel=1e-2)
    onward = train(world, tmp_path / "te", bf16=True)
    assert [record["loss"] for record in onward] == pytest.approx([record["loss"] for record in local], rel=2e-2)
