# SPDX-License-Identifier: Apache-2.0
"""Turns plans into packs with pixels: worker processes read, decode and transform ahead of the training loop.

A worker receives a finished plan and draws only by key, so the number of workers changes only the speed. The plans come from a planner
in the training process, or from a process of its own where a step has very many packs (``planned_steps.py``). The saved position is that
of the packs handed out, not of the packs the workers are reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader

from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.pack_reader import PackReader, StepPlan
from megatron_bagel.data.loading.planned_steps import LARGE_BATCH, BatchTotals, PlannedStep, PlannedSteps, StepPlanner
from megatron_bagel.data.loading.reading_process import STOP_PATIENCE, next_record, start_processes
from megatron_bagel.data.loading.replacement import replaced_plan
from megatron_bagel.data.planner.assign import PackPlan, check_divides
from megatron_bagel.data.planner.planner import Planner
from megatron_bagel.platform.launch.signals import StopRequest


@dataclass(frozen=True)
class StepBatch:
    """The data of one replica in one step: its ``packs`` (microbatches), and the ``totals`` of the global batch."""

    packs: list[LoadedPack]
    totals: BatchTotals


class PackLoader:
    """Endless iterator of ``StepBatch`` for one data-parallel replica, starting at the planner's loaded state."""

    def __init__(
        self, planner: Planner, reader: PackReader, replica: int = 0, replicas: int = 1, num_workers: int = 0, prefetch_factor: int = 2,
        sizes: BatchSizes | None = None, large_batch: int = LARGE_BATCH,
    ) -> None:  # fmt: skip
        """Prepare the loader of replica ``replica`` of ``replicas``.

        Each of ``num_workers`` processes reads ``prefetch_factor`` packs ahead; 0 workers read in this process. ``sizes`` of the global
        batches default to the planner's constant size. If there are worker processes, another one plans batches of ``large_batch`` or
        more packs.
        """
        if not 0 <= replica < replicas:
            raise ValueError(f"replica {replica} of {replicas} does not exist")
        self.planner, self.reader = planner, reader
        self.replica, self.replicas = replica, replicas
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.sizes = sizes or BatchSizes.of(planner.config.global_batch_size, [])
        for size in self.sizes.steps:
            check_divides(size, replicas)
        self._plans_aside = num_workers > 0 and max(self.sizes.steps) >= large_batch
        self._position = planner.position_at(planner.packs_made)  # behind the packs handed out
        self._steps: PlannedSteps | None = None
        self._planned: deque[PlannedStep] = deque()  # planned but not yet handed out
        self._planning_error: ValueError | None = None  # kept until the packs planned before it are used up
        self._loaded: Iterator[Any] | None = None  # packs, or what reading processes send in their place
        self._upcoming: StepBatch | None = None  # read ahead; its plan stays in ``_planned`` until it is handed out
        self._upcoming_error: Exception | None = None
        self._stop_request: StopRequest | None = None
        self._patience = STOP_PATIENCE

    @property
    def consumed_packs(self) -> int:
        """Return the packs of the sequence before the next batch."""
        return self._position.packs

    def give_up_after(self, stop_request: StopRequest, patience: float | None = None) -> None:
        """Wait for reading processes at most ``patience`` seconds once ``stop_request`` has a signal."""
        self._stop_request, self._patience = stop_request, STOP_PATIENCE if patience is None else patience

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        error, self._upcoming_error = self._upcoming_error, None
        if error is not None:
            raise error
        batch = self._upcoming or self._read()
        self._upcoming = None
        self._position = self._planned.popleft().position
        return batch

    def _read(self) -> StepBatch:
        """Read the next batch, and leave its plan in front of ``_planned``."""
        packs_per_replica = self.sizes.at(self.consumed_packs) // self.replicas
        try:
            packs = [self._next_pack() for _ in range(packs_per_replica)]
        except Exception:
            self.close()  # the error keeps this object alive, and with it the processes
            raise
        return StepBatch(packs, self._planned[0].totals)

    @property
    def upcoming(self) -> StepBatch | None:
        """Return the batch that ``read_ahead`` has read and that is not handed out yet, or None."""
        return self._upcoming

    def read_ahead(self) -> None:
        """Read the batch that the next call of ``next`` will hand out. The saved position stays in front of it.

        An error, also that no sample is left, is kept until the batch is due, because the step before it can still be trained. After a stop
        signal nothing is read: the batch may never be needed, and the signal leaves little time.
        """
        if self._upcoming is not None or self._upcoming_error is not None or (self._stop_request is not None and self._stop_request.number):
            return
        try:
            self._upcoming = self._read()
        except Exception as error:  # any error is that of the coming step
            self._upcoming_error = error

    def replaced(self, batch: StepBatch, failed: Sequence[tuple[int, int]]) -> StepBatch:
        """Return ``batch`` with other samples at the positions ``failed``, (pack of the batch, sample of the pack).

        They are read in this process. Raises ValueError if a dataset has no sample for a position.
        """
        positions: dict[int, list[int]] = {}
        for pack, sample in failed:
            positions.setdefault(pack, []).append(sample)
        plans = [
            replaced_plan(pack.plan, positions[number], self.reader.sources, self.planner.config) if number in positions else pack.plan
            for number, pack in enumerate(batch.packs)
        ]
        # All images of a step decide who reads which, so where ranks share the images the other packs are read again as well.
        reread = range(len(plans)) if self.reader.share is not None else positions
        packs = [self.reader[StepPlan(tuple(plans), number)] if number in reread else pack for number, pack in enumerate(batch.packs)]
        cost = batch.totals.cost + sum(plan.cost - pack.plan.cost for plan, pack in zip(plans, batch.packs, strict=True))
        return StepBatch(packs, replace(batch.totals, cost=cost))

    def skipped(self) -> list[dict[str, Any]]:
        """Return the first thousand samples that planning skipped, for a log or a file (``Planner.skipped``)."""
        return self._steps.skipped() if self._steps is not None else self.planner.skipped()

    def state_dict(self) -> dict[str, Any]:
        """Return the planner's state after the packs handed out so far, regardless of what the workers have read."""
        return self._position.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state; packs read ahead are discarded."""
        self.close()
        self.planner.load_state_dict(state)
        self._position = self.planner.position_at(self.planner.packs_made)

    def _next_pack(self) -> LoadedPack:
        if self._loaded is None:
            self._loaded = self._start()
        try:
            return next_record(self._loaded, self._stop_request, self._patience) if self.num_workers else next(self._loaded)
        except StopIteration as end:
            raise (self._planning_error or end) from None

    def _start(self) -> Iterator[Any]:
        sampler = _Plans(self)
        if not self.num_workers:
            return iter(DataLoader(self.reader, batch_size=None, sampler=sampler))
        return start_processes(self.reader.__getitem__, sampler, self.num_workers, self.prefetch_factor)

    def close(self) -> None:
        """Stop the workers. Iterating again continues after the packs handed out."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self.num_workers:
            loaded._shutdown_workers()  # type: ignore[attr-defined]  # DataLoader has no public name for it
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        self._planned.clear()
        self._upcoming = self._upcoming_error = None

    def plan_next(self) -> list[PackPlan]:
        """Plan the next global batch after all planned ones, and return this replica's packs of it.

        Plans run ahead of training. So an error in them is kept until its batch is due, and no pack follows: the list is empty.
        """
        if self._steps is None:
            if self._plans_aside and self.planner.packs_made != self.consumed_packs:
                self.planner.load_state_dict(self.state_dict())  # or the new process would plan again what the last one planned
            planner = StepPlanner(self.planner, self.replica, self.replicas)
            self._steps = PlannedSteps(planner, self.sizes, self.consumed_packs, self._plans_aside)
        try:
            step = self._steps.next(self._stop_request, self._patience)
        except ValueError as error:
            self._planning_error = error
            return []
        self._planned.append(step)
        return list(step.plans)


class _Plans:
    """Sampler over this replica's plans. The data loader draws from it whenever a worker is idle."""

    def __init__(self, loader: PackLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[StepPlan]:
        while packs := tuple(self.loader.plan_next()):
            yield from (StepPlan(packs, number) for number in range(len(packs)))
