# SPDX-License-Identifier: Apache-2.0
"""Chooses the steps that are logged and makes their records: losses by dataset, rates since the last record, times and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_bagel import platform
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.costs.flops import mfu_flops, work_flops
from megatron_bagel.costs.freezing import FreezeSettings
from megatron_bagel.data.loading.loader import StepBatch
from megatron_bagel.training.observability.logging_sinks import RunLog
from megatron_bagel.training.observability.loss_table import LossTable, losses_by_dataset
from megatron_bagel.training.observability.metrics import RateWindow, StepMetrics
from megatron_bagel.training.observability.step_stats import compared_over_ranks, composition
from megatron_bagel.training.observability.timers import Timers
from megatron_bagel.training.step_result import StepDone


@dataclass(frozen=True)
class StepLogSettings:
    """Settings of the records of steps.

    Attributes:
        log_every: The number of steps between records.
        total_steps: The number of steps of the run; the last step is logged too.
        pack_tokens: The capacity of a pack.
        replicas: The number of data-parallel replicas.
        frozen: What does not train, for the work of a step.
    """

    log_every: int
    total_steps: int
    pack_tokens: int
    replicas: int
    frozen: FreezeSettings = field(default_factory=FreezeSettings)


class StepLog:
    """Counts every step and makes records of some steps."""

    def __init__(
        self, settings: StepLogSettings, arch: BagelArch, datasets: Sequence[str], log: RunLog, timers: Timers, window: RateWindow
    ) -> None:
        """Take the parts that records are made from and written to.

        Args:
            settings: The settings of the records.
            arch: The model.
            datasets: The full names of all datasets that can occur, in the same order on every rank.
            log: Where records are written.
            timers: The timers of the phases of a step.
            window: Counts tokens and operations since the last record.
        """
        self._settings, self._arch, self._datasets = settings, arch, datasets
        self._log, self._timers, self.window = log, timers, window

    def table(self, step: int) -> LossTable | None:
        """Return an empty table for the losses of a step that will be logged, or None for other steps."""
        is_logged = step % self._settings.log_every == 0 or step + 1 == self._settings.total_steps
        return LossTable(self._datasets) if is_logged else None

    def add(self, done: StepDone, batch: StepBatch, table: LossTable | None) -> None:
        """Count a step, and log it if it has a ``table``. Collective over the world in logged steps.

        Args:
            done: The finished step.
            batch: The global batch, with the packs of this replica.
            table: The losses of this rank by dataset, for a step that is logged.
        """
        work = done.result.work
        flops = work_flops(self._arch, work, self._settings.frozen.decoder_weights, self._settings.frozen.vit_forward_only).total
        self.window.add(work.tokens, mfu_flops(self._arch.llm, work), flops)
        if table is not None:
            by_dataset, observed = losses_by_dataset(table), self._observed(done, batch)
            self._log.log(StepMetrics(done, self.window.close(), platform.peak_memory_bytes(), by_dataset, observed))

    def _observed(self, done: StepDone, batch: StepBatch) -> dict[str, float]:
        result, seconds = done.result, self._timers.read(self.window.steps)
        counts = composition(result.work, result.tasks, batch.totals.packs, self._settings.pack_tokens)
        experts = result.experts.metrics() if result.experts is not None else {}
        return counts | experts | compared_over_ranks(seconds, batch, result.work.tokens, self._settings.replicas)
