# SPDX-License-Identifier: Apache-2.0
"""The original's arithmetic, written down as it computes it: torch float32 tensors where it has tensors, Python numbers elsewhere.

`test_original_arithmetic.py` compares this with the package over sweeps of settings. Nothing here may import the package.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def times(points: int, shift: float) -> tuple[Tensor, Tensor]:
    """Times of the Euler steps and their lengths."""
    grid = torch.linspace(1, 0, points)
    grid = shift * grid / (1 + (shift - 1) * grid)
    return grid[:-1], grid[:-1] - grid[1:]


def guided_at(t: Tensor, low: float, high: float) -> bool:
    """Whether guidance acts at a time, a float32 tensor that is compared with Python numbers."""
    return bool(t > low and t <= high)


def guided_velocity(v: Tensor, without_text: Tensor, without_images: Tensor, text: float, image: float, kind: str, least: float) -> Tensor:
    """The velocity under guidance and renormalisation."""
    if text <= 1.0:
        return v
    guided = without_text + text * (v - without_text)
    if kind == "text_channel":
        scale = (torch.norm(v, dim=-1, keepdim=True) / (torch.norm(guided, dim=-1, keepdim=True) + 1e-8)).clamp(min=least, max=1.0)
        guided = guided * scale
        return without_images + image * (guided - without_images) if image > 1.0 else guided
    if image > 1.0:
        guided = without_images + image * (guided - without_images)
    if kind == "global":
        scale = (torch.norm(v) / (torch.norm(guided) + 1e-8)).clamp(min=least, max=1.0)
    else:
        scale = (torch.norm(v, dim=-1, keepdim=True) / (torch.norm(guided, dim=-1, keepdim=True) + 1e-8)).clamp(min=least, max=1.0)
    return guided * scale


def training_times(draws: list[float], shift: float) -> Tensor:
    """Timesteps from a list of normal draws, which becomes a float32 tensor."""
    t = torch.sigmoid(torch.tensor(draws))
    return shift * t / (1 + (shift - 1) * t)


def resized(width: int, height: int, longest: int, shortest: int, stride: int, most_pixels: int, images: int) -> tuple[int, int]:
    """Size of an image after the transform."""

    def apply(width: int, height: int, scale: float) -> tuple[int, int]:
        width, height = round(width * scale), round(height * scale)
        return max(stride, int(round(width / stride) * stride)), max(stride, int(round(height / stride) * stride))

    scale = max(min(longest / max(width, height), 1.0), shortest / min(width, height))
    new_width, new_height = apply(width, height, scale)
    if new_width * new_height > most_pixels / images:
        new_width, new_height = apply(new_width, new_height, most_pixels / images / (new_width * new_height))
    if max(new_width, new_height) > longest:
        new_width, new_height = apply(new_width, new_height, longest / max(new_width, new_height))
    return new_width, new_height


def interpolated_ids(rows: int, columns: int, side: int) -> Tensor:
    """Position ids of an image spread over the whole table."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    row = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / rows), boundaries, right=True)
    column = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / columns), boundaries, right=True)
    return (row[:, None] * side + column).flatten()


def position_table(dim: int, side: int) -> Tensor:
    """The fixed 2-D table: columns of the image in the first half of the channels, rows in the second."""

    def axis(width: int, positions: np.ndarray) -> np.ndarray:
        omega = np.arange(width // 2, dtype=np.float64)
        omega /= width / 2.0
        omega = 1.0 / 10000**omega
        angles = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    by_column, by_row = np.meshgrid(np.arange(side, dtype=np.float32), np.arange(side, dtype=np.float32))
    return torch.from_numpy(np.concatenate([axis(dim // 2, by_column), axis(dim // 2, by_row)], axis=1)).float()


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the decoder's rotary positions at inference."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    angles = (frequencies[:, None] @ positions[None, :].float()).T
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def vit_rotary(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rows and columns [side * side, 2, head_dim / 4] of the ViT's optional rotary positions."""
    dim = head_dim // 2
    frequencies = 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    rows = torch.arange(side).to(frequencies.dtype)[:, None].repeat(1, side)
    columns = torch.arange(side).to(frequencies.dtype)[None, :].repeat(side, 1)
    angles = torch.stack([(grid[..., None] * frequencies[None, None, :]).flatten(0, 1) for grid in (rows, columns)], dim=1)
    return angles.cos(), angles.sin()


def sinusoid(t: Tensor) -> Tensor:
    """The sinusoid of timesteps, before its MLP."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(start=0, end=128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def text_weight(tokens: int) -> float:
    """Weight of each token of a text in the reweighted loss, float32."""
    return float(np.float32(1 / (tokens**0.5)))


def rate(step: int, lr: float, least: float, warmup: int, total: int, style: str) -> float:
    """Learning rate of a step, counted from 0."""
    if step < warmup:
        return lr * (float(step) / float(max(1, warmup)))
    if style == "constant":
        return lr * 1.0
    progress = float(step - warmup) / float(max(1, total - warmup))
    factor = 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress))
    share = least / lr
    return lr * max(0, factor * (1 - share) + share)


def averaged(average: Tensor, weight: Tensor, decay: float) -> Tensor:
    """The moving average after one step."""
    return average.mul(decay).add(weight, alpha=1 - decay)


def clip_factor(norm: Tensor, most: float) -> Tensor:
    """What gradients are multiplied by, float32."""
    return torch.clamp(most / (norm + 1e-6), max=1.0)
