# SPDX-License-Identifier: Apache-2.0
"""Run an action on one rank and share its result: a failure becomes an error on every rank, and no rank waits for a lost one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_first_rank(action: Callable[[], T], purpose: str) -> T:
    """Run ``action`` on rank 0 and return its picklable result on all ranks. Collective; also works without a process group.

    Raises:
        ValueError: On every rank, with a message that begins with ``purpose``, if ``action`` raises OSError or ValueError.
    """
    result_and_error: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result_and_error[0] = action()
        except (OSError, ValueError) as error:
            result_and_error[1] = f"{purpose}: {error}"
    if dist.is_initialized():
        dist.broadcast_object_list(result_and_error, src=0)
    if result_and_error[1] is not None:
        raise ValueError(result_and_error[1])
    return result_and_error[0]


def from_all_ranks(findings: list[str]) -> list[str]:
    """Return the findings of all ranks in rank order. Collective."""
    if not dist.is_initialized():
        return findings
    findings_by_rank: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(findings_by_rank, findings)
    return [finding for rank_findings in findings_by_rank for finding in rank_findings or []]
