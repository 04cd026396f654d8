"""How many packs a global batch has: the same always, or growing over the first packs of a run (``--rampup_batch_size``).

The size is a function of the packs trained on so far, so a run that resumes, on any layout, continues with the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Packs per global batch: ``final`` from ``packs`` packs on, before that from ``start`` up in steps of ``increment``.

    Without a ramp ``start`` is ``final`` and the other two are 0. The rule is Megatron's, with packs for samples.
    """

    final: int
    start: int
    increment: int = 0
    packs: int = 0

    @classmethod
    def of(cls, final: int, rampup: Sequence[int]) -> BatchSizes:
        """From ``--rampup_batch_size START INCREMENT PACKS`` (empty: no ramp). Raises ValueError for values that make no ramp."""
        if not rampup:
            return cls(final, final)
        if len(rampup) != 3:
            raise ValueError(f"--rampup_batch_size {_words(rampup)}: expected three numbers: first size, increment, packs to ramp over")
        start, increment, packs = rampup
        if start < 1 or increment < 1 or packs < 1:
            raise ValueError(f"--rampup_batch_size {_words(rampup)}: all three numbers must be at least 1")
        if start >= final or (final - start) % increment:
            raise ValueError(
                f"--rampup_batch_size {_words(rampup)}: the size must grow from {start} in steps of {increment} to --global_batch_size, "
                f"which is {final}; {final + -(final - start) % increment if start < final else start + increment} would do"
            )
        return cls(final, start, increment, packs)

    @property
    def steps(self) -> list[int]:
        """Every size there is, smallest first."""
        return list(range(self.start, self.final, self.increment)) + [self.final] if self.increment else [self.final]

    def at(self, packs: int) -> int:
        """Packs of the global batch that begins after ``packs`` packs."""
        if not self.increment or packs > self.packs:
            return self.final
        # Settings are checked before the platform is in place, and Megatron-Core must not be imported earlier.
        from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

        ramp = RampupBatchsizeNumMicroBatchesCalculator(
            global_batch_size=self.final,
            micro_batch_size=1,
            data_parallel_size=1,
            decrease_batch_size_if_needed=False,
            # Not rank 0's, which would write a log line each time; the run's own log has the size of every step.
            rank=-1,
            start_global_batch_size=self.start,
            batch_size_increment=self.increment,
            ramup_samples=self.packs,
        )
        ramp.update(packs, consistency_check=False)
        return ramp.get_current_running_global_batch_size()


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
