# SPDX-License-Identifier: Apache-2.0
"""The decoder: backends agree, padding and order change nothing, frozen parts stay, text alone equals transformers' Qwen2 and Qwen3."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.flow import interpolate, patchify, shift_timesteps, unpatchify
from tests.model.tiny import microbatch, tiny_arch, tiny_config
from tests.strategies import SPEC, samples

KINDS = ["Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"]
pytestmark = pytest.mark.usefixtures("single_rank")
MIXED = [
    Sample("set", 0, 0, (
        Item("text", ids=np.arange(5, 9)),
        Item("vae", image=0, height=32, width=32),
        Item("vit", image=0, height=28, width=28),
        Item("text", ids=np.arange(9, 14), loss=True),
        Item("vae", image=1, height=32, width=48, loss=True),
    )),
    Sample("set", 1, 0, (Item("text", ids=np.arange(20, 26), loss=True), Item("vae", image=0, height=16, width=16, loss=True))),
]  # fmt: skip


def built(kind: str = KINDS[0], seed: int = 0, freeze_und: bool = False, **llm) -> tuple[BagelModel, object]:
    torch.manual_seed(seed)
    arch = tiny_arch(kind, **llm)
    model = build_decoder(arch, tiny_config(arch), freeze_und=freeze_und)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, arch


def run(model: BagelModel, batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ce, mse = model(batch)
    (ce.sum() + mse.sum()).backward()
    return ce.detach(), mse.detach(), {name: p.grad for name, p in model.named_parameters()}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=samples(), padding=st.integers(0, 9))
def test_sdpa_equals_dense_through_the_whole_model(plan: list[Sample], padding: int) -> None:
    model, arch = built()
    oracle, ours = (run(model, microbatch(plan, arch, SPEC, backend, padding)) for backend in ("dense", "sdpa"))
    for left, right in zip(oracle[:2], ours[:2], strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    for name, grad in oracle[2].items():
        assert (grad is None) == (ours[2][name] is None)
        if grad is not None:
            torch.testing.assert_close(grad, ours[2][name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    model, arch = built(kind)
    plain, padded = (run(model, microbatch(MIXED, arch, SPEC, padding=n)) for n in (0, 7))
    torch.testing.assert_close(plain[0], padded[0])
    torch.testing.assert_close(plain[1], padded[1])
    for name, grad in plain[2].items():
        torch.testing.assert_close(grad, padded[2][name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_see_each_other(kind: str) -> None:
    model, arch = built(kind)
    with torch.no_grad():
        both, _ = model(microbatch(MIXED[1:] + MIXED[1:], arch, SPEC))
        alone, _ = model(microbatch(MIXED[1:], arch, SPEC))
    torch.testing.assert_close(both[: len(alone)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_even_without_its_modality(kind: str) -> None:
    model, arch = built(kind)
    words = [Sample("set", 0, 0, (Item("text", ids=np.arange(5, 9), loss=True),))]
    picture = [Sample("set", 0, 0, (Item("vae", image=0, height=32, width=32, loss=True),))]
    for plan in (words, picture):
        _, _, grads = run(model, microbatch(plan, arch, SPEC))
        assert not [name for name, grad in grads.items() if grad is None]


def test_freeze_und_trains_the_generation_expert_and_the_head_only() -> None:
    free, arch = built()
    frozen, _ = built(freeze_und=True)
    frozen.load_state_dict(free.state_dict())
    batch = microbatch(MIXED, arch, SPEC)
    (ce, mse, _), (frozen_ce, frozen_mse, grads) = run(free, batch), run(frozen, batch)
    torch.testing.assert_close(ce, frozen_ce)
    torch.testing.assert_close(mse, frozen_mse)
    moved = {name for name, grad in grads.items() if grad is not None and grad.abs().max() > 0}
    assert "output_layer.weight" in moved and "decoder.layers.0.mlp.gen.linear_fc1.weight" in moved
    assert not [name for name in moved if ".und." in name or name.startswith("embedding")]


@pytest.mark.parametrize(("family", "own"), [("Qwen2", {}), ("Qwen3", {"head_dim": 24, "attention_bias": False})])
def test_text_equals_transformers_qwen(family: str, own: dict) -> None:
    import transformers

    from megatron_bagel.checkpoint.hf.load import load_weights
    from megatron_bagel.checkpoint.hf.weight_map import WeightMap

    _, arch = built("Qwen2DecoderLayer", qk_norm=False)
    llm = arch.llm
    config = getattr(transformers, f"{family}Config")(
        vocab_size=llm.vocab_size, hidden_size=llm.hidden_size, intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_hidden_layers, num_attention_heads=llm.num_attention_heads,
        num_key_value_heads=llm.num_key_value_heads, rms_norm_eps=llm.rms_norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta}, rope_theta=llm.rope_theta, **own,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name or "bias" in name:  # made as ones and zeros, which would hide a swap
                parameter.add_(torch.randn_like(parameter) * 0.1)
    llm = LLMArch.from_hf(config.to_dict(), qk_norm=family == "Qwen3", layer_module="Qwen2DecoderLayer")
    assert LLMArch.from_hf(llm.to_hf()) == llm
    arch = replace(arch, llm=llm, autoencoder=None)
    torch.manual_seed(0)
    model = build_decoder(arch, tiny_config(arch))
    load_weights(_Source(peer), WeightMap(arch), [model])
    ids = np.arange(5, 25)
    pack = build_pack([Sample("set", 0, 0, (Item("text", ids=ids),))], SPEC)
    from megatron_bagel.layout.mask import PackMask
    from megatron_bagel.model.batch import attention_plan

    order = expert_order(pack)
    tokens = torch.from_numpy(pack.text_ids)
    with torch.no_grad():
        plan = attention_plan("sdpa", PackMask.of(pack), order, "cpu")
        ours = model.text_logits(model.run_decoder(model.embed_text(tokens), len(tokens), torch.from_numpy(pack.position_ids), plan))
        theirs = peer(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


class _Source:
    """transformers' Qwen under the released layout's names."""

    path = "a Qwen made here"

    def __init__(self, peer: torch.nn.Module) -> None:
        self.tensors = {f"language_model.{name}": value.detach() for name, value in peer.state_dict().items()}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name].reshape(out.shape))

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name].narrow(dim, start, stop - start)

    def spec(self, name: str):
        return tuple(self.tensors[name].shape), self.tensors[name].dtype


def test_flow_parts() -> None:
    latent = torch.randn(4, 6, 8)
    tokens = patchify(latent, 2)
    assert tokens.shape == (12, 16)
    torch.testing.assert_close(unpatchify(tokens, 3, 4, 2), latent)
    t = shift_timesteps(torch.tensor([float("-inf"), 0.0]), 3.0)
    torch.testing.assert_close(t, torch.tensor([0.0, 0.75]))
    clean, noise = torch.randn(2, 2, 5)
    torch.testing.assert_close(interpolate(clean, noise, torch.tensor([0.0, 1.0])), torch.stack([clean[0], noise[1]]))
