# SPDX-License-Identifier: Apache-2.0
"""Lets all ranks leave the loop after the same step when one of them has a signal.

The request travels with the sum over the world that begins each step (``unreadable_samples.py``), so it needs no communication of its own.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_bagel.parallel.host_sums import sum_over_hosts
from megatron_bagel.platform.launch.signals import StopRequest


class StepAgreement:
    """Exchanges stop requests at the beginning of a step. ``stop`` becomes true on all ranks in the same step if any has a signal."""

    def __init__(self, request: StopRequest | None = None) -> None:
        self.request = request or StopRequest()
        self.stop = False
        self.reason = ""

    def exchange(self, failures: int) -> int:
        """Return the sum of ``failures`` over all ranks, and note a stop request of any rank. Collective over the world."""
        total, stopping = map(int, sum_over_hosts([failures, self.request.number > 0], dist.group.WORLD))
        if stopping:
            self.stop = True
            self.reason = f"{self.request.name or 'a signal'} ({stopping} of {dist.get_world_size()} ranks got one)"
        return total
