# SPDX-License-Identifier: Apache-2.0
"""All noise of a training step, keyed by its image: the same image gets the same noise on any rank and in any pack.

Nothing here draws from a generator that advances. A kill, a resume, other parallel sizes or other packing therefore change no number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_bagel.data.keyed_random import keyed_generator, keyed_normal, keyed_word
from megatron_bagel.layout.pack import Pack, PackImage


def _draw_name(pack: Pack, image: PackImage, purpose: str) -> tuple[str, int, int, str, int, str]:
    """Return the key of a draw for one VAE image. An editing step encodes an image twice, noised and clean, with separate draws."""
    sample = pack.samples[image.sample]
    return sample.dataset, sample.index, sample.epoch, purpose, image.image, "noised" if image.noised else "clean"


def raw_timesteps(pack: Pack, seed: int) -> np.ndarray:
    """Return the raw timestep of every VAE image, float32 [images]: standard normal if noised, -inf (timestep 0) if clean.

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
    """Return the noise of every VAE token, float32 [n_vae, channels] on the CPU; zeros for clean images, whose timestep is 0."""
    parts = [
        keyed_normal((image.tokens, channels), seed, *_draw_name(pack, image, "flow"))
        if image.noised
        else torch.zeros(image.tokens, channels)
        for image in pack.images_of("vae")
    ]
    return torch.cat(parts) if parts else torch.zeros(0, channels)


def posterior_noise(
    pack: Pack, seed: int, z_channels: int, downsample: int, images: Sequence[PackImage] | None = None
) -> list[torch.Tensor]:
    """Return the noise that samples the autoencoder's posterior, float32 [z_channels, height / downsample, width / downsample] each.

    ``images`` defaults to all VAE images of the pack.
    """
    return [
        keyed_normal((z_channels, image.height // downsample, image.width // downsample), seed, *_draw_name(pack, image, "posterior"))
        for image in (pack.images_of("vae") if images is None else images)
    ]


def token_words(pack: Pack, seed: int) -> np.ndarray:
    """Return a random word for every token, int64 [sequence_length], keyed by its sample and its place there: adapters drop inputs by it.

    A rank may hold any tokens of a pack, in any order, and a sample may be in any pack.
    """
    starts = np.repeat(np.cumsum(pack.sample_lens) - pack.sample_lens, pack.sample_lens)
    places = np.arange(pack.sequence_length) - starts
    words = np.zeros(pack.sequence_length, dtype=np.uint64)
    numbers = pack.sample_numbers(np.arange(pack.sequence_length))
    for number in np.unique(numbers):
        sample, tokens = pack.samples[number], numbers == number
        words[tokens] = keyed_word(seed, sample.dataset, sample.index, sample.epoch, "adapter dropout", places[tokens])
    return words.view(np.int64)
