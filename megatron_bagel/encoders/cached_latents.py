# SPDX-License-Identifier: Apache-2.0
"""Replaces the autoencoder in training when its posteriors come from a latent cache (``data/index/latent_cache.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import sampled_latent


class CachedPosterior(nn.Module):
    """The part of ``AutoEncoder`` that training uses, for images that already are posteriors. It has no weights."""

    def __init__(self, arch: AutoencoderArch) -> None:
        super().__init__()
        self.arch = arch

    def encode_many(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Cut posteriors [2 * z, h, w] into mean and log variance, each [z, h, w]."""
        return [(mean, logvar) for mean, logvar in (image.chunk(2, dim=0) for image in images)]

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        """Return the latent that the model sees, as ``AutoEncoder.sample`` does."""
        return sampled_latent(self.arch, mean, logvar, noise)
