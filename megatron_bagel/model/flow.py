# SPDX-License-Identifier: Apache-2.0
"""Rectified flow as pure functions: from clean latents and noise to the decoder's input and its target. Nothing is drawn here."""

from __future__ import annotations

import torch


def shift_timesteps(raw: torch.Tensor, shift: float) -> torch.Tensor:
    """Map raw normal draws to timesteps in [0, 1]: t = sigmoid(raw), then s t / (1 + (s - 1) t). A raw -inf (clean image) gives 0."""
    t = torch.sigmoid(raw)
    return shift * t / (1 + (shift - 1) * t)


def interpolate(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return x_t = (1 - t) x_0 + t eps for ``clean`` and ``noise`` [tokens, channels] at ``t`` [tokens]."""
    t = t[:, None]
    return (1 - t) * clean + t * noise


def target_velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the velocity d x_t / d t = eps - x_0, which points from data to noise."""
    return noise - clean


def patchify(latent: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut a latent [z, H, W] into tokens [H/p * W/p, p * p * z]; a token's vector runs over (patch row, patch column, channel).

    Rows and columns past a multiple of ``patch`` are left out.
    """
    z, rows, cols = latent.shape[0], latent.shape[1] // patch, latent.shape[2] // patch
    patches = latent[:, : rows * patch, : cols * patch].reshape(z, rows, patch, cols, patch)
    return patches.permute(1, 3, 2, 4, 0).reshape(rows * cols, patch * patch * z)


def unpatchify(tokens: torch.Tensor, rows: int, cols: int, patch: int) -> torch.Tensor:
    """Invert ``patchify``: tokens [rows * cols, p * p * z] become a latent [z, rows * p, cols * p]."""
    z = tokens.shape[-1] // (patch * patch)
    patches = tokens.reshape(rows, cols, patch, patch, z)
    return patches.permute(4, 0, 2, 1, 3).reshape(z, rows * patch, cols * patch)
