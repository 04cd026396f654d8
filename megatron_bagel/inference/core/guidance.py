# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance with two conditions that are dropped in turn (text, images), and its renormalisation.

Everything here is arithmetic on velocities; the caller decides which context each velocity comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RENORM_TYPES = ("global", "channel", "text_channel")
# Keeps the ratio of norms finite if the guided velocity vanishes; the value is BAGEL's.
NORM_EPS = 1e-8


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture follows its text and its input images.

    ``text_scale`` and ``img_scale`` extrapolate away from the velocity without the text and without the images; 1 turns
    a guidance off. They act for t in (``interval[0]``, ``interval[1]``]. ``renorm_type`` chooses the norm that may not grow:
    of the entire call (``global``), of every token (``channel``), or of every token after the text step only
    (``text_channel``, which suits editing). ``renorm_min`` bounds the shrinking from below; 1 turns it off.
    As in the original, image guidance acts only together with text guidance.
    """

    text_scale: float = 3.0
    img_scale: float = 1.5
    interval: tuple[float, float] = (0.4, 1.0)
    renorm_min: float = 0.0
    renorm_type: str = "global"

    def __post_init__(self) -> None:
        if self.renorm_type not in RENORM_TYPES:
            raise ValueError(f"cfg_renorm_type '{self.renorm_type}' is unknown; choose one of {', '.join(RENORM_TYPES)}")
        if not 0.0 <= self.renorm_min <= 1.0:
            raise ValueError(f"cfg_renorm_min is {self.renorm_min}, it must lie in [0, 1]")
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"cfg_interval is {list(self.interval)}, its first value must not exceed its second")
        for name, scale in (("cfg_text_scale", self.text_scale), ("cfg_img_scale", self.img_scale)):
            if scale < 1.0:
                raise ValueError(f"{name} is {scale}, it must be at least 1 (1 turns the guidance off)")

    def scales_at(self, t: float) -> tuple[float, float]:
        """Return (text scale, image scale) at time ``t``, a value of ``time_grid``.

        Both bounds are rounded to float32, as in the original. A time of 0.4 is 0.40000000596 in float32, which exceeds the
        double 0.4, but does not exceed the float32 0.4.
        """
        low, high = np.float32(self.interval[0]), np.float32(self.interval[1])
        if low < np.float32(t) <= high:
            return self.text_scale, self.img_scale
        return 1.0, 1.0

    def needs(self, t: float) -> tuple[bool, bool]:
        """Return which extra velocities a step at ``t`` reads: (without text, without images)."""
        return self.needs_of(self.scales_at(t))

    @staticmethod
    def needs_of(scales: tuple[float, float]) -> tuple[bool, bool]:
        """Return the same for ``scales``, a result of ``scales_at``."""
        text, img = scales
        # Image guidance starts from the text-guided velocity; without text guidance the original drops it.
        return text > 1.0, text > 1.0 and img > 1.0


def shrink_factor(reference: Tensor, guided_velocity: Tensor, per_token: bool, minimum: float) -> Tensor:
    """Return the factor in [minimum, 1] that reduces the norm of ``guided_velocity`` to that of ``reference``.

    Both are [tokens, channels]. The result is [tokens, 1] per token, else a scalar over all tokens of the call.
    """
    if per_token:
        reference_norm, norm = reference.norm(dim=-1, keepdim=True), guided_velocity.norm(dim=-1, keepdim=True)
    else:
        reference_norm, norm = reference.norm(), guided_velocity.norm()
    return (reference_norm / (norm + NORM_EPS)).clamp(min=minimum, max=1.0)


def guide(v: Tensor, without_text: Tensor | None, without_images: Tensor | None, scales: tuple[float, float], guidance: Guidance) -> Tensor:
    """Return the guided velocity [tokens, channels] from the velocities under the full context and under the two reduced ones.

    ``scales`` is the result of ``guidance.scales_at(t)``. A reduced velocity that ``guidance.needs(t)`` does not need may be ``None``.
    Formulas: v_t = v_ct + s_t (v - v_ct), v' = v_ci + s_i (v_t - v_ci), then the renormalisation.
    """
    text_scale, img_scale = scales
    if text_scale <= 1.0 or without_text is None:
        return v
    guided = without_text + text_scale * (v - without_text)
    if guidance.renorm_type == "text_channel":
        guided = guided * shrink_factor(v, guided, True, guidance.renorm_min)
    if img_scale > 1.0 and without_images is not None:
        guided = without_images + img_scale * (guided - without_images)
    if guidance.renorm_type == "text_channel":
        return guided
    return guided * shrink_factor(v, guided, guidance.renorm_type == "channel", guidance.renorm_min)


def time_grid(num_timesteps: int, shift: float, device: torch.device | str = "cpu") -> Tensor:
    """Return times from 1 to 0, float32 [num_timesteps], shifted by s t / (1 + (s - 1) t): ``num_timesteps - 1`` Euler steps.

    They are computed on the ``device`` of the pictures, as in the original: devices round ``linspace`` differently.

    Raises:
        ValueError: If there are fewer than two points, or the shift is not positive.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}; the time grid needs at least 2 points (N points make N - 1 steps)")
    if shift <= 0:
        raise ValueError(f"timestep_shift is {shift}; it must be positive (1 leaves the times evenly spaced)")
    t = torch.linspace(1, 0, num_timesteps, device=device)
    return shift * t / (1 + (shift - 1) * t)
