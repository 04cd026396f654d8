# SPDX-License-Identifier: Apache-2.0
"""A small trainer for FLUX-shaped autoencoders: it gives a toy world its latents in minutes, without an adversary.

Loss = mean|x - y| + edge_weight * mean|grad x - grad y| + kl_weight * KL(posterior || N(0, 1)) per latent element. The edge
term compares differences of neighbouring pixels, which keeps shape borders sharp that L1 alone would blur.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_bagel.encoders.autoencoder import AutoEncoder


@dataclass(frozen=True)
class TrainerSettings:
    """``lr`` rises linearly over ``warmup`` steps and then falls to zero along a cosine; ``clip`` bounds the gradient norm."""

    steps: int = 2000
    lr: float = 1e-3
    warmup: int = 100
    clip: float = 1.0
    edge_weight: float = 1.0
    kl_weight: float = 1e-6
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """The numbers of one step; ``psnr`` is in dB for images in [-1, 1]."""

    step: int
    loss: float
    psnr: float


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute difference of the horizontal and vertical pixel differences of images [b, c, h, w], a scalar."""
    difference = x - y
    return (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()) / 2


def kl_per_element(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) averaged over all elements, a scalar."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def psnr(x: Tensor, y: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2)."""
    return 10 * math.log10(4 / max((x - y).square().mean().item(), 1e-12))


def learning_rate(settings: TrainerSettings, step: int) -> float:
    """Return the rate of step 0, 1, ...: linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def quiet_posterior(model: AutoEncoder, logvar: float = -6.0) -> None:
    """Make a new model start with this log variance everywhere (-6 is a deviation of 0.05), in place.

    Fresh weights give a deviation of 1 and means near 0. The decoder would then see noise and learn the average image first.
    """
    convolution, z = model.encoder.conv_out, model.arch.z_channels
    convolution.weight[z:].zero_()
    convolution.get_parameter("bias")[z:].fill_(logvar)


def train_autoencoder(
    model: AutoEncoder,
    batches: Iterator[Tensor],
    settings: TrainerSettings,
    report: Callable[[Progress], None] | None = None,
    report_every: int = 50,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
) -> Progress:
    """Train all weights of ``model`` in place.

    A new model should go through ``quiet_posterior`` first. The latent scale and shift are not learned: call ``fit_latent_scale``
    afterwards. With ch 32 every GroupNorm group of the finest level is a single channel, so an image's overall colour survives there
    only as contrast between its parts.

    Args:
        model: The autoencoder.
        batches: Batches [b, 3, H, W] in [-1, 1].
        settings: The settings of the training.
        report: Receives the numbers of a step.
        report_every: The number of steps between reports.
        optimizers: Replace AdamW; the optional ``lr_factor`` of a parameter group multiplies the scheduled rate.

    Returns:
        The numbers of the last step.
    """
    if settings.steps < 1:
        raise ValueError(f"autoencoder training needs at least one step, got steps={settings.steps}")
    generator = torch.Generator().manual_seed(settings.seed)
    if optimizers is None:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)]
    model.train().requires_grad_(True)
    for step in range(settings.steps):
        images = next(batches)
        loss, output = _step(model, images, settings, step, optimizers, generator)
        if step == settings.steps - 1 or (report is not None and step % report_every == 0):
            progress = Progress(step, loss.item(), psnr(output, images))
            if report is not None:
                report(progress)
    model.eval().requires_grad_(False)
    return progress


def _step(
    model: AutoEncoder,
    images: Tensor,
    settings: TrainerSettings,
    step: int,
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train on one batch. Return the loss and the reconstructions [b, 3, H, W]."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = learning_rate(settings, step) * group.get("lr_factor", 1.0)
    mean, logvar = model.encode_moments(images)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    output = model.decode(model.sample(mean, logvar, noise))
    l1 = (output - images).abs().mean()
    loss = l1 + settings.edge_weight * edge_loss(output, images) + settings.kl_weight * kl_per_element(mean, logvar)
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for optimizer in optimizers:
        optimizer.step()
    return loss, output.detach()


@torch.no_grad()
def fit_latent_scale(model: AutoEncoder, images: Tensor) -> None:
    """Set the architecture's scale and shift so that latents of ``images`` [b, 3, H, W] have mean 0 and variance 1.

    Flow matching mixes latents with N(0, 1) noise, so latents of another scale would change what a timestep means.
    Reconstructions do not change, because ``decode`` undoes what ``sample`` does.
    """
    mean, logvar = model.encode_moments(images)
    variance = mean.var() + logvar.exp().mean()
    model.arch.shift_factor = mean.mean().item()
    model.arch.scale_factor = 1.0 / variance.sqrt().item()
