"""The ranks of one model replica, and rows that travel among them: from those that made them to those that read them, and back.

The replica's tensor-, context- and pipeline-parallel ranks share one set of packs, so work outside of the decoder can be dealt to all.
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
    """``group`` holds the replica's ranks in the order of the world; all other numbers are ranks inside it.

    ``first`` and ``last`` are those of the first and the last pipeline stage; ``first_leads`` those of the first stage that come
    first in their tensor-parallel group.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    first: tuple[int, ...]
    last: tuple[int, ...]
    first_leads: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Ranks of the first or the last stage."""
        return tuple(sorted({*self.first, *self.last}))


def make_replica() -> Replica:
    """The replica of this rank. Collective over the world; Megatron-Core's groups must exist."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    check_rank_order()
    own = coordinates_of(dist.get_rank())
    members_of: list[list[int]] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    for rank in range(dist.get_world_size()):
        members_of[coordinates_of(rank).data].append(rank)
    groups = [dist.new_group(members) for members in members_of]
    group, members = groups[own.data], members_of[own.data]
    inside = [coordinates_of(rank) for rank in members]
    return Replica(
        group=group,
        rank=members.index(dist.get_rank()),
        size=len(members),
        first=tuple(rank for rank, place in enumerate(inside) if place.pipeline == 0),
        last=tuple(rank for rank, place in enumerate(inside) if place.pipeline == stages - 1),
        first_leads=tuple(rank for rank, place in enumerate(inside) if place.pipeline == place.tensor == 0),
    )


def send_rows(rows: torch.Tensor, counts: Sequence[int], readers: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's ``rows`` [counts[rank], n] to all ``readers``: [sum(counts), n] in rank order there, no row elsewhere.

    Every rank of the group calls it with the same ``counts`` and ``readers``. Nothing is recorded for a backward pass.
    """
    sent = [counts[group.rank()] if rank in readers else 0 for rank in range(group.size())]
    received = list(counts) if group.rank() in readers else [0] * len(counts)
    output = rows.new_empty((sum(received), rows.shape[1]))
    dist.all_to_all_single(output, rows.detach().repeat(len(readers), 1), received, sent, group=group)
    return output


def return_rows(rows: torch.Tensor, counts: Sequence[int], readers: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """The way back: ``rows`` [sum(counts), n] of every reader (none elsewhere) -> their sum over readers, [counts[rank], n]."""
    own = counts[group.rank()]
    sent = list(counts) if group.rank() in readers else [0] * len(counts)
    received = [own if rank in readers else 0 for rank in range(group.size())]
    output = rows.new_empty((own * len(readers), rows.shape[1]))
    dist.all_to_all_single(output, rows.contiguous(), received, sent, group=group)
    return output.view(len(readers), own, rows.shape[1]).sum(0)
