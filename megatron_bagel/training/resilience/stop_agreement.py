"""When to stop: all ranks must leave the loop after the same step.

The decision rides on the sum over the world that each step begins with (unreadable_samples.py): two more numbers, no exchange of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_bagel import platform
from megatron_bagel.platform.launch.signals import StopRequest


class StepAgreement:
    """The sum over the world that begins a step. ``stop`` turns true on all ranks in the same step, when any rank got a signal."""

    def __init__(self, request: StopRequest | None = None) -> None:
        self.request = request or StopRequest()
        self.stop = False
        self.reason = ""

    def exchange(self, failures: int) -> int:
        """``failures`` summed over all ranks. Collective over the world."""
        asked = torch.tensor([failures, self.request.number > 0], device=platform.device())
        dist.all_reduce(asked)
        total, stopping = asked.tolist()
        if stopping:
            self.stop = True
            self.reason = f"{self.request.name or 'a signal'} ({stopping} of {dist.get_world_size()} ranks got one)"
        return int(total)
