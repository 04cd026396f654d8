# SPDX-License-Identifier: Apache-2.0
"""Sums of numbers that hosts have and need back at once, such as the counts of a step before its work is queued."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel import platform
from megatron_bagel.platform.device import to_device
from megatron_bagel.platform.side_stream import apart

#: The world and the second process group of its ranks.
_second_world: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


def sum_over_hosts(numbers: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Sum the numbers of a group's ranks (None: of the world) element by element and return them on every host. Collective.

    The sums are float64, exact for counts below 2 ** 53. On a GPU they are made beside the training stream: the host does not wait for what
    is queued there, such as the update of the step before, and prepares the next step meanwhile. The group must have nothing
    else under way, which holds for the data-parallel group. For the world a group of its own is made, because the
    vision tower gathers its weights over the world.
    """
    if dist.get_world_size(group) == 1:
        return list(numbers)
    with apart(platform.device()):
        summed = to_device(torch.tensor(numbers, dtype=torch.float64), platform.device())
        dist.all_reduce(summed, group=_free_group(group))
        values: list[float] = summed.tolist()
    return values


def _free_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return ``group``, or the second group of its ranks for the world of GPUs. Collective over the world for the first time."""
    global _second_world
    world = dist.group.WORLD
    if (group is not None and group is not world) or world is None or not platform.has_gpu():
        return group
    if _second_world is None or _second_world[0] is not world:
        # Megatron-Core's function, so that it is ended and gets its time-outs with Megatron-Core's groups.
        _second_world = (world, parallel_state.create_group(list(range(world.size())), group_desc="HOST_SUMS"))
    return _second_world[1]
