# SPDX-License-Identifier: Apache-2.0
"""Sums of numbers that hosts have and need back at once, such as the counts of a step before its work is queued."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel import platform
from megatron_bagel.platform.device import to_device
from megatron_bagel.platform.side_stream import apart

#: The world, and the second process group of its ranks.
_second_world: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


def create_host_group(minutes: float) -> None:
    """Create a second process group of the world's GPUs for ``sum_over_hosts``, with a time-out. Collective over the world.

    The vision tower gathers its weights over the world, and a group does one thing after the other. CPUs need no second group.
    """
    global _second_world
    world = dist.group.WORLD
    if world is not None and world.size() > 1 and platform.has_gpu():
        # Megatron-Core's function, so that the group is ended and gets later time-outs with Megatron-Core's groups.
        group = parallel_state.create_group(list(range(world.size())), timedelta(minutes=minutes), group_desc="HOST_SUMS")
        _second_world = (world, group)


def sum_over_hosts(numbers: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Sum the numbers of a group's ranks (None: of the world) element by element and return them on every host. Collective.

    The sums are float64, exact for counts below 2 ** 53. On a GPU they are made beside the training stream: the host does not wait for what
    is queued there, such as the update of the step before, and prepares the next step meanwhile. So the group must have nothing else under
    way. That holds for the data-parallel group, and for the world with the group of ``create_host_group``.
    """
    if dist.get_world_size(group) == 1:
        return list(numbers)
    with apart(platform.device()):
        summed = to_device(torch.tensor(numbers, dtype=torch.float64), platform.device())
        dist.all_reduce(summed, group=_group_for(group))
        values: list[float] = summed.tolist()
    return values


def _group_for(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return ``group``, or the second group of its ranks if it is the world and has one."""
    world = dist.group.WORLD
    if _second_world is not None and _second_world[0] is world and (group is None or group is world):
        return _second_world[1]
    return group
