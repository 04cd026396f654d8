"""Stands where the autoencoder stands in training when its posteriors were stored beforehand (`data/index/latent_cache.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import AutoEncoder


class CachedPosterior(nn.Module):
    """The part of `AutoEncoder` that training uses, over images that are posteriors already. It has no weights."""

    def __init__(self, arch: AutoencoderArch) -> None:
        super().__init__()
        self.arch = arch

    def encode_many(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and log variance, each [z, h, w], of posteriors [2 * z, h, w]."""
        return [tuple(image.chunk(2, dim=0)) for image in images]

    sample = AutoEncoder.sample
