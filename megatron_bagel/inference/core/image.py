# SPDX-License-Identifier: Apache-2.0
"""Draws a picture from a context: Euler steps of the flow from noise (t = 1) to data (t = 0) under guidance, then decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.inference.core.context import GuidedContext
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.inference.core.guidance import Guidance, guide, time_grid
from megatron_bagel.model.flow import unpatchify

# Called with (step, t, x_t, guided velocity) of every Euler step; both [tokens of all pictures, channels].
StepObserver = Callable[[int, float, Tensor, Tensor], None]


@dataclass(frozen=True)
class ImageSampling:
    """How pictures are drawn. ``num_timesteps`` points in time make ``num_timesteps - 1`` steps.

    ``couple_batch`` computes the norms of global renormalisation over all pictures of a call, as the original does. Without it, a
    picture does not depend on the others of its batch.
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    guidance: Guidance = field(default_factory=Guidance)
    couple_batch: bool = False

    def __post_init__(self) -> None:
        time_grid(self.num_timesteps, self.timestep_shift)


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
    sizes = [rows * columns for rows, columns in grids]
    position_ids = torch.cat([engine.latent_position_ids(*grid) for grid in grids])
    x_t = torch.cat([n.to(engine.device, torch.float32) for n in noise])
    times = time_grid(sampling.num_timesteps, sampling.timestep_shift, engine.device)
    for step, (t, dt) in enumerate(zip(times[:-1].tolist(), (times[:-1] - times[1:]).tolist(), strict=True)):
        pictures = engine.embed_latents(x_t, t, position_ids).split(sizes)
        v_t = _guided_velocity(engine, contexts, pictures, t, sampling)
        if observe is not None:
            observe(step, t, x_t, v_t)
        x_t = x_t - v_t * dt
    return list(x_t.split(sizes))


def _guided_velocity(
    engine: Engine, contexts: Sequence[GuidedContext], pictures: Sequence[Tensor], t: float, sampling: ImageSampling
) -> Tensor:
    """Return the guided velocity [tokens of all pictures, channels]; one pass computes all views of all contexts."""
    guidance = sampling.guidance
    text, images = guidance.needs(t)
    views = [[c.main for c in contexts]]
    if text:
        views.append([c.without_text for c in contexts])
    if images:
        views.append([c.without_images for c in contexts])
    velocities = engine.velocities([c for view in views for c in view], list(pictures) * len(views))
    count = len(contexts)
    view_velocities = [velocities[i * count : (i + 1) * count] for i in range(len(views))]
    if sampling.couple_batch:
        view_velocities = [[torch.cat(view)] for view in view_velocities]
    scales = guidance.scales_at(t)
    guided = [guide(v[0], v[1] if text else None, v[2] if images else None, scales, guidance) for v in zip(*view_velocities, strict=True)]
    return torch.cat(guided)


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
