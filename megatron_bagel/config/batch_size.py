# SPDX-License-Identifier: Apache-2.0
"""The number of packs in a global batch: constant, or growing over the first packs of a run (``--rampup_batch_size``).

The size is a function of the packs trained on so far. A run that resumes, with any parallel sizes, continues with the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """The packs of a global batch at every point of a run. The rule is Megatron's, with packs for samples.

    Attributes:
        final: Size after the ramp.
        start: Size at the start of the run. Without a ramp it equals ``final``.
        increment: Growth at a time. Every size of the ramp lasts equally many packs. 0 without a ramp.
        packs: Packs after which the ramp ends. 0 without a ramp.
    """

    final: int
    start: int
    increment: int = 0
    packs: int = 0

    @classmethod
    def of(cls, final: int, rampup: Sequence[int]) -> BatchSizes:
        """Return the sizes that ``--rampup_batch_size START INCREMENT PACKS`` asks for. An empty list means no ramp.

        Raises:
            ValueError: for values that make no ramp.
        """
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
        """All sizes of the run, smallest first."""
        return list(range(self.start, self.final, self.increment)) + [self.final] if self.increment else [self.final]

    def at(self, packs: int) -> int:
        """Return the size of the global batch that begins after ``packs`` packs."""
        if not self.increment or packs > self.packs:
            return self.final
        # In integers, where Megatron-Core divided floats; its calculator of this name is gone in 0.19.
        increments = (self.final - self.start) // self.increment
        return self.start + packs * increments // self.packs * self.increment


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
