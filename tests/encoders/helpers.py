# SPDX-License-Identifier: Apache-2.0
"""Small models shared by the encoder tests."""

from __future__ import annotations

import torch

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.vision_tower import VisionTower

SIDE = 8


def small_arch(rope: bool = False, select_layer: int = -2) -> BagelArch:
    """A BAGEL with a ViT of hidden 32, 3 layers, 4 heads, patch 14 and an 8x8 grid of learned positions."""
    llm = LLMArch(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    vit = ViTArch(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14 * SIDE, rope=rope)
    return BagelArch(llm=llm, vit=vit, vit_max_num_patch_per_side=SIDE, vit_select_layer=select_layer)


def small_tower(rope: bool = False, recompute: bool = False, select_layer: int = -2) -> VisionTower:
    """A tower whose every parameter is random, biases and norms too, so that none can hide a mistake."""
    tower = VisionTower(small_arch(rope, select_layer), recompute=recompute)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2, generator=generator)
    return tower


def small_autoencoder() -> AutoEncoder:
    """An autoencoder of ch 32, multipliers 1, 2, one residual block; downsamples by 2."""
    torch.manual_seed(0)
    return AutoEncoder(AutoencoderArch(ch=32, ch_mult=(1, 2), num_res_blocks=1)).eval().requires_grad_(False)
