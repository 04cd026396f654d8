# SPDX-License-Identifier: Apache-2.0
"""Every formula whose rounding decides something equals the original's over sweeps of settings, bit for bit unless a test says otherwise.

docs/differences.md lists where rounding differs on purpose: learning rate, moving average, clipping, sums of losses.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_bagel.data.transforms import TransformArgs, output_size, output_sizes
from megatron_bagel.encoders.siglip import rope_2d
from megatron_bagel.inference.core.guidance import RENORM_TYPES, Guidance, guide, time_grid
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, build_pack, grid_position_ids
from megatron_bagel.model.embedders import TimestepEmbedder
from megatron_bagel.model.flow import interpolate, shift_timesteps
from megatron_bagel.model.positions import sincos_2d
from megatron_bagel.model.rope import rotary_table
from megatron_bagel.training.optim.lr_schedule import LearningRate, ScheduleSettings
from tests import original_formulas as original

SHIFTS = (1.0, 1.5, 2.0, 3.0, 3.3, 4.0, 5.0, 8.0)
POINTS = (*range(2, 103), 126, 151, 201, 251, 501, 1001)
BOUNDS = (0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.mark.parametrize("shift", SHIFTS)
def test_times_and_step_lengths(shift: float) -> None:
    for points in POINTS:
        grid = time_grid(points, shift)
        expected, lengths = original.times(points, shift)
        assert torch.equal(grid[:-1], expected) and torch.equal(grid[:-1] - grid[1:], lengths), points


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 4.0])
def test_the_steps_that_are_guided(shift: float) -> None:
    """Sweeps 101 grids and 12 bounds; a bound is tried as the lower end and as the upper end of the interval."""
    for points in range(2, 103):
        grid = original.times(points, shift)[0]
        times = grid.tolist()
        for bound in BOUNDS:
            above, below = Guidance(interval=(bound, 1.0)), Guidance(interval=(0.0, bound))
            assert [above.scales_at(t)[0] > 1 for t in times] == (grid > bound).tolist(), (points, bound)
            assert [below.scales_at(t)[0] > 1 for t in times] == (grid <= bound).tolist(), (points, bound)
        both = Guidance(interval=(0.2, 0.9))
        assert [both.needs(t)[0] for t in times] == [original.guided_at(t, 0.2, 0.9) for t in grid], points


@pytest.mark.parametrize("kind", RENORM_TYPES)
def test_guided_velocities(kind: str) -> None:
    draws = random.Random(3)
    for seed in range(400):
        v, without_text, without_images = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(seed)).unbind()
        text, image = draws.choice((1.0, 1.1, 3.0, 4.0, 7.5)), draws.choice((1.0, 1.5, 2.0, 3.7))
        least = draws.choice((0.0, 0.1, 0.6, 1.0))
        guided = guide(v, without_text, without_images, (text, image), Guidance(text, image, renorm_min=least, renorm_type=kind))
        assert torch.equal(guided, original.guided_velocity(v, without_text, without_images, text, image, kind, least)), seed


@pytest.mark.parametrize("shift", SHIFTS)
def test_timesteps_of_training(shift: float) -> None:
    draws = [float("-inf"), *np.random.RandomState(5).standard_normal(20_000).tolist(), *np.linspace(-9, 9, 1001).tolist()]
    t = shift_timesteps(torch.from_numpy(np.array(draws).astype(np.float32)), shift)
    assert torch.equal(t, original.training_times(draws, shift)) and t[0] == 0 and (t[1:] > 0).all()
    clean, noise = torch.randn(2, len(t), 4, generator=torch.Generator().manual_seed(1)).unbind()
    assert torch.equal(interpolate(clean, noise, t), (1 - t[:, None]) * clean + t[:, None] * noise)
    assert torch.equal(TimestepEmbedder.sinusoid(t), original.sinusoid(t))


def test_image_sizes() -> None:
    draws = random.Random(7)
    for case in range(600):
        stride = draws.choice((8, 14, 16, 28))
        longest = draws.choice((56, 224, 378, 512, 518, 980, 1024, draws.randint(64, 1500)))
        args = TransformArgs(longest, draws.randint(1, longest), stride, draws.choice((2352, 262_144, 1_806_336, 2_007_040)))
        sizes = [(draws.randint(1, 3000), draws.randint(1, 3000), draws.randint(1, 6)) for _ in range(20)]
        expected = [
            original.resized(width, height, longest, args.min_image_size, stride, args.max_pixels, images)
            for width, height, images in sizes
        ]  # fmt: skip
        assert [output_size(args, *size) for size in sizes] == expected, case
        assert np.stack(output_sizes(args, *np.array(sizes).T), axis=1).tolist() == [list(size) for size in expected], case


@pytest.mark.parametrize("side", [8, 16, 27, 32, 37, 64, 70, 128])
def test_interpolated_position_ids(side: int) -> None:
    for cells in range(1, 200):
        assert grid_position_ids(cells, 1, side, True).tolist() == original.interpolated_ids(cells, 1, side).tolist(), cells
        other = 1 + 7 * cells % 70
        assert grid_position_ids(other, cells, side, True).tolist() == original.interpolated_ids(other, cells, side).tolist()


@pytest.mark.parametrize(("dim", "side"), [(64, 16), (128, 32), (896, 64), (1152, 70), (3584, 64)])
def test_position_tables(dim: int, side: int) -> None:
    assert torch.equal(sincos_2d(dim, side), original.position_table(dim, side))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 72, 80, 128])
def test_rotary_tables(head_dim: int) -> None:
    positions = torch.cat((torch.arange(3000), torch.arange(3000, 40_000, 17)))
    for theta in (1e4, 1e6, 5e5):
        for table, expected in zip(rotary_table(positions, head_dim, theta), original.rotary(positions, head_dim, theta), strict=True):
            assert torch.equal(table, expected)
    for side in (16, 32, 70):
        for table, expected in zip(rope_2d(torch.arange(side * side), side, head_dim), original.vit_rotary(side, head_dim), strict=True):
            assert torch.equal(table[:, 0], expected)


def test_weights_of_texts() -> None:
    spec = LayoutSpec(bos=0, eos=1, start_of_image=2, end_of_image=3)
    for tokens in (*range(1, 600), 1023, 4095, 16_383):
        pack = build_pack([Sample("d", 0, 0, (Item("text", loss=True, ids=np.full(tokens - 1, 5)),))], spec)
        assert set(pack.ce_weights.tolist()) == {original.text_weight(tokens)}, tokens


@pytest.mark.parametrize("style", ["constant", "cosine"])
def test_learning_rates_up_to_the_last_digits_of_a_double(style: str) -> None:
    """Megatron multiplies in another order, so a rate may differ in the last two bits of its 53; the optimizer reads 24 of them."""
    draws = random.Random(11)
    for case in range(150):
        lr, total, warmup = draws.choice((1e-4, 2e-5, 3e-4, 7.3e-5, 1e-3)), draws.randint(60, 4000), draws.choice((0, 1, 2, 7, 50))
        settings = ScheduleSettings(lr, draws.choice((0.0, 1e-7, 1e-5)), warmup, total, style, zero_lr_first_step=True)
        schedule = LearningRate(SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}]), settings)
        for step in sorted({0, 1, warmup, warmup + 1, total // 2, total - 1, total, *(draws.randint(0, total) for _ in range(12))}):
            schedule.load_state_dict({"steps": step})
            expected = original.rate(step, lr, settings.min_lr, warmup, total, style)
            assert abs(schedule.lr - expected) <= 4 * np.spacing(lr), (case, step)


def test_moving_averages_up_to_one_rounding() -> None:
    """``lerp`` rounds once where scaling and adding round twice: after a step the averages differ by at most two units of float32."""
    generator = torch.Generator().manual_seed(2)
    for decay in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999):
        average, weight = torch.randn(2, 20_000, generator=generator).unbind()
        expected, result = original.averaged(average, weight, decay), average.clone()
        torch._foreach_lerp_([result], [weight], 1.0 - decay)
        unit = torch.finfo(torch.float32).eps * torch.maximum(average.abs(), weight.abs())
        assert ((result - expected).abs() <= 2 * unit).all(), decay


def test_clipping_up_to_one_rounding() -> None:
    """Megatron divides in double and rounds the factor once; the original rounds the sum, the reciprocal and the product."""
    norms = torch.rand(250, generator=torch.Generator().manual_seed(4)).mul(4).add(0.01)
    edges = torch.tensor([1.0]) * (1 + torch.arange(-16, 17) * torch.finfo(torch.float32).eps)
    for most in (0.1, 0.5, 1.0):
        for norm in (*norms, *(edges * most)):
            parameter = torch.nn.Parameter(torch.zeros(1))
            parameter.grad = torch.ones(1)
            clip_grad_by_total_norm_fp32([parameter], max_norm=most, total_norm=float(norm))
            assert abs(float(parameter.grad) - float(original.clip_factor(norm, most))) <= 2 * torch.finfo(torch.float32).eps
