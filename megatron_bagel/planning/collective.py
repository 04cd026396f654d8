# SPDX-License-Identifier: Apache-2.0
"""One collective of a training step, with its size and the ranks that take part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Collective:
    """Calls of one collective in a step.

    Attributes:
        axis: The parallel axis: tensor, context, expert, pipeline, data or encoders.
        payload: What the collective transports.
        kind: The operation, such as all_reduce.
        ranks: The number of ranks in the group.
        size: The bytes of one call: of the full tensor for all_reduce, all_gather and reduce_scatter; of what a rank sends for
            all_to_all and send.
        count: The number of calls.
        span: The distance in the world between the first and the last rank of the group, including both.
    """

    axis: str
    payload: str
    kind: str
    ranks: int
    size: int
    count: int
    span: int

    @property
    def sent(self) -> float:
        """Return the bytes that a rank sends in all calls together, by the ring algorithms."""
        share = {"all_reduce": 2.0 * (self.ranks - 1) / self.ranks, "send": 1.0, "all_to_all": 1.0}
        return self.count * self.size * share.get(self.kind, (self.ranks - 1) / self.ranks)
