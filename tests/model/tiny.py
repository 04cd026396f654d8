# SPDX-License-Identifier: Apache-2.0
"""A decoder small enough for any test, in every layer kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import Pack, build_pack
from megatron_bagel.model.batch import Features, MicroBatch, make_microbatch
from megatron_bagel.model.pack_context import PackContext


class EmptyPlan:
    """Attention that mixes nothing, to test what surrounds it."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        return q.flatten(1) + v.repeat_interleave(q.shape[1] // v.shape[1], 1).flatten(1)


def tiny_arch(kind: str = "Qwen2MoTDecoderLayer", **llm: Any) -> BagelArch:
    """Hidden 32, 2 layers, 4 heads in 2 groups."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    llm_arch = LLMArch(**{**sizes, "vocab_size": 64, "layer_module": kind, **llm})
    return BagelArch(llm_arch, autoencoder=AutoencoderArch(ch=32, ch_mult=(1, 1, 1, 1), z_channels=4), max_latent_size=16)


def tiny_config(arch: BagelArch, **settings: Any) -> TransformerConfig:
    """Megatron's configuration for an architecture."""
    llm = arch.llm
    return TransformerConfig(
        num_layers=llm.num_hidden_layers, hidden_size=llm.hidden_size, num_attention_heads=llm.num_attention_heads,
        num_query_groups=llm.num_key_value_heads, kv_channels=llm.head_dim, ffn_hidden_size=llm.intermediate_size,
        gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, add_qkv_bias=llm.attention_bias, normalization="RMSNorm", layernorm_epsilon=llm.rms_norm_eps,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, calculate_per_token_loss=True,
        gradient_accumulation_fusion=False, bias_dropout_fusion=False, init_method_std=0.1, **settings,
    )  # fmt: skip


def random_context(arch: BagelArch, n_und: int = 5, n_gen: int = 4) -> tuple[torch.Tensor, PackContext]:
    """Hidden states [9, 1, h] and a context of both experts."""
    hidden = torch.randn(n_und + n_gen, 1, arch.llm.hidden_size, generator=torch.Generator().manual_seed(0))
    return hidden, PackContext.of(n_und, n_gen, torch.arange(n_und + n_gen), EmptyPlan(), arch.llm.head_dim, 1e4, torch.float32)


def random_features(pack: Pack, arch: BagelArch, seed: int = 0) -> Features:
    """Features of the right shapes: noised images at random timesteps, clean ones at 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(pack.vae_positions)
    noised = torch.zeros(pack.sequence_length, dtype=torch.bool)
    noised[torch.from_numpy(pack.mse_positions)] = True
    t = torch.rand(tokens, generator=generator) * noised[torch.from_numpy(pack.vae_positions)]
    vit = torch.randn(len(pack.vit_positions), arch.llm.hidden_size, generator=generator).requires_grad_()
    latents, noise = torch.randn(2, tokens, arch.latent_token_dim, generator=generator)
    return Features(vit, latents, noise, t)


def microbatch(plan: list, arch: BagelArch, spec, backend: str = "sdpa", padding: int = 0) -> MicroBatch:
    """A pack of random features in its expert-sorted order."""
    pack = build_pack(plan, spec)
    order = expert_order(pack, length=pack.sequence_length + padding)
    return make_microbatch(pack, order, random_features(pack, arch), backend)
