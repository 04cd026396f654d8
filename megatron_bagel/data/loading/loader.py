# SPDX-License-Identifier: Apache-2.0
"""Turns plans into packs with pixels: worker processes read, decode and transform ahead of the training loop.

A worker receives a finished plan and draws only by key, so the number of workers changes only the speed. The plans come from a planner
in the training process. The saved position is that of the packs handed out, not of the packs the workers are reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.pack_reader import PackReader, StepPlan
from megatron_bagel.data.loading.reading_process import (
    POLL_SECONDS,
    STOP_PATIENCE,
    SendingReader,
    check_semaphores,
    next_record,
    start_reading_process,
)
from megatron_bagel.data.loading.replacement import replaced_plan
from megatron_bagel.data.planner.assign import PackPlan, assign_packs
from megatron_bagel.data.planner.planner import Planner
from megatron_bagel.platform.launch.child_processes import reading_context, starting
from megatron_bagel.platform.launch.signals import StopRequest


@dataclass(frozen=True)
class StepBatch:
    """The data of one replica in one step: its ``packs`` (microbatches), and the ``plans`` of the global batch."""

    packs: list[LoadedPack]
    plans: list[PackPlan]


class PackLoader:
    """Endless iterator of ``StepBatch`` for one data-parallel replica, starting at the planner's loaded state."""

    def __init__(
        self, planner: Planner, reader: PackReader, replica: int = 0, replicas: int = 1, num_workers: int = 0, prefetch_factor: int = 2,
        sizes: BatchSizes | None = None,
    ) -> None:  # fmt: skip
        """Prepare the loader of replica ``replica`` of ``replicas``.

        Each of ``num_workers`` processes reads ``prefetch_factor`` packs ahead; 0 workers read in this process. ``sizes`` of the global
        batches default to the planner's constant size.
        """
        if not 0 <= replica < replicas:
            raise ValueError(f"replica {replica} of {replicas} does not exist")
        self.planner, self.reader = planner, reader
        self.replica, self.replicas = replica, replicas
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.consumed_packs = planner.packs_made
        self.sizes = sizes or BatchSizes.of(planner.config.global_batch_size, [])
        for size in self.sizes.steps:
            assign_packs([PackPlan(number, (), 0, 0.0) for number in range(size)], replicas)  # refuses uneven sizes early
        self._batches: list[list[PackPlan]] = []  # planned but not yet handed out
        self._loaded: Iterator[Any] | None = None  # packs, or what reading processes send in their place
        self._stop_request: StopRequest | None = None
        self._patience = STOP_PATIENCE

    def give_up_after(self, stop_request: StopRequest, patience: float | None = None) -> None:
        """Wait for reading processes at most ``patience`` seconds once ``stop_request`` has a signal."""
        self._stop_request, self._patience = stop_request, STOP_PATIENCE if patience is None else patience

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        packs_per_replica = self.sizes.at(self.consumed_packs) // self.replicas
        try:
            packs = [self._next_pack() for _ in range(packs_per_replica)]
        except Exception:
            self.close()  # the error keeps this object alive, and with it the processes
            raise
        plans = self._batches.pop(0)
        self.consumed_packs += len(plans)
        return StepBatch(packs, plans)

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
        new_plans = {plan.number: plan for plan in plans}
        return StepBatch(packs, [new_plans.get(plan.number, plan) for plan in batch.plans])

    def state_dict(self) -> dict[str, Any]:
        """Return the planner's state after the packs handed out so far, regardless of what the workers have read."""
        return self.planner.state_at(self.consumed_packs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after a saved state; packs read ahead are discarded."""
        self.close()
        self.planner.load_state_dict(state)
        self.consumed_packs = self.planner.packs_made

    def _next_pack(self) -> LoadedPack:
        if self._loaded is None:
            self._loaded = self._start()
        return next_record(self._loaded, self._stop_request, self._patience) if self.num_workers else next(self._loaded)

    def _start(self) -> Iterator[Any]:
        sampler = _Plans(self)
        if not self.num_workers:
            return iter(DataLoader(self.reader, batch_size=None, sampler=sampler))
        reader: SendingReader[StepPlan, LoadedPack] = SendingReader(self.reader.__getitem__)
        context = reading_context()
        with starting(f"{self.num_workers} processes that read data", "--num_workers 0 reads in the training process"):
            check_semaphores(context, self.num_workers)
            return iter(
                DataLoader(
                    reader,
                    batch_size=None,
                    sampler=sampler,
                    num_workers=self.num_workers,
                    prefetch_factor=self.prefetch_factor,
                    worker_init_fn=start_reading_process,
                    multiprocessing_context=context,
                    timeout=POLL_SECONDS,
                )
            )

    def close(self) -> None:
        """Stop the workers. Iterating again continues after the packs handed out."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self.num_workers:
            loaded._shutdown_workers()  # type: ignore[attr-defined]  # DataLoader has no public name for it
        self._batches.clear()

    def plan_next(self) -> list[PackPlan]:
        """Plan the next global batch after all planned ones, and return this replica's packs of it."""
        first_pack = self.consumed_packs + sum(map(len, self._batches))
        plans = self.planner.packs(first_pack, self.sizes.at(first_pack))
        self._batches.append(plans)
        return assign_packs(plans, self.replicas)[self.replica]


class _Plans:
    """Sampler over this replica's plans. The data loader draws from it whenever a worker is idle."""

    def __init__(self, loader: PackLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[StepPlan]:
        while True:
            packs = tuple(self.loader.plan_next())
            yield from (StepPlan(packs, number) for number in range(len(packs)))
