"""What one rank does to the file system and all must know: a failure there is an error on every rank, not a wait for a lost one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_first_rank(action: Callable[[], T], purpose: str) -> T:
    """Let rank 0 do `action`; its (picklable) result on all ranks. Collective; also works without a process group.

    Raises ValueError on every rank, beginning with `purpose`, when the file system or a check refused.
    """
    answer: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer[0] = action()
        except (OSError, ValueError) as error:
            answer[1] = f"{purpose}: {error}"
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def from_all_ranks(findings: list[str]) -> list[str]:
    """The findings of all ranks, in rank order. Collective."""
    if not dist.is_initialized():
        return findings
    everyone: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, findings)
    return [finding for part in everyone for finding in part or []]
