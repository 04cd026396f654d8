# SPDX-License-Identifier: Apache-2.0
"""Guidance arithmetic: what it must leave alone, and what its norms may not exceed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.inference.core.guidance import RENORM_TYPES, Guidance, guide, time_grid


def velocities(seed: int) -> list[torch.Tensor]:
    return list(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed)))


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(RENORM_TYPES), st.floats(1, 8), st.floats(1, 4))
def test_renormalisation_never_lets_the_norm_grow(seed: int, kind: str, text: float, image: float) -> None:
    v, without_text, without_images = velocities(seed)
    guided = guide(v, without_text, without_images, (text, image), Guidance(text, image, renorm_type=kind))
    if text <= 1:
        assert torch.equal(guided, v)
    elif kind == "global":
        assert guided.norm() <= v.norm() * (1 + 1e-5)
    elif kind == "channel" or image <= 1:
        assert (guided.norm(dim=-1) <= v.norm(dim=-1) * (1 + 1e-5)).all()


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(RENORM_TYPES))
def test_renorm_min_1_is_plain_guidance(seed: int, kind: str) -> None:
    v, without_text, without_images = velocities(seed)
    guided = guide(v, without_text, without_images, (4.0, 2.0), Guidance(4.0, 2.0, renorm_min=1.0, renorm_type=kind))
    step = without_text + 4 * (v - without_text)
    torch.testing.assert_close(guided, without_images + 2 * (step - without_images))


def test_equal_velocities_need_no_guidance() -> None:
    v = velocities(0)[0]
    torch.testing.assert_close(guide(v, v, v, (4.0, 2.0), Guidance(4.0, 2.0)), v)


def test_image_guidance_without_text_guidance_has_no_effect() -> None:
    guidance = Guidance(1.0, 2.0, (0.0, 1.0))
    assert guidance.needs(0.5) == (False, False)
    v, _, without_images = velocities(1)
    assert guide(v, None, without_images, guidance.scales_at(0.5), guidance) is v


def test_interval_is_open_below_and_closed_above() -> None:
    guidance = Guidance(4.0, 2.0, (0.4, 0.8))
    assert [guidance.scales_at(t) for t in (0.4, 0.41, 0.8, 0.81)] == [(1, 1), (4, 2), (4, 2), (1, 1)]


@settings(deadline=None)
@given(st.integers(2, 100), st.floats(0.5, 8))
def test_times_fall_from_one_to_zero(points: int, shift: float) -> None:
    times = time_grid(points, shift)
    assert len(times) == points and times[0] == pytest.approx(1) and times[-1] == 0
    assert (times[:-1] > times[1:]).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"renorm_type": "l2"}, "cfg_renorm_type 'l2'"),
        ({"renorm_min": 1.5}, "cfg_renorm_min is 1.5"),
        ({"interval": (0.8, 0.2)}, "cfg_interval"),
        ({"text_scale": 0.5}, "cfg_text_scale is 0.5"),
    ],
)
def test_bad_settings_are_named(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Guidance(**settings)


def test_one_time_point_makes_no_step() -> None:
    with pytest.raises(ValueError, match="num_timesteps is 1"):
        time_grid(1, 3.0)
