"""All noise of a training step, named by the image it is for: the same image gets the same noise on any rank, in any pack.

Nothing here draws from a generator that advances, so kill, resume, other sizes and other packing leave every number as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_bagel.data.keyed_random import keyed_generator, keyed_normal
from megatron_bagel.layout.pack import Pack, PackImage


def _name(pack: Pack, image: PackImage, what: str) -> tuple[str, int, int, str, int, str]:
    """Key of a draw for one VAE image. An editing step has an image twice, noised and clean: two encodings, two draws."""
    sample = pack.samples[image.sample]
    return sample.dataset, sample.index, sample.epoch, what, image.image, "noised" if image.noised else "clean"


def raw_timesteps(pack: Pack, seed: int) -> np.ndarray:
    """Raw timestep of every VAE image, float32 [images]: standard normal for noised ones, -inf (timestep 0) for clean ones.

    Frames of one clip share a draw.
    """
    raw = np.full(len(pack.latent_shapes), -np.inf, dtype=np.float32)
    for number, image in enumerate(pack.images_of("vae")):
        if image.noised:
            sample = pack.samples[image.sample]
            generator = keyed_generator(seed, sample.dataset, sample.index, sample.epoch, "timestep", image.draw)
            raw[number] = generator.standard_normal()
    return raw


def flow_noise(pack: Pack, seed: int, channels: int) -> torch.Tensor:
    """Noise of every VAE token, float32 [n_vae, channels] on the CPU; zeros for clean images, whose timestep is 0."""
    parts = [
        keyed_normal((image.tokens, channels), seed, *_name(pack, image, "flow")) if image.noised else torch.zeros(image.tokens, channels)
        for image in pack.images_of("vae")
    ]
    return torch.cat(parts) if parts else torch.zeros(0, channels)


def posterior_noise(
    pack: Pack, seed: int, z_channels: int, downsample: int, images: Sequence[PackImage] | None = None
) -> list[torch.Tensor]:
    """Noise to sample the autoencoder's posterior with, one float32 [z_channels, height / downsample, width / downsample] per image.

    ``images`` are all VAE images of the pack by default.
    """
    return [
        keyed_normal((z_channels, image.height // downsample, image.width // downsample), seed, *_name(pack, image, "posterior"))
        for image in (pack.images_of("vae") if images is None else images)
    ]
