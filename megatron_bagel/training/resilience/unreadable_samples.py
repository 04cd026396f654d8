"""Samples that cannot be read while training: replaced on all ranks alike, counted, written down; too many of them end the run.

Only the rank that encodes a picture reads it, so only that rank notices; texts are read by all ranks of a replica. Their number is
summed over the world before every step (stop_agreement.py); the rest happens where it is not zero.
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
_FEW = 10  # so many never end a run, whatever share of a young run they are


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read: its replica, the pack's place in that replica's step, the sample's in the pack, and the reason."""

    replica: int
    pack: int
    sample: int
    reason: str


class Replacements:
    """Settles every step's batch before it is trained on. ``count`` is the number of samples replaced since the run began.

    ``next_step`` is the first step this process trains: what a run that was killed wrote down of it and later ones is removed.
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
        """``batch`` as it can be trained on, of whole samples only. Collective over the world.

        Raises ValueError when more than ``max_share`` of the run's samples (those of this step included) could not be read.
        """
        planned = samples_before + sum(len(plan.samples) for plan in batch.plans)
        while failures := self._exchange(batch):
            self.count += len(failures)
            self._write(step, failures)
            if self.count > max(self.max_share * planned, _FEW):
                raise ValueError(
                    f"step {step}: {self.count} of {planned} samples could not be read, more than --max_skipped_share {self.max_share} "
                    f"allows; the last one: {failures[-1].reason}. All are listed in {self._path}; mend the data "
                    "(data_tools/verify_index.py finds what is broken) or raise the flag"
                )
            mine = [failure for failure in failures if failure.replica == self.loader.replica]
            if mine:
                batch = self.loader.replaced(batch, [(failure.pack, failure.sample) for failure in mine])
        return batch

    def _exchange(self, batch: StepBatch) -> list[Failure]:
        """The failures of all replicas, each once, in one order on every rank."""
        own = [
            Failure(self.loader.replica, place, sample, reason)
            for place, pack in enumerate(batch.packs)
            for sample, reason in pack.failures
        ]
        if not self._agreement.exchange(len(own)):
            return []
        everyone: list[Sequence[Failure]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own)
        found: dict[tuple[int, int, int], Failure] = {}
        for failure in (failure for rank in everyone for failure in rank):
            found.setdefault((failure.replica, failure.pack, failure.sample), failure)
        return [found[key] for key in sorted(found)]

    def _write(self, step: int, failures: Sequence[Failure]) -> None:
        if dist.get_rank():
            return
        if self._file is None:
            self._file = MetricsFile(self._path, self._next_step)
        for failure in failures:
            self._file.write({"step": step, "replica": failure.replica, "reason": failure.reason})
