"""How many packs a global batch has: the same always, or growing over the first packs of a run (``--rampup_batch_size``).

The size is a function of the packs trained on so far, so a run that resumes, on any layout, continues with the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """Packs per global batch: ``final`` from ``packs`` packs on, before that from ``start`` up in steps of ``increment``.

    Without a ramp ``start`` is ``final`` and the other two are 0. The rule is Megatron's, with packs for samples:
    every increment lasts equally many packs.
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
        # In integers, where Megatron-Core divided floats; its calculator of this name is gone in 0.19.
        increments = (self.final - self.start) // self.increment
        return self.start + packs * increments // self.packs * self.increment


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
