# SPDX-License-Identifier: Apache-2.0
"""A tiny BAGEL decoder and vision tower under DDP with optimizer and EMA; gradients are made up, keyed by step and name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_bagel.checkpoint.dist.load import load_checkpoint
from megatron_bagel.checkpoint.dist.saver import Saver
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.checkpoint.hf.initial_weights import initialise
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.build import build_decoder
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, optimizer_step, wrap_ddp
from tests.checkpoint.hf.test_weight_map import tiny_arch


def transformer_config(arch: BagelArch, bf16: bool) -> TransformerConfig:
    llm, dtype = arch.llm, torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=llm.num_hidden_layers,
        hidden_size=llm.hidden_size,
        num_attention_heads=llm.num_attention_heads,
        num_query_groups=llm.num_key_value_heads,
        kv_channels=llm.head_dim,
        ffn_hidden_size=llm.intermediate_size,
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=llm.rms_norm_eps,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
    )


def tiny_run(
    distributed_optimizer: bool = True, bf16: bool = False, seed: int = 3, frozen: str = "", arch: BagelArch | None = None
) -> Trained:
    arch = arch or tiny_arch()
    config = transformer_config(arch, bf16)
    modules: dict[str, nn.Module] = {"decoder": build_decoder(arch, config)}
    if arch.vit is not None:
        modules["vision"] = VisionTower(arch)
    if bf16:
        modules = {name: module.bfloat16() for name, module in modules.items()}
    initialise(list(modules.values()), WeightMap(arch), seed)
    for module in modules.values():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    settings = OptimizerSettings(lr=1e-2, bf16=bf16, use_distributed_optimizer=distributed_optimizer)
    wrapped = dict(zip(modules, wrap_ddp(config, list(modules.values()), settings), strict=True))
    optimizer = build_optimizer(list(wrapped.values()), settings)
    return Trained(wrapped, arch, optimizer, ShardedEma(wrapped, optimizer, 0.9))


def train_step(trained: Trained, step: int) -> None:
    """One update. Every rank contributes the same share of a gradient that depends on step and name only."""
    world = torch.distributed.get_world_size()
    for module in trained.modules.values():
        module.zero_grad_buffer()
    trained.optimizer.zero_grad()
    for wrapped in trained.modules.values():
        for name, parameter in wrapped.module.named_parameters():
            if parameter.requires_grad:
                digest = hashlib.sha256(f"{step}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) / world)
    for module in trained.modules.values():
        module.finish_grad_sync()
    assert optimizer_step(trained.optimizer).updated
    trained.ema.update()


def weights(trained: Trained) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{name}": parameter.detach().clone()
        for prefix, module in trained.modules.items()
        for name, parameter in module.module.named_parameters()
    }


def averages(trained: Trained) -> dict[str, torch.Tensor]:
    return {f"ema.{name}": tensor.clone() for name, tensor in trained.ema.named_full_tensors()}


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train_and_save(directory: Path, options: dict, steps: int = 2, more: int = 2) -> dict[str, torch.Tensor]:
    """Train, save after `steps`, go on for `more`; returns the final weights and averages."""
    trained = tiny_run(**options)
    for step in range(steps):
        train_step(trained, step)
    Saver(directory).save(steps, trained, {"note": steps, "ratio": 0.1})
    for step in range(steps, steps + more):
        train_step(trained, step)
    return weights(trained) | averages(trained)


def load_and_train(folder: Path, options: dict, more: int = 2) -> tuple[int, dict, dict[str, torch.Tensor]]:
    """Load into a run that was initialised otherwise and go on; returns step, run state, final weights and averages."""
    trained = tiny_run(**options, seed=99)
    step, state = load_checkpoint(folder, trained)
    for number in range(step, step + more):
        train_step(trained, number)
    return step, state, weights(trained) | averages(trained)
