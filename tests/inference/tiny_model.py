# SPDX-License-Identifier: Apache-2.0
"""A complete model folder in the released layout, small and random, so that generation is tested without any download."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_bagel.checkpoint.hf.folder import WeightFile, write_folder
from megatron_bagel.checkpoint.hf.initial_weights import initial_value
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import save_autoencoder
from megatron_bagel.model.positions import sincos_2d
from megatron_bagel.sample_world.tokenizer_training import train_tokenizer

VOCABULARY = 320
TEXTS = ["a red circle on a green background.", "make the square blue", "what color is it?", "the circle is red"] * 4


def tiny_arch() -> BagelArch:
    """Latent tokens of 8 pixels, pictures up to 64 pixels, vision up to 56."""
    return BagelArch(
        llm=LLMArch(32, 48, 2, 4, 2, VOCABULARY, layer_module="Qwen2MoTDecoderLayer", initializer_range=0.3),
        vit=ViTArch(32, 48, 3, 2, image_size=56),
        autoencoder=AutoencoderArch(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4),
        max_latent_size=8,
        vit_max_num_patch_per_side=4,
    )


def write_tiny_model(folder: Path, arch: BagelArch | None = None, dtype: str = "fp32") -> Path:
    """Random weights, a trained tokenizer and an autoencoder under ``folder``; returns the model folder."""
    arch = arch or tiny_arch()
    train_tokenizer(TEXTS, folder / "tokenizer", VOCABULARY - 8)
    ae_file = None
    if arch.autoencoder is not None:
        torch.manual_seed(0)
        ae_file = folder / "autoencoder" / "ae.safetensors"
        save_autoencoder(AutoEncoder(arch.autoencoder), ae_file)
    entries = WeightMap(arch).entries

    def weight(name: str) -> torch.Tensor:
        value = initial_value(entries[name], arch, seed=1)
        if name.startswith("llm2vae"):  # zero in a fresh model, which would make every velocity equal
            return torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) * 0.3
        return value

    return write_folder(folder / "hf", arch, {"ema": WeightFile(weight, dtype)}, sincos_2d, folder / "tokenizer", ae_file)
