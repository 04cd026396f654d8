# SPDX-License-Identifier: Apache-2.0
"""A pack with its pixels, as the loader hands it out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
import torch

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.transforms import Normalization, RawImage, RawPatches
from megatron_bagel.layout.pack import Pack, PackImage


def stored_shape(image: PackImage, posterior: AutoencoderArch | None) -> tuple[int, int, int]:
    """Return the shape of what a source returns for an image.

    It is that of the transformed pixels, [3, height, width]. For a VAE image of a run with a latent cache it is that of mean and log
    variance of the autoencoder ``posterior``, [2 * z, height / downsample, width / downsample].
    """
    if posterior is None or image.kind != "vae":
        return 3, image.height, image.width
    return 2 * posterior.z_channels, image.height // posterior.downsample, image.width // posterior.downsample


@dataclass
class LoadedPack:
    """A pack with its pixels.

    Images of a kind share one buffer, because a tensor per image would cost a file handle each on its way from a worker.

    ``vit_patches`` [n_vit, patch * patch * 3] is in sequence order, ``vae_buffer`` holds the VAE images one after the other, and
    ``raw_timesteps`` float32 [VAE images] is -inf for clean ones. With a latent cache, VAE images are posteriors of the autoencoder
    ``posterior`` (``stored_shape``), ready as float32. Other images are 8-bit values until an encoder normalises them on its device,
    with the ``normalizations`` of the images that were read, by kind. ``is_read`` bool [images] marks the pack's images that were read
    (default: all); pixels of the others are absent. ``failures`` are the positions in the pack of samples that could not be read, with
    the reasons. Such a pack cannot be trained on until ``PackLoader.replaced`` has replaced these samples.
    """

    plan: PackPlan
    pack: Pack
    vit_patches: torch.Tensor
    vae_buffer: torch.Tensor
    raw_timesteps: np.ndarray
    posterior: AutoencoderArch | None = None
    is_read: np.ndarray | None = None
    failures: tuple[tuple[int, str], ...] = ()
    normalizations: Mapping[str, Sequence[Normalization]] = field(default_factory=dict)

    def read_mask(self, kind: str) -> list[bool]:
        """Return for each of the pack's images of one kind whether it was read."""
        is_read = np.ones(len(self.pack.images), dtype=bool) if self.is_read is None else self.is_read
        return [bool(is_image_read) for image, is_image_read in zip(self.pack.images, is_read, strict=True) if image.kind == kind]

    def _read(self, kind: str) -> list[PackImage]:
        return list(compress(self.pack.images_of(kind), self.read_mask(kind)))

    def vit_images(self) -> list[torch.Tensor | RawPatches]:
        """Return views [tokens, patch * patch * 3] of the ViT images that were read, in sequence order."""
        pieces = torch.split(self.vit_patches, [image.tokens for image in self._read("vit")])
        if self.vit_patches.dtype != torch.uint8:
            return list(pieces)
        return [RawPatches(piece, norm) for piece, norm in zip(pieces, self.normalizations["vit"], strict=True)]

    def vae_images(self) -> list[torch.Tensor | RawImage]:
        """Return views of the VAE images that were read in sequence order, each of its ``stored_shape``, or before normalisation."""
        shapes = [stored_shape(image, self.posterior) for image in self._read("vae")]
        pieces = torch.split(self.vae_buffer, [math.prod(shape) for shape in shapes])
        if self.vae_buffer.dtype != torch.uint8:
            return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        channels_last = [(height, width, channels) for channels, height, width in shapes]
        columns = zip(pieces, channels_last, self.normalizations["vae"], strict=True)
        return [RawImage(piece.view(shape), norm) for piece, shape, norm in columns]
