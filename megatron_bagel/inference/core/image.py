# SPDX-License-Identifier: Apache-2.0
"""Draws a picture from a context: Euler steps of the flow from noise (t = 1) to data (t = 0) under guidance, then decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.inference.core.context import GuidedContext
from megatron_bagel.inference.core.denoising_loop import DenoisingLoop
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.model.flow import unpatchify

# Called with (step, t, x_t, guided velocity) of every Euler step; both [tokens of all pictures, channels].
StepObserver = Callable[[int, float, Tensor, Tensor], None]


@torch.no_grad()
def generate_latents(
    engine: Engine,
    contexts: Sequence[GuidedContext],
    grids: Sequence[tuple[int, int]],
    noise: Sequence[Tensor],
    sampling: ImageSampling,
    observe: StepObserver | None = None,
) -> list[Tensor]:
    """Draw a picture per context as latent tokens [rows * columns, channels].

    The contexts are not extended; ``Engine.add_latents`` reads a picture into a context.

    Args:
        engine: The model.
        contexts: The contexts.
        grids: The (rows, columns) of each picture's tokens.
        noise: The starting point of each picture, [rows * columns, channels].
        sampling: How pictures are drawn.
        observe: Called after every step.
    """
    loop = DenoisingLoop(engine, contexts, grids, noise, sampling)
    for step, time in enumerate(loop.times):
        before = loop.x_t if observe is None else loop.x_t.clone()
        loop.step()
        if observe is not None:
            observe(step, time, before, loop.velocity.clone())
    return list(loop.x_t.split([rows * columns for rows, columns in grids]))


def decode_picture(engine: Engine, tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Decode latent tokens [rows * columns, channels] to uint8 [H, W, 3]."""
    return decode_latents(engine.need_autoencoder(), tokens, grid, engine.arch.latent_patch_size)


@torch.no_grad()
def decode_latents(autoencoder: AutoEncoder, tokens: Tensor, grid: tuple[int, int], patch: int) -> np.ndarray:
    """Decode latent tokens [rows * columns, channels] to uint8 [H, W, 3]; values are truncated to integers, as in the original."""
    latent = unpatchify(tokens, *grid, patch)
    parameter = next(autoencoder.parameters())
    pixels = autoencoder.decode(latent[None].to(parameter))[0].float()
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
