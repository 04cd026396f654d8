# SPDX-License-Identifier: Apache-2.0
"""A grown autoencoder begins where the smaller one stopped, and the optimizer's update is what its name says."""

import pytest
import torch
import torch.nn.functional as F

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.sample_world.autoencoder_growing import grow, optimizers_of, orthogonalised, seed_autoencoder
from megatron_bagel.sample_world.autoencoder_training import TrainerSettings, train_autoencoder

ARCH = AutoencoderArch(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4)


def smooth_images(count: int, side: int) -> torch.Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(side, side), mode="bilinear").clamp(-1, 1)


def test_grown_model_codes_a_picture_as_the_small_one_codes_it_shrunk() -> None:
    generator = torch.Generator().manual_seed(0)
    small = seed_autoencoder(ARCH, generator)
    large = grow(small, generator)
    assert large.arch.ch_mult == (1, 1, 1) and large.arch.downsample == 2 * small.arch.downsample
    images = smooth_images(2, 32)
    with torch.no_grad():
        # The average is exact, so moments agree to rounding.
        for grown, before in zip(large.encode_moments(images), small.encode_moments(F.avg_pool2d(images, 2)), strict=True):
            torch.testing.assert_close(grown, before, rtol=1e-4, atol=1e-4)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        assert large.decode(latents).shape == (2, 3, 32, 32)


@pytest.mark.slow
def test_growing_model_learns_at_every_stage() -> None:
    generator = torch.Generator().manual_seed(0)
    model, losses = seed_autoencoder(ARCH, generator), []
    for side in (16, 32):
        if side > 16:
            model = grow(model, generator)
        batch = smooth_images(4, side)
        model.requires_grad_(True)
        train_autoencoder(
            model, iter([batch] * 25), TrainerSettings(steps=25, lr=2e-3, warmup=3), lambda p: losses.append(p.loss), 24,
            optimizers=optimizers_of(model, 2e-3),
        )  # fmt: skip
        assert losses[-1] < 0.6 * losses[-2]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8)])
def test_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.max() < 1.3 and values.median() > 0.6


def test_every_parameter_has_one_optimizer() -> None:
    model = seed_autoencoder(ARCH, torch.Generator().manual_seed(0))
    held = [id(p) for optimizer in optimizers_of(model, 1e-3) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_levels_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="ch_mult"):
        seed_autoencoder(AutoencoderArch(ch=32, ch_mult=(1, 2)), torch.Generator())
