# SPDX-License-Identifier: Apache-2.0
"""The image encoder: pixels become features before the pipeline schedule starts, and ViT gradients return after it.

All images of a rank's microbatches are encoded before the schedule, each at its own size. The schedule sees ViT features as leaves. When
all microbatches are done, the gradient of these leaves goes through the vision tower (``tower_pass.py``). The autoencoder is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_bagel.config.architecture import BagelArch, ViTArch
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.noise import flow_noise, posterior_noise
from megatron_bagel.data.transforms import RawImage, RawPatches, ready_images
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.cached_latents import CachedPosterior
from megatron_bagel.encoders.early_latents import EarlyLatents
from megatron_bagel.encoders.tower_pass import TowerImage, tower_pass
from megatron_bagel.layout.pack import Pack, PackImage
from megatron_bagel.model.batch import Features
from megatron_bagel.model.flow import patchify, shift_timesteps
from megatron_bagel.platform.device import to_device


@dataclass(frozen=True)
class ImageEncoderSettings:
    """Settings of the image encoder.

    ``seed`` keys all noise. ``pad_images`` pads each pack's images to their largest size before encoding, and ``bf16`` runs the
    autoencoder under bf16 autocast; the original does both. ``vit_chunk_tokens`` bounds the ViT tokens whose activations exist at one time;
    None keeps those of all images of a step.
    """

    seed: int
    pad_images: bool = False
    device: torch.device | str = "cpu"
    bf16: bool = False
    vit_chunk_tokens: int | None = None


class ImageEncoder:
    """Encodes the images of a replica's packs.

    ``tower`` and ``autoencoder`` are None without image understanding or generation, and on pipeline stages that do not read
    their output.
    """

    def __init__(
        self,
        arch: BagelArch,
        tower: torch.nn.Module | None,
        autoencoder: AutoEncoder | CachedPosterior | None,
        settings: ImageEncoderSettings,
    ) -> None:
        self.arch, self.tower, self.autoencoder, self.settings = arch, tower, autoencoder, settings
        self._tower_pass = tower_pass(settings.device, settings.vit_chunk_tokens)
        self._leaf: torch.Tensor | None = None
        self._early = EarlyLatents(settings.device)

    def encode(self, packs: Sequence[LoadedPack]) -> list[Features]:
        """Return the features of each pack, in sequence order of its tokens."""
        vit, latents = self._vit_features(packs), self._latents(packs)
        return [
            self._features(pack, vit[number] if vit else None, latents[number] if latents else None) for number, pack in enumerate(packs)
        ]

    def encode_ahead(self, packs: Sequence[LoadedPack]) -> None:
        """Queue this rank's latents of the packs of the next step beside the work that follows. ``encode`` takes them up.

        Not collective: nothing is exchanged before the packs' own step. Without an autoencoder, or without packs, nothing happens.
        """
        if packs and self.autoencoder is not None:
            autoencoder = self.autoencoder
            self._early.start(packs, lambda: self._encode_own(autoencoder, packs))

    def backward(self) -> None:
        """Send the gradient that the schedule left in the ViT features through the tower, if there is one."""
        leaf, self._leaf = self._leaf, None
        if self._tower_pass.waits_for_gradient and leaf is not None and leaf.grad is not None:
            self._tower_pass.backward(leaf.grad)

    def flow_noise(self, pack: Pack) -> torch.Tensor:
        """Return the noise of every VAE token, [n_vae, channels]. Override this and ``posterior_noise`` to replay recorded noise."""
        return flow_noise(pack, self.settings.seed, self.arch.latent_token_dim)

    def posterior_noise(self, pack: Pack, images: Sequence[PackImage] | None = None) -> list[torch.Tensor]:
        """Return the noise of the latents of ``images`` (default: all VAE images), each [z, H / downsample, W / downsample]."""
        ae = self.arch.autoencoder
        if ae is None:
            raise ValueError("this model has no autoencoder (visual_gen off), so it has no latents to draw noise for")
        return posterior_noise(pack, self.settings.seed, ae.z_channels, ae.downsample, images)

    def _vit_features(self, packs: Sequence[LoadedPack]) -> Sequence[torch.Tensor] | None:
        if self.tower is None or self.arch.vit is None:
            return None
        images = [image for pack in packs for image in tower_images(pack.pack, pack.vit_images())]
        features = self._tower_pass.encode(self.tower, images, patch_values(self.arch.vit))
        if self._tower_pass.waits_for_gradient:
            # Each microbatch's backward pass ends at this leaf, so the tower runs backward only once.
            self._leaf = features.requires_grad_()
        return torch.split(features, [len(pack.pack.vit_positions) for pack in packs])

    def _latents(self, packs: Sequence[LoadedPack]) -> Sequence[torch.Tensor] | None:
        """Return the latents of each pack, [n_vae, channels], or None without an autoencoder."""
        if self.autoencoder is None:
            return None
        return self._own_latents(self.autoencoder, packs)

    def _own_latents(self, autoencoder: AutoEncoder | CachedPosterior, packs: Sequence[LoadedPack]) -> list[torch.Tensor]:
        """Return the latents of the images that this rank encodes, by pack: those encoded ahead, if there are any."""
        early = self._early.take(packs)
        return self._encode_own(autoencoder, packs) if early is None else early

    def _encode_own(self, autoencoder: AutoEncoder | CachedPosterior, packs: Sequence[LoadedPack]) -> list[torch.Tensor]:
        """Encode the images of each pack that this rank encodes, [tokens, channels]. Not collective."""
        return [self._encoded(autoencoder, loaded, loaded.pack.images_of("vae"), loaded.vae_images()) for loaded in packs]

    def _encoded(
        self,
        autoencoder: AutoEncoder | CachedPosterior,
        loaded: LoadedPack,
        images: Sequence[PackImage],
        pixels: Sequence[torch.Tensor | RawImage],
    ) -> torch.Tensor:
        """Return the latents of VAE images of a pack, one after the other, [tokens, channels]."""
        device = self.settings.device
        if not images:
            return torch.zeros(0, self.arch.latent_token_dim, device=device)
        size = None
        if self.settings.pad_images:
            vae_images = loaded.pack.images_of("vae")
            size = max(image.height for image in vae_images), max(image.width for image in vae_images)
        noises = self.posterior_noise(loaded.pack, images)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.settings.bf16):
            return encode_latents(autoencoder, ready_images(pixels, device), noises, self.arch.latent_patch_size, size)

    def _features(self, loaded: LoadedPack, vit: torch.Tensor | None, latents: torch.Tensor | None) -> Features:
        pack, device = loaded.pack, self.settings.device
        if latents is None:
            # The model has no autoencoder, or a middle stage only counts the latents.
            zeros = torch.zeros(len(pack.vae_positions), self.arch.latent_token_dim, device=device)
            return Features(vit=vit, latents=zeros, noise=zeros, timesteps=torch.zeros(len(zeros)))
        raw = torch.from_numpy(np.repeat(loaded.raw_timesteps, pack.latent_shapes.prod(1)))
        return Features(
            vit=vit,
            latents=latents,
            noise=to_device(self.flow_noise(pack), device),
            timesteps=shift_timesteps(raw, self.arch.timestep_shift),
        )


def patch_values(vit: ViTArch) -> int:
    """Return the numbers of a flattened patch."""
    return vit.num_channels * vit.patch_size**2


def tower_images(pack: Pack, pixels: Sequence[torch.Tensor | RawPatches]) -> list[TowerImage]:
    """Return the ViT images of a pack, in sequence order, with the pixels of each, [tokens, patch * patch * 3]."""
    ids = torch.from_numpy(pack.vit_position_ids).split([image.tokens for image in pack.images_of("vit")])
    return [TowerImage(*image) for image in zip(pixels, ids, strict=True)]


@torch.no_grad()
def encode_latents(
    autoencoder: AutoEncoder | CachedPosterior,
    images: Sequence[torch.Tensor],
    noises: Sequence[torch.Tensor],
    patch: int,
    padded_to: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Encode images [3, H, W] in [-1, 1] as latent tokens, [tokens, patch * patch * z].

    Args:
        autoencoder: The autoencoder.
        images: The images.
        noises: Noise that samples each posterior, [z, H / downsample, W / downsample].
        patch: The side of a latent patch.
        padded_to: Height and width that the images are zero-padded to before encoding; the result is cropped to each image. This
            changes the latents (docs/differences.md).

    Raises:
        ValueError: If stored posteriors are to be padded. Their images were encoded at their own sizes.
    """
    if padded_to is None:
        moments = autoencoder.encode_many(images)
    elif isinstance(autoencoder, CachedPosterior):
        raise ValueError("stored posteriors cannot be padded; use --vae_encode_padded False with --latent_cache")
    else:
        moments = autoencoder.encode_padded(images, padded_to)
    tokens = [
        patchify(autoencoder.sample(mean.float(), logvar.float(), to_device(noise, mean.device)), patch)
        for (mean, logvar), noise in zip(moments, noises, strict=True)
    ]
    return torch.cat(tokens)
