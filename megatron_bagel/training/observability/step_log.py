"""Which steps are logged, and what is measured for that: losses by dataset, rates since the last record, how the steps went."""

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
    """Which steps are logged, and the sizes that their numbers are related to.

    Attributes:
        log_every: steps between records.
        total_steps: steps of the run; the last one is logged too.
        pack_tokens: capacity of a pack.
        replicas: data-parallel replicas.
        frozen: what does not train, for the work of a step.
    """

    log_every: int
    total_steps: int
    pack_tokens: int
    replicas: int
    frozen: FreezeSettings = field(default_factory=FreezeSettings)


class StepLog:
    """Turns steps into records. Every step is counted; records are made of some."""

    def __init__(
        self, settings: StepLogSettings, arch: BagelArch, datasets: Sequence[str], log: RunLog, timers: Timers, window: RateWindow
    ) -> None:
        """``datasets`` are the full names of all that can occur, in one order on every rank."""
        self._settings, self._arch, self._datasets = settings, arch, datasets
        self._log, self._timers, self.window = log, timers, window

    def table(self, step: int) -> LossTable | None:
        """An empty table for the losses of a step that will be logged; None for other steps."""
        logged = step % self._settings.log_every == 0 or step + 1 == self._settings.total_steps
        return LossTable(self._datasets) if logged else None

    def add(self, done: StepDone, batch: StepBatch, table: LossTable | None) -> None:
        """Count a step, and log it if it has a ``table``. ``batch`` is this replica's. Collective over the world in logged steps."""
        work = done.result.work
        flops = work_flops(self._arch, work, self._settings.frozen.llm, self._settings.frozen.vit).total
        self.window.add(work.tokens, mfu_flops(self._arch.llm, work), flops)
        if table is not None:
            by_dataset, observed = losses_by_dataset(table), self._observed(done, batch)
            self._log.log(StepMetrics(done, self.window.close(), platform.peak_memory_bytes(), by_dataset, observed))

    def _observed(self, done: StepDone, batch: StepBatch) -> dict[str, float]:
        result, seconds = done.result, self._timers.read(self.window.steps)
        counts = composition(result.work, result.tasks, len(batch.plans), self._settings.pack_tokens)
        return counts | compared_over_ranks(seconds, batch, result.work.tokens, self._settings.replicas)
