# SPDX-License-Identifier: Apache-2.0
"""Adapters: the arithmetic of the PEFT library, which reads our files and writes ours, and names that follow the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.base_identity import BaseIdentity
from megatron_bagel.checkpoint.hf.load import load_weights
from megatron_bagel.checkpoint.hf.peft_folder import MergedSource, read_peft_folder, write_peft_folder
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch, LLMArch
from megatron_bagel.config.lora import LoraSettings, is_factor
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.batch import attention_plan
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.keyed_dropout import Draws
from megatron_bagel.model.specs import spec_modules
from tests.model.test_bagel import MIXED
from tests.model.test_te_modules import stand_in  # noqa: F401
from tests.model.tiny import microbatch, tiny_arch, tiny_config
from tests.strategies import SPEC

pytestmark = pytest.mark.usefixtures("single_rank")
LORA = LoraSettings(rank=3, alpha=6.0, experts="both")
BASE = BaseIdentity("a base made here", "model", "0")


class Wrapped(nn.Module):
    """The released model's name around transformers' decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.language_model = decoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.language_model(ids[None]).logits[0]


class Source:
    """Its weights under the released names."""

    path = "a Qwen made here"

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def read_into(self, name: str, out: torch.Tensor) -> None:
        out.copy_(self.tensors[name].reshape(out.shape))

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.tensors[name].narrow(dim, start, stop - start)


def peer_and_arch() -> tuple[Wrapped, BagelArch]:
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.Qwen2ForCausalLM(config)
    for name, parameter in peer.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    llm = LLMArch.from_hf(config.to_dict(), qk_norm=False, layer_module="Qwen2DecoderLayer")
    return Wrapped(peer), replace(tiny_arch(), llm=llm, autoencoder=None)


def built(source: object, arch: BagelArch, lora: LoraSettings | None) -> BagelModel:
    model = build_decoder(arch, tiny_config(arch), lora=lora)
    load_weights(source, WeightMap(arch), [model])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_factor(name))
    return model


def logits_of(model: BagelModel, ids: np.ndarray) -> torch.Tensor:
    pack = build_pack([Sample("set", 0, 0, (Item("text", ids=ids),))], SPEC)
    plan = attention_plan("sdpa", PackMask.of(pack), expert_order(pack), "cpu")
    hidden = model.embed_text(torch.from_numpy(pack.text_ids))
    return model.text_logits(model.run_decoder(hidden, len(hidden), torch.from_numpy(pack.position_ids), plan))


def released(model: BagelModel, adapter_map: AdapterMap, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Factors, or their gradients, by released names."""
    return {
        name: part.clone()
        for entry, parameter in adapter_map.adapter_entries([model])
        for name, part in zip(entry.hf, entry.unfuse((parameter.grad if gradients else parameter).detach()), strict=True)
    }


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:-1], tokens[1:])


def test_logits_gradients_and_updates_equal_those_of_peft(tmp_path: Path) -> None:
    """PEFT opens the file that we write; after three steps we open the file that it writes."""
    peft = pytest.importorskip("peft")
    peer, arch = peer_and_arch()
    model, adapter_map = built(Source(peer), arch, LORA), AdapterMap(arch, LORA)
    adapter_map.initialise([model], seed=1)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapter_map.adapter_entries([model]):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    write_peft_folder(tmp_path / "ours", LORA, list(adapter_map.entries.values()), released(model, adapter_map), BASE, torch.float32)
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "ours", is_trainable=True)
    ids = np.arange(5, 25)
    pack = build_pack([Sample("set", 0, 0, (Item("text", ids=ids),))], SPEC)
    tokens = torch.from_numpy(pack.text_ids)
    their_factors = {
        name.replace(".default", "").removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad
    }
    assert their_factors.keys() == released(model, adapter_map).keys()
    optimizers = [
        torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95)) for part in (model, theirs)
    ]
    for _ in range(3):
        ours, peers = logits_of(model, ids), theirs(tokens)
        torch.testing.assert_close(ours, peers, atol=1e-5, rtol=1e-5)
        for optimizer, logits in zip(optimizers, (ours, peers), strict=True):
            optimizer.zero_grad()
            loss_of(logits, tokens).backward()
        for name, gradient in released(model, adapter_map, gradients=True).items():
            torch.testing.assert_close(gradient, their_factors[name].grad, atol=1e-6, rtol=1e-5, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    for name, factor in released(model, adapter_map).items():
        torch.testing.assert_close(factor, their_factors[name].detach(), atol=1e-5, rtol=1e-5, msg=name)

    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_peft_folder(tmp_path / "theirs")
    assert adapter.settings(arch) == LORA and adapter.base is None
    again = built(Source(theirs.unload()), arch, LORA)
    adapter_map.fill([again], adapter.factors)
    merged = built(MergedSource(Source(peer), adapter), arch, None)
    with torch.no_grad():
        expected = logits_of(again, ids)
        torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits_of(merged, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"])
def test_a_merged_model_equals_the_adapted_one_in_every_layer_kind(kind: str) -> None:
    arch, lora = tiny_arch(kind), replace(LORA, targets=("qkv", "proj", "fc1", "fc2", "vae2llm", "llm2vae"), rslora=True)
    torch.manual_seed(0)
    adapted, plain = build_decoder(arch, tiny_config(arch), lora=lora), build_decoder(arch, tiny_config(arch))
    adapter_map = AdapterMap(arch, lora)
    for parameter in adapted.parameters():
        parameter.data.normal_(std=0.1)
    weights = dict(adapted.named_parameters())
    deltas = {name: _delta(adapter_map, adapted, name) for name in adapter_map.bases}
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(weights[name] + deltas.get(name, 0.0))
    batch = microbatch(MIXED, arch, SPEC)
    with torch.no_grad():
        for ours, theirs in zip(adapted(batch), plain(batch), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _delta(adapter_map: AdapterMap, model: BagelModel, name: str) -> torch.Tensor:
    """The product of the factors of one weight by their released parts."""
    entry, stem = adapter_map.bases[name], name.removesuffix("weight")
    down, up = (
        adapter_map.entries[f"{stem}{factor}.weight"].unfuse(model.get_parameter(f"{stem}{factor}.weight"))
        for factor in ("lora_A", "lora_B")
    )
    return entry.fuse([b @ a * adapter_map.lora.scale for a, b in zip(down, up, strict=True)])


def test_dropout_is_a_function_of_token_linear_and_channel() -> None:
    draws = Draws(torch.arange(1000) * 7919)
    kept = draws.kept(key=5, first_channel=0, channels=64, share=0.25)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert kept.float().mean(0).std() < 0.03 and kept.float().mean(1).std() < 0.1
    assert torch.equal(draws.kept(5, 32, 32, 0.25), kept[:, 32:])
    assert torch.equal(Draws(draws.words[10:20]).kept(5, 0, 64, 0.25), kept[10:20])
    assert not torch.equal(draws.kept(6, 0, 64, 0.25), kept)


@pytest.mark.usefixtures("stand_in")
def test_transformer_engine_linears_take_adapters() -> None:
    """Built against the stand-ins of test_te_modules.py, because the engine needs a GPU."""
    arch = tiny_arch()
    torch.manual_seed(0)
    models = [build_decoder(arch, tiny_config(arch), transformer_impl=name, lora=LORA) for name in ("local", "transformer_engine")]
    state = {name: value for name, value in models[0].state_dict().items() if value is not None and "_extra_state" not in name}
    models[1].load_state_dict(state, strict=False)
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        parameter.data.normal_(std=0.1)
        other.data.copy_(parameter)
    batch = microbatch(MIXED, arch, SPEC)
    for ours, theirs in zip(models[0](batch), models[1](batch), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert spec_modules("transformer_engine").adapted_column.cut == 0
