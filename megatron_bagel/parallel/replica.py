# SPDX-License-Identifier: Apache-2.0
"""The ranks of one model replica, and the rows they exchange: from the ranks that computed them to those that read them, and back.

The replica's tensor-, context- and pipeline-parallel ranks share one set of packs, so work outside the decoder can be divided
among all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel.parallel.rank_coordinates import check_rank_order, coordinates_of


@dataclass(frozen=True)
class Replica:
    """A model replica. ``group`` holds its ranks in world order; all other numbers are ranks inside the group.

    ``first_stage_ranks`` and ``last_stage_ranks`` belong to the first and the last pipeline stage. ``first_stage_leads`` are the
    ranks of the first stage that come first in their tensor-parallel group.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    first_stage_ranks: tuple[int, ...]
    last_stage_ranks: tuple[int, ...]
    first_stage_leads: tuple[int, ...]

    @property
    def boundary_ranks(self) -> tuple[int, ...]:
        """Return the ranks of the first or the last stage."""
        return tuple(sorted({*self.first_stage_ranks, *self.last_stage_ranks}))


def make_replica() -> Replica:
    """Create the replica of this rank. Collective over the world; Megatron-Core's process groups must exist."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    check_rank_order()
    own_coordinates = coordinates_of(dist.get_rank())
    members_of: list[list[int]] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    for rank in range(dist.get_world_size()):
        members_of[coordinates_of(rank).data].append(rank)
    groups = [dist.new_group(members) for members in members_of]
    group, members = groups[own_coordinates.data], members_of[own_coordinates.data]
    member_coordinates = [coordinates_of(rank) for rank in members]
    return Replica(
        group=group,
        rank=members.index(dist.get_rank()),
        size=len(members),
        first_stage_ranks=tuple(rank for rank, coordinates in enumerate(member_coordinates) if coordinates.pipeline == 0),
        last_stage_ranks=tuple(rank for rank, coordinates in enumerate(member_coordinates) if coordinates.pipeline == stages - 1),
        first_stage_leads=tuple(
            rank for rank, coordinates in enumerate(member_coordinates) if coordinates.pipeline == coordinates.tensor == 0
        ),
    )


def send_rows(rows: torch.Tensor, counts: Sequence[int], readers: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Send rows to readers.

    Every rank of the group calls this with the same ``counts`` and ``readers``. Nothing is recorded for a backward pass.

    Args:
        rows: This rank's rows, [counts[rank], n].
        counts: The number of rows of every rank.
        readers: The ranks that receive all rows.
        group: The process group.

    Returns:
        The rows of all ranks in rank order, [sum(counts), n], on the readers; no row elsewhere.
    """
    send_counts = [counts[group.rank()] if rank in readers else 0 for rank in range(group.size())]
    receive_counts = list(counts) if group.rank() in readers else [0] * len(counts)
    output = rows.new_empty((sum(receive_counts), rows.shape[1]))
    dist.all_to_all_single(output, rows.detach().repeat(len(readers), 1), receive_counts, send_counts, group=group)
    return output


def return_rows(rows: torch.Tensor, counts: Sequence[int], readers: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Return rows from the readers to their owners, the reverse of ``send_rows``.

    Args:
        rows: Every reader's rows, [sum(counts), n]; no row elsewhere.
        counts: The number of rows of every rank.
        readers: The ranks that hold rows.
        group: The process group.

    Returns:
        The sum over readers of this rank's rows, [counts[rank], n].
    """
    own_rows = counts[group.rank()]
    send_counts = list(counts) if group.rank() in readers else [0] * len(counts)
    receive_counts = [own_rows if rank in readers else 0 for rank in range(group.size())]
    output = rows.new_empty((own_rows * len(readers), rows.shape[1]))
    dist.all_to_all_single(output, rows.contiguous(), receive_counts, send_counts, group=group)
    return output.view(len(readers), own_rows, rows.shape[1]).sum(0)
