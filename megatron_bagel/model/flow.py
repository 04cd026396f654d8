"""Rectified flow: from clean latents and noise to what the decoder reads and what it should predict. Draws nothing itself."""

from __future__ import annotations

import torch


def shift_timesteps(raw: torch.Tensor, shift: float) -> torch.Tensor:
    """Raw normal draws -> t in [0, 1]: t = sigmoid(raw), then s t / (1 + (s - 1) t); -inf (clean) gives 0."""
    t = torch.sigmoid(raw)
    return shift * t / (1 + (shift - 1) * t)


def interpolate(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps; ``clean`` and ``noise`` [tokens, channels], ``t`` [tokens]."""
    t = t[:, None]
    return (1 - t) * clean + t * noise


def target_velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """d x_t / d t = eps - x_0, pointing from data to noise."""
    return noise - clean


def patchify(latent: torch.Tensor, patch: int) -> torch.Tensor:
    """Latent [z, H, W] -> tokens [H/p * W/p, p * p * z]; a token's vector runs over (patch row, patch column, channel).

    Rows and columns past a multiple of ``patch`` are left out.
    """
    z, rows, cols = latent.shape[0], latent.shape[1] // patch, latent.shape[2] // patch
    cut = latent[:, : rows * patch, : cols * patch].reshape(z, rows, patch, cols, patch)
    return cut.permute(1, 3, 2, 4, 0).reshape(rows * cols, patch * patch * z)


def unpatchify(tokens: torch.Tensor, rows: int, cols: int, patch: int) -> torch.Tensor:
    """Inverse of ``patchify``: tokens [rows * cols, p * p * z] -> latent [z, rows * p, cols * p]."""
    z = tokens.shape[-1] // (patch * patch)
    cut = tokens.reshape(rows, cols, patch, patch, z)
    return cut.permute(4, 0, 2, 1, 3).reshape(z, rows * patch, cols * patch)
