"""Classifier-free guidance with two conditions dropped in turn (text, images) and the norms it is pulled back to.

Everything here is arithmetic on velocities; which context a velocity was computed under is the caller's affair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RENORM_TYPES = ("global", "channel", "text_channel")
# Keeps the ratio of norms finite when the guided velocity vanishes; the value is BAGEL's.
NORM_EPS = 1e-8


@dataclass(frozen=True)
class Guidance:
    """How strongly a picture follows its text and its input images.

    ``text_scale`` and ``img_scale`` extrapolate away from the velocity without the text and without the images; 1 turns
    a guidance off. They act for t in (``interval[0]``, ``interval[1]``]. ``renorm_type`` says which norm may not grow:
    of the whole call (``global``), of every token (``channel``), or of every token after the text step only
    (``text_channel``, which suits editing). ``renorm_min`` bounds the shrinking from below: 1 turns it off.
    As in the original, image guidance has an effect only together with text guidance.
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
        """(text scale, image scale) in force at time ``t``."""
        if self.interval[0] < t <= self.interval[1]:
            return self.text_scale, self.img_scale
        return 1.0, 1.0

    def needs(self, t: float) -> tuple[bool, bool]:
        """Which extra velocities a step at ``t`` reads: (without text, without images)."""
        text, img = self.scales_at(t)
        # Image guidance starts from the text-guided velocity; without that one the original drops it, and so do we.
        return text > 1.0, text > 1.0 and img > 1.0


def shrink_factor(before: Tensor, after: Tensor, per_token: bool, minimum: float) -> Tensor:
    """Factor in [minimum, 1] that brings the norm of ``after`` back to that of ``before``; both [tokens, channels].

    Per token the result is [tokens, 1], else a scalar over all tokens of the call.
    """
    if per_token:
        old, new = before.norm(dim=-1, keepdim=True), after.norm(dim=-1, keepdim=True)
    else:
        old, new = before.norm(), after.norm()
    return (old / (new + NORM_EPS)).clamp(min=minimum, max=1.0)


def guide(v: Tensor, without_text: Tensor | None, without_images: Tensor | None, scales: tuple[float, float], guidance: Guidance) -> Tensor:
    """Guided velocity [tokens, channels] from the velocity under the full context and under the two reduced ones.

    ``scales`` is what ``guidance.scales_at(t)`` gave; a reduced velocity that ``guidance.needs(t)`` does not name may be
    ``None``. Formulas: v_t = v_ct + s_t (v - v_ct), v' = v_ci + s_i (v_t - v_ci), then the renormalisation.
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


def time_grid(num_timesteps: int, shift: float) -> Tensor:
    """Times from 1 to 0, float32 [num_timesteps], shifted by s t / (1 + (s - 1) t): ``num_timesteps - 1`` Euler steps.

    Raises:
        ValueError: fewer than two points, or a shift that is not positive.
    """
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}; the time grid needs at least 2 points (N points make N - 1 steps)")
    if shift <= 0:
        raise ValueError(f"timestep_shift is {shift}; it must be positive (1 leaves the times evenly spaced)")
    t = torch.linspace(1, 0, num_timesteps)
    return shift * t / (1 + (shift - 1) * t)
