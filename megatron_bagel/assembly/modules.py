# SPDX-License-Identifier: Apache-2.0
"""Builds the modules that a rank trains: its part of the model, on its device, with what is frozen."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_bagel import platform
from megatron_bagel.assembly.meta_init import materialize, on_meta
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks
from megatron_bagel.costs.freezing import FreezeSettings, freeze
from megatron_bagel.encoders.autoencoder import MAX_PIXELS_PER_CALL, AutoEncoder, VaeKernels
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.cached_latents import CachedPosterior
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.lora import adapt_plain_linears
from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing


@dataclass(frozen=True)
class BuildSettings:
    """Settings that the modules of a run are built from.

    Attributes:
        megatron: Parallel sizes, recomputation, and the implementation of the decoder's modules.
        frozen: What does not train.
        autoencoder: The file of the autoencoder's weights; None if a latent cache replaces the encoder.
        check_weights: How many values of each of its weights are checked to be finite.
        vae_kernels: How the autoencoder encodes.
        vae_batch_pixels: The pixels of images of one size that it takes together.
    """

    megatron: MegatronArguments
    frozen: FreezeSettings
    autoencoder: Path | None
    check_weights: WeightCheck = "sampled"
    vae_kernels: VaeKernels = "plain"
    vae_batch_pixels: int = MAX_PIXELS_PER_CALL


@dataclass
class Modules:
    """The parts of a model on this rank, not wrapped yet. A pipeline stage has one decoder chunk, or several if it is interleaved.

    ``tower`` and ``autoencoder`` are on every rank. With ``--encoder-placement first_stage`` the ``tower`` is only on the first stage, and
    the ``autoencoder`` on the first, which reads latents, and the last, which predicts them.
    """

    decoder: list[BagelModel]
    tower: VisionTower | None
    autoencoder: AutoEncoder | CachedPosterior | None

    @property
    def named(self) -> dict[str, nn.Module]:
        """Return the trained parts by their names in checkpoints."""
        if len(self.decoder) == 1:
            named: dict[str, nn.Module] = {"decoder": self.decoder[0]}
        else:
            named = {f"decoder.{number}": chunk for number, chunk in enumerate(self.decoder)}
        return {**named, **({"vision": self.tower} if self.tower is not None else {})}


def build_modules(settings: BuildSettings, arch: BagelArch, tcfg: TransformerConfig, shapes_only: bool = False) -> Modules:
    """Build the modules of this rank on its device. Only the autoencoder has its weights.

    Args:
        settings: The settings of the modules.
        arch: The model.
        tcfg: The decoder's configuration for Megatron-Core.
        shapes_only: Whether tensors have no memory. No file of weights is read then.
    """
    device = torch.device("meta") if shapes_only else platform.device()
    initialize_kv_sharing(arch.llm.num_key_value_heads)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    on_all_ranks = encoders_on_all_ranks(settings.megatron)
    # Transformer Engine's layers always allocate on the GPU.
    with on_meta() if settings.megatron.transformer_impl == "local" else nullcontext():
        decoder = [_build_chunk(settings, arch, tcfg, vp_stage) for vp_stage in range(tcfg.virtual_pipeline_model_parallel_size or 1)]
        has_tower = arch.vit is not None and (first or on_all_ranks)
        tower = VisionTower(arch, recompute=settings.megatron.recompute_vit) if has_tower else None
        if tower is not None and settings.frozen.lora is not None:
            adapt_plain_linears(tower, settings.frozen.lora)
    autoencoder = None
    if arch.autoencoder is not None and (first or last or on_all_ranks):
        with on_meta() if shapes_only else nullcontext():
            autoencoder = AutoEncoder(arch.autoencoder) if shapes_only else _autoencoder(settings, arch.autoencoder).to(device)
    parts: list[nn.Module] = [*decoder] if tower is None else [*decoder, tower]
    for part in parts:
        materialize(part, device, tcfg.params_dtype)
    return Modules(decoder, tower, autoencoder)


def _autoencoder(settings: BuildSettings, arch: AutoencoderArch) -> AutoEncoder | CachedPosterior:
    """Return the autoencoder with its weights, or the cached posteriors if a latent cache replaces it."""
    if settings.autoencoder is None:
        return CachedPosterior(arch)
    autoencoder = load_autoencoder(settings.autoencoder, arch, check_weights=settings.check_weights)
    return autoencoder.use_kernels(settings.vae_kernels, settings.vae_batch_pixels)


def _build_chunk(settings: BuildSettings, arch: BagelArch, tcfg: TransformerConfig, number: int) -> BagelModel:
    """Build chunk ``number`` of this rank's pipeline stage."""
    interleaved = tcfg.virtual_pipeline_model_parallel_size is not None
    virtual_stage = {"ignore_virtual": False, "vp_stage": number} if interleaved else {}
    return build_decoder(
        arch,
        tcfg,
        pre_process=parallel_state.is_pipeline_first_stage(**virtual_stage),
        post_process=parallel_state.is_pipeline_last_stage(**virtual_stage),
        vp_stage=number if interleaved else None,
        freeze_und=settings.frozen.und,
        transformer_impl=settings.megatron.transformer_impl,
        vocab_divisor=settings.megatron.make_vocab_size_divisible_by,
        lora=settings.frozen.lora,
        ce_chunk_tokens=settings.megatron.ce_chunk_tokens,
        fused_kernels=settings.megatron.fused_kernels,
    )


def freeze_modules(frozen: FreezeSettings, modules: Modules) -> None:
    """Freeze what does not train, so that it takes no gradient and optimizer memory."""
    for number, chunk in enumerate(modules.decoder):
        freeze(chunk, modules.tower if number == 0 else None, frozen)
