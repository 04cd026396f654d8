# SPDX-License-Identifier: Apache-2.0
"""Sparse experts on one process: against transformers' Qwen3-MoE with the same weights, and what never enters routing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights, initialise
from megatron_bagel.checkpoint.hf.load import entries_of
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, SparseArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.batch import MicroBatch, attention_plan
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.sparse_mlp import set_global_tokens
from tests.model.test_bagel import MIXED
from tests.model.tiny import microbatch
from tests.strategies import SPEC

pytestmark = pytest.mark.usefixtures("single_rank")
AUX, Z = 0.02, 0.001


def sparse_arch(layers: int = 3, kind: str = "Qwen2MoTDecoderLayer", **sparse: Any) -> BagelArch:
    """Hidden 32, 4 heads in 2 groups, 6 experts of width 24 of which 2 serve a token."""
    settings = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **sparse}
    llm = LLMArch(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        layer_module=kind, attention_bias=False, kv_channels=16, initializer_range=0.2, sparse=SparseArch(**settings),
    )  # fmt: skip
    return BagelArch(llm, autoencoder=AutoencoderArch(ch=32, ch_mult=(1, 1, 1, 1), z_channels=4), max_latent_size=16)


def config_of(arch: BagelArch, **flags: Any) -> Any:
    """Megatron's configuration with both auxiliary losses."""
    return transformer_config(arch.llm, MegatronArguments(**{"moe_aux_loss_coeff": AUX, "moe_z_loss_coeff": Z, **flags}))


def peer_model(arch: BagelArch, stacked: bool, folder: Path) -> Qwen3MoeForCausalLM:
    """transformers' model with norms that hide no swap, saved in ``folder`` with stacked or with single experts."""
    llm, sparse = arch.llm, arch.llm.sparse
    assert sparse is not None
    config = Qwen3MoeConfig(
        vocab_size=llm.vocab_size, hidden_size=llm.hidden_size, intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_hidden_layers, num_attention_heads=llm.num_attention_heads, head_dim=llm.head_dim,
        num_key_value_heads=llm.num_key_value_heads, rms_norm_eps=llm.rms_norm_eps, rope_theta=llm.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta}, tie_word_embeddings=False, initializer_range=0.2,
        num_experts=sparse.num_experts, num_experts_per_tok=sparse.num_experts_per_tok, norm_topk_prob=sparse.norm_topk_prob,
        moe_intermediate_size=sparse.moe_intermediate_size, mlp_only_layers=[1], output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    peer = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "gate.weight" in name:  # made as zeros
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    peer.save_pretrained(folder)
    tensors = {name: value.detach().contiguous() for name, value in peer.state_dict().items()}
    save_file(tensors if stacked else single_experts(tensors), folder / "model.safetensors", {"format": "pt"})
    return peer


def single_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names of Qwen3-MoE's released folders, one tensor per expert and projection."""
    single = {}
    for name, value in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            single[name] = value
            continue
        prefix = name.rsplit(".", 1)[0]
        for number, expert in enumerate(value):
            if name.endswith("down_proj"):
                single[f"{prefix}.{number}.down_proj.weight"] = expert.contiguous()
                continue
            for projection, part in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                single[f"{prefix}.{number}.{projection}.weight"] = part.contiguous()
    return single


def text_logits(model: BagelModel, ids: np.ndarray) -> torch.Tensor:
    """The logits of one causal text."""
    pack = build_pack([Sample("set", 0, 0, (Item("text", ids=ids),))], SPEC)
    tokens, plan = torch.from_numpy(pack.text_ids), attention_plan("sdpa", PackMask.of(pack), expert_order(pack), "cpu")
    set_global_tokens(model, len(tokens), 0)
    return model.text_logits(model.run_decoder(model.embed_text(tokens), len(tokens), torch.from_numpy(pack.position_ids), plan))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_text_equals_transformers_qwen3_moe(tmp_path: Path, stacked: bool, norm_topk_prob: bool) -> None:
    """Logits, choices of the routers, both auxiliary losses, and the gradients of everything together."""
    peer = peer_model(sparse_arch(norm_topk_prob=norm_topk_prob), stacked, tmp_path)
    llm = LLMArch.from_hf(json.loads((tmp_path / "config.json").read_text()), qk_norm=True, layer_module="Qwen2MoTDecoderLayer")
    assert LLMArch.from_hf(llm.to_hf()) == llm and llm.sparse is not None
    assert llm.sparse.mlp_only_layers == (1,) and llm.sparse.norm_topk_prob is norm_topk_prob
    arch = replace(sparse_arch(), llm=llm)
    model = build_decoder(arch, config_of(arch))
    InitialWeights.of(arch, 0, tmp_path, None, copy_init_moe=True).fill([model])
    ids = np.arange(5, 35)
    routers = [layer.mlp.und.router for layer in model.decoder.layers if hasattr(layer.mlp, "expert_kinds")]
    choices: list[torch.Tensor] = []
    for router in routers:
        router.register_forward_hook(lambda module, args, output: choices.append(output[1]))
    ours = text_logits(model, ids)
    theirs = peer(torch.from_numpy(build_pack([Sample("set", 0, 0, (Item("text", ids=ids),))], SPEC).text_ids)[None])
    torch.testing.assert_close(ours, theirs.logits[0], atol=1e-5, rtol=1e-5)
    labels = torch.arange(len(ours)) % llm.vocab_size
    sparse = llm.sparse
    balance = [load_balancing_loss_func((logits,), sparse.num_experts, 2) / 2 for logits in theirs.router_logits]
    z = [logits.logsumexp(-1).square().mean() for logits in theirs.router_logits]
    (F.cross_entropy(theirs.logits[0], labels) + AUX * sum(balance) + Z * sum(z)).backward()
    F.cross_entropy(ours, labels).backward()
    for router, chosen, logits, balance_loss, z_loss in zip(routers, choices, theirs.router_logits, balance, z, strict=True):
        expected_choices = F.one_hot(logits.topk(2).indices, sparse.num_experts).sum(1)
        assert torch.equal(chosen.long(), expected_choices)  # of every token
        sums = router.statistics.sums(torch.device("cpu"))
        assert sums[: sparse.num_experts].tolist() == expected_choices.sum(0).tolist()
        torch.testing.assert_close(sums[-2:], torch.stack([balance_loss, z_loss]).double(), atol=1e-6, rtol=1e-5)
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    gradients = {f"language_model.{name}": value for name, value in single_experts(gradients).items()}
    compared = 0
    for entry, parameter in entries_of([model], WeightMap(arch)):
        if entry.hf[0] in gradients:
            compared += 1
            expected = entry.fuse([gradients[name] for name in entry.hf])
            torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-5, msg=lambda text, n=entry.name: f"{n}: {text}")
    assert compared == len(WeightMap(replace(arch, llm=replace(llm, layer_module="Qwen2DecoderLayer"), autoencoder=None)).entries)


def losses_of(model: BagelModel, batch: MicroBatch, tokens: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """Gradients by name, with the auxiliary losses, for a global batch of this one pack or of ``tokens``."""
    model.zero_grad()
    set_global_tokens(model, *(tokens or (batch.n_und, batch.n_vae)))
    ce, mse = model(batch)
    (ce.sum() + mse.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def spread_model(arch: BagelArch, **flags: Any) -> BagelModel:
    model = build_decoder(arch, config_of(arch, **flags))
    initialise([model], WeightMap(arch), 1)
    return model


@pytest.mark.parametrize("kind", ["Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_padding_and_the_other_kind_are_not_routed(kind: str, dispatcher: str) -> None:
    arch = sparse_arch(2, kind, mlp_only_layers=(1,), shared_expert_intermediate_size=8, shared_expert_gate=True)
    model = spread_model(arch, moe_token_dispatcher_type=dispatcher)
    routers = model.decoder.layers[0].mlp.expert_kinds()
    plain = losses_of(model, microbatch(MIXED, arch, SPEC))
    loads = {name: router.statistics.sums(torch.device("cpu")).clone() for name, router in routers.items()}
    batch = microbatch(MIXED, arch, SPEC, padding=7)
    padded = losses_of(model, batch)
    tokens = {"und": batch.n_und, "gen": batch.n_vae, "both": batch.n_und + batch.n_vae}
    for name, router in routers.items():
        sums = router.statistics.sums(torch.device("cpu"))
        torch.testing.assert_close(sums, loads[name])
        assert sums[:6].sum() == 2 * tokens[name] and sums[6] == tokens[name] and sums[7] == 0
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, padded[name], atol=1e-5, rtol=1e-5, msg=name)


def test_dispatchers_agree_and_recomputation_changes_nothing() -> None:
    arch = sparse_arch(2, sparse_kinds=("gen",))
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    flags: list[dict[str, Any]] = [{}, {"moe_token_dispatcher_type": "allgather"}, recompute]
    models = [spread_model(arch, **choice) for choice in flags]
    first, *others = [losses_of(model, microbatch(MIXED, arch, SPEC)) for model in models]
    for other in others:
        for name, gradient in first.items():
            torch.testing.assert_close(gradient, other[name], atol=1e-6, rtol=1e-5, msg=name)
    sums = [model.decoder.layers[0].mlp.gen.router.statistics.sums(torch.device("cpu")) for model in models]
    torch.testing.assert_close(sums[0], sums[2])


def test_losses_of_two_packs_add_up_to_a_mean_over_their_tokens() -> None:
    """Half the share of a doubled global batch is half the gradient of the auxiliary losses."""
    arch = sparse_arch(1)
    model, batches = spread_model(arch), [microbatch(MIXED, arch, SPEC) for _ in range(3)]
    name = "decoder.layers.0.mlp.gen.router.weight"
    whole = losses_of(model, batches[0])[name]
    half = losses_of(model, batches[1], (2 * batches[1].n_und, 2 * batches[1].n_vae))[name]
    without = losses_of(spread_model(arch, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0), batches[2])[name]
    assert (whole - without).abs().max() > 1e-4
    torch.testing.assert_close(half - without, (whole - without) / 2, atol=1e-6, rtol=1e-3)


def test_a_pack_without_generation_tokens_and_frozen_understanding() -> None:
    arch = sparse_arch(2)
    text = [Sample("set", 0, 0, (Item("text", ids=np.arange(5, 25), loss=True),))]
    model = spread_model(arch)
    gradients = losses_of(model, microbatch(text, arch, SPEC), (20, 9))
    experts = [g for name, g in gradients.items() if ".mlp.gen." in name]
    assert experts and not any(gradient.any() for gradient in experts)
    frozen = build_decoder(arch, config_of(arch), freeze_und=True)
    initialise([frozen], WeightMap(arch), 1)
    gradients = losses_of(frozen, microbatch(MIXED, arch, SPEC))
    assert not any(g.any() for name, g in gradients.items() if ".mlp.und." in name)
    assert any(g.any() for name, g in gradients.items() if ".mlp.gen.experts." in name)


def test_capacity_drops_tokens_and_counts_them() -> None:
    arch = sparse_arch(1)
    model = spread_model(arch, moe_expert_capacity_factor=0.5)
    batch = microbatch(MIXED, arch, SPEC)
    losses_of(model, batch)
    sums = model.decoder.layers[0].mlp.und.router.statistics.sums(torch.device("cpu"))
    capacity = -(-2 * batch.n_und // 6 // 2)
    assert sums[:6].max() <= capacity + 1 and sums[7] > 0
    assert sums[:6].sum() + sums[7] == 2 * batch.n_und
