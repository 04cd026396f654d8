# SPDX-License-Identifier: Apache-2.0
"""The small trainer learns, leaves a frozen model behind, and its latents get the size the flow expects."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_bagel.sample_world.autoencoder_training import (
    Progress,
    TrainerSettings,
    edge_loss,
    fit_latent_scale,
    learning_rate,
    quiet_posterior,
    train_autoencoder,
)
from tests.encoders.helpers import small_autoencoder


def two_colours(seed: int) -> torch.Tensor:
    """Images [4, 3, 16, 16] of two flat halves."""
    colours = torch.rand(4, 3, 2, 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return colours.repeat_interleave(8, dim=2).expand(4, 3, 16, 16).contiguous()


def test_training_improves_and_scale_normalises_latents() -> None:
    model = small_autoencoder()
    quiet_posterior(model)
    images = two_colours(0)[:2]
    mean, logvar = model.encode_moments(images)
    torch.testing.assert_close(logvar, torch.full_like(logvar, -6.0))
    seen: list[Progress] = []
    last = train_autoencoder(model, itertools.repeat(images), TrainerSettings(steps=24, warmup=5), seen.append, report_every=8)
    assert last.psnr > seen[0].psnr + 5
    assert [progress.step for progress in seen] == [0, 8, 16, 23]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = model.decode(model.sample(*model.encode_moments(images), torch.zeros_like(mean)))
    fit_latent_scale(model, images)
    mean, logvar = model.encode_moments(images)
    latents = model.sample(mean, logvar, torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.05
    after = model.decode(model.sample(mean, logvar, torch.zeros_like(mean)))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_edge_loss_ignores_a_constant_offset_and_sees_a_blur() -> None:
    image = two_colours(0)
    assert edge_loss(image, image + 0.3) < 1e-6
    assert edge_loss(image, torch.nn.functional.avg_pool2d(image, 3, 1, 1)) > 1e-3


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    settings = TrainerSettings(steps=100, lr=1.0, warmup=10)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and rates[100] < 1e-6


def test_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        train_autoencoder(small_autoencoder(), iter([]), TrainerSettings(steps=0))
