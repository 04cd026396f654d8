# SPDX-License-Identifier: Apache-2.0
"""Replaces samples that cannot be read during training, on all ranks alike, and lists them. Too many of them end the run.

Only the rank that encodes a picture reads it, so only that rank notices a failure; all ranks of a replica read its texts. The number of
failures is summed over the world before every step (``stop_agreement.py``). Ranks exchange the failures only if there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.data.loading.loader import PackLoader, StepBatch
from megatron_bagel.training.observability.metrics_file import MetricsFile
from megatron_bagel.training.resilience.stop_agreement import StepAgreement

SKIPPED = "skipped.jsonl"
_ALWAYS_ALLOWED = 10  # failures that never end a run, even if they are a large share of its first samples


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read: its replica, the index of the pack in the replica's step, its index in the pack, and the reason."""

    replica: int
    pack: int
    sample: int
    reason: str


class Replacements:
    """Replaces unreadable samples in the batch of every step. ``count`` is the number of samples replaced since the run began.

    ``next_step`` is the first step that this process trains. Entries of this and later steps, which a killed run wrote, are removed.
    """

    def __init__(
        self, loader: PackLoader, results_dir: str | Path, max_share: float, count: int = 0, next_step: int = 0,
        agreement: StepAgreement | None = None,
    ) -> None:  # fmt: skip
        self.loader, self.max_share, self.count = loader, max_share, count
        self._path, self._next_step = Path(results_dir) / SKIPPED, next_step
        self._file = MetricsFile(self._path, next_step) if dist.get_rank() == 0 and self._path.exists() else None
        self._agreement = agreement or StepAgreement()

    def settle(self, batch: StepBatch, step: int, samples_before: int) -> StepBatch:
        """Return ``batch`` with unreadable samples replaced. Collective over the world.

        Args:
            batch: The batch as it was loaded.
            step: The number of the step.
            samples_before: The number of samples that the run trained on before this step.

        Raises:
            ValueError: More than ``max_share`` of the run's samples, including this step, could not be read.
        """
        planned = samples_before + batch.totals.samples
        while failures := self._exchange(batch):
            self.count += len(failures)
            self._write(step, failures)
            if self.count > max(self.max_share * planned, _ALWAYS_ALLOWED):
                raise ValueError(
                    f"step {step}: {self.count} of {planned} samples could not be read, more than --max_skipped_share {self.max_share} "
                    f"allows. The last one: {failures[-1].reason}. {self._path} lists all of them. Repair the data "
                    "(data_tools/verify_index.py finds what is damaged) or raise the flag"
                )
            local_failures = [failure for failure in failures if failure.replica == self.loader.replica]
            if local_failures:
                batch = self.loader.replaced(batch, [(failure.pack, failure.sample) for failure in local_failures])
        return batch

    def _exchange(self, batch: StepBatch) -> list[Failure]:
        """Return the failures of all replicas, each once and in the same order on every rank."""
        local_failures = [
            Failure(self.loader.replica, index, sample, reason)
            for index, pack in enumerate(batch.packs)
            for sample, reason in pack.failures
        ]
        if not self._agreement.exchange(len(local_failures)):
            return []
        failures_by_rank: list[Sequence[Failure]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(failures_by_rank, local_failures)
        failures: dict[tuple[int, int, int], Failure] = {}
        for failure in (failure for rank_failures in failures_by_rank for failure in rank_failures):
            failures.setdefault((failure.replica, failure.pack, failure.sample), failure)
        return [failures[key] for key in sorted(failures)]

    def _write(self, step: int, failures: Sequence[Failure]) -> None:
        if dist.get_rank():
            return
        if self._file is None:
            self._file = MetricsFile(self._path, self._next_step)
        for failure in failures:
            self._file.write({"step": step, "replica": failure.replica, "reason": failure.reason})
