# SPDX-License-Identifier: Apache-2.0
"""Plans the steps of one replica ahead of training: in this process, or in a process of its own where a step has very many packs.

Every rank plans the whole global batch, and that is the only work of a host which grows with the number of ranks. What training needs of
it does not grow: the packs of its replica, four sums over the global batch, and the planner's position for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.data.loading.reading_process import STOP_PATIENCE, next_record, start_processes
from megatron_bagel.data.planner.assign import PackPlan, pack_owners
from megatron_bagel.data.planner.planner import Planner
from megatron_bagel.data.planner.position import PlannerPosition
from megatron_bagel.data.planner.stream import NoSampleLeft
from megatron_bagel.platform.launch.signals import StopRequest

#: Packs of a global batch from which a process of its own plans them; fewer take a few milliseconds per step.
LARGE_BATCH = 256
_STEPS_AHEAD = 4  # steps that the process plans before they are asked for


@dataclass(frozen=True)
class BatchTotals:
    """Sums over a global batch: its packs, their samples, and their cost in decoder tokens."""

    packs: int
    samples: int
    cost: float


@dataclass(frozen=True)
class PlannedStep:
    """A global batch as one replica sees it.

    Attributes:
        plans: The packs of this replica, in canonical order.
        totals: Sums over the global batch.
        position: The point in the sequence behind the batch.
        skipped: The samples that planning skipped since the last step (``Planner.skipped``); empty if the planner is in this process.
    """

    plans: tuple[PackPlan, ...]
    totals: BatchTotals
    position: PlannerPosition
    skipped: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class _NothingLeft:
    """What a planning process sends in place of a step that it cannot plan, because no sample is left."""

    reason: str


class StepPlanner:
    """Plans the share of replica ``replica`` of ``replicas`` in a global batch."""

    def __init__(self, planner: Planner, replica: int, replicas: int) -> None:
        self.planner, self.replica, self.replicas = planner, replica, replicas

    def plan(self, batch: tuple[int, int]) -> PlannedStep:
        """Plan the ``batch``, given as (first pack, packs)."""
        table = self.planner.table(*batch)
        owned = (pack_owners(table.costs, self.replicas) == self.replica).nonzero()[0].tolist()
        totals = BatchTotals(len(table), len(table.picks), float(table.costs.sum()))
        return PlannedStep(tuple(table.plan(offset) for offset in owned), totals, self.planner.position_at(sum(batch)))


class _RemotePlanner:
    """The planner in its process. It also reports the samples that it has skipped since the last batch."""

    def __init__(self, planner: StepPlanner) -> None:
        self._planner, self._reported = planner, len(planner.planner.skips.reasons)

    def plan(self, batch: tuple[int, int]) -> PlannedStep | _NothingLeft:
        try:
            step = self._planner.plan(batch)
        except NoSampleLeft as end:
            return _NothingLeft(str(end))  # an error would arrive without its class
        skips = self._planner.planner.skips
        if len(skips.reasons) == self._reported:
            return step
        skipped = self._planner.planner.skipped()[self._reported :]
        self._reported += len(skipped)
        return PlannedStep(step.plans, step.totals, step.position, tuple(skipped))


class PlannedSteps:
    """Endless iterator of the steps of one replica from ``first_pack`` on."""

    def __init__(self, planner: StepPlanner, sizes: BatchSizes, first_pack: int, in_process: bool) -> None:
        """Begin to plan; ``in_process`` starts a process for it.

        Raises ValueError if the process cannot be started.
        """
        self._batches = _batches(sizes, first_pack)
        self._planner = planner
        self._skipped: list[dict[str, Any]] = []
        self._sent: Iterator[Any] | None = None
        if in_process:
            self._sent = start_processes(_RemotePlanner(planner).plan, _Requests(self._batches), 1, _STEPS_AHEAD)

    def next(self, stop_request: StopRequest | None = None, patience: float = STOP_PATIENCE) -> PlannedStep:
        """Return the next step, and wait for the planning process at most ``patience`` seconds once ``stop_request`` has a signal.

        Raises:
            ReadingError: The planning process failed or ended, or did not answer in time after a stop signal.
            NoSampleLeft: There is nothing left to plan.
        """
        if self._sent is None:
            return self._planner.plan(next(self._batches))
        step: PlannedStep | _NothingLeft = next_record(self._sent, stop_request, patience)
        if isinstance(step, _NothingLeft):
            raise NoSampleLeft(step.reason)
        self._skipped += step.skipped
        return step

    def skipped(self) -> list[dict[str, Any]]:
        """Return the first thousand samples that planning skipped, as ``Planner.skipped`` does."""
        return self._planner.planner.skipped() + self._skipped

    def close(self) -> None:
        """Stop the planning process, if there is one."""
        if self._sent is not None:
            self._sent._shutdown_workers()  # type: ignore[attr-defined]  # DataLoader has no public name for it


class _Requests:
    """The batches as a sampler of DataLoader."""

    def __init__(self, batches: Iterator[tuple[int, int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self._batches


def _batches(sizes: BatchSizes, first_pack: int) -> Iterator[tuple[int, int]]:
    """Yield (first pack, packs) of the global batches from ``first_pack`` on."""
    while True:
        size = sizes.at(first_pack)
        yield first_pack, size
        first_pack += size
