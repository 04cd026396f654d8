# SPDX-License-Identifier: Apache-2.0
"""How pictures are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_bagel.inference.core.guidance import Guidance, time_grid


@dataclass(frozen=True)
class ImageSampling:
    """How pictures are drawn. ``num_timesteps`` points in time make ``num_timesteps - 1`` steps.

    ``couple_batch`` computes the norms of global renormalisation over all pictures of a call, as the original does. Without it, a
    picture does not depend on the others of its batch. ``capture`` replays the steps as CUDA graphs where that is possible
    (``capture.py``).
    """

    num_timesteps: int = 50
    timestep_shift: float = 3.0
    guidance: Guidance = field(default_factory=Guidance)
    couple_batch: bool = False
    capture: bool = False

    def __post_init__(self) -> None:
        time_grid(self.num_timesteps, self.timestep_shift)
