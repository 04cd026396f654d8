# SPDX-License-Identifier: Apache-2.0
"""Copies of the model that answer prompts in parallel, if more processes were launched than share one decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel.inference.batch.requests import Answer

Value = TypeVar("Value")


@dataclass(frozen=True)
class Replicas:
    """This process's copy of the model is ``number`` of ``count``; rank 0 is the process that ``writes``."""

    number: int
    count: int
    writes: bool

    @classmethod
    def launched(cls) -> Replicas:
        """Return the copies of the existing process groups."""
        group = parallel_state.get_data_parallel_group()
        return cls(dist.get_rank(group), dist.get_world_size(group), dist.get_rank() == 0)

    def agreed(self, make: Callable[[], Value]) -> Value:
        """Call ``make`` on the writing process and return its result on all; so is a ValueError raised on all. Collective."""
        result_or_error: list[Any] = [None]
        if self.writes:
            try:
                result_or_error[0] = make()
            except ValueError as error:
                result_or_error[0] = error
        dist.broadcast_object_list(result_or_error, src=0)
        if isinstance(result_or_error[0], ValueError):
            raise result_or_error[0]
        result: Value = result_or_error[0]
        return result

    def collected(self, answers: Sequence[Answer]) -> list[Answer]:
        """Return the answers of all copies in order on the writing process, and this process's answers elsewhere. Collective."""
        light_answers = [replace(answer, latents=None) for answer in answers]
        if self.count == 1:
            return light_answers
        group = parallel_state.get_data_parallel_group()
        # Ranks that share a decoder have the same answers, so only the first of them sends its answers.
        local_answers = light_answers if parallel_state.get_tensor_model_parallel_rank() == 0 else []
        answers_by_copy: list[list[Answer]] | None = [[] for _ in range(self.count)] if self.number == 0 else None
        dist.gather_object(local_answers, answers_by_copy, dst=dist.get_global_rank(group, 0), group=group)
        return [answer for copy_answers in answers_by_copy or [light_answers] for answer in copy_answers]
