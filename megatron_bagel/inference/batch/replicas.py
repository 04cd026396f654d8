"""Copies of the model that answer prompts side by side, when more processes were launched than share one decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel.inference.batch.requests import Answer

Value = TypeVar("Value")


@dataclass(frozen=True)
class Replicas:
    """This process's copy of the model is ``number`` of ``count``; the process that ``writes`` is rank 0."""

    number: int
    count: int
    writes: bool

    @classmethod
    def launched(cls) -> Replicas:
        """Of the process groups that exist."""
        group = parallel_state.get_data_parallel_group()
        return cls(dist.get_rank(group), dist.get_world_size(group), dist.get_rank() == 0)

    def agreed(self, make: Callable[[], Value]) -> Value:
        """What ``make`` returns on the process that writes, on every process. A ValueError there is raised on all. Collective."""
        told: list[Value | ValueError | None] = [None]
        if self.writes:
            try:
                told[0] = make()
            except ValueError as error:
                told[0] = error
        dist.broadcast_object_list(told, src=0)
        if isinstance(told[0], ValueError):
            raise told[0]
        return told[0]

    def collected(self, answers: Sequence[Answer]) -> list[Answer]:
        """Answers of all copies in their order, on the process that writes; its own elsewhere. Collective."""
        light = [replace(answer, latents=None) for answer in answers]
        if self.count == 1:
            return light
        group = parallel_state.get_data_parallel_group()
        # Ranks that share a decoder have the same answers: only the first of each sends them.
        mine = light if parallel_state.get_tensor_model_parallel_rank() == 0 else []
        parts: list[list[Answer]] | None = [[] for _ in range(self.count)] if self.number == 0 else None
        dist.gather_object(mine, parts, dst=dist.get_global_rank(group, 0), group=group)
        return [answer for part in parts or [light] for answer in part]
