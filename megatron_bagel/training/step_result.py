# SPDX-License-Identifier: Apache-2.0
"""The numbers of one optimizer step and the run's progress after it. Each is computed once and travels unchanged to the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_bagel.costs.flops import StepWork
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.training.expert_loads import ExpertLoads
from megatron_bagel.training.losses import LossTotals, StepLosses
from megatron_bagel.training.optim.optimizer import StepOutcome


@dataclass(frozen=True)
class TaskCounts:
    """Tokens and samples of each task (dataset group). Additive over packs and ranks as a list of numbers."""

    tokens: Mapping[str, int]
    samples: Mapping[str, int]

    @classmethod
    def of(cls, packs: Sequence[LoadedPack], tasks: Sequence[str]) -> TaskCounts:
        """Count the tokens and samples of ``packs``. Every sample's group must be among ``tasks``."""
        tokens, samples = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)
        for loaded in packs:
            for sample, length in zip(loaded.pack.samples, loaded.pack.sample_lens, strict=True):
                task = group_of(sample.dataset)
                tokens[task] += int(length)
                samples[task] += 1
        return cls(tokens, samples)

    def to_list(self) -> list[float]:
        """Return the counts as numbers that can be summed over ranks."""
        return [float(number) for counts in (self.tokens, self.samples) for number in counts.values()]

    @classmethod
    def from_list(cls, numbers: Sequence[float], tasks: Sequence[str]) -> TaskCounts:
        """Return the counts of a list that ``to_list`` made; ``tasks`` are in the same order."""
        counts = [int(number) for number in numbers]
        return cls(dict(zip(tasks, counts, strict=False)), dict(zip(tasks, counts[len(tasks) :], strict=True)))


def group_of(dataset: str) -> str:
    """Return the dataset group in a dataset's full name."""
    return dataset.split("/", 1)[0]


@dataclass(frozen=True)
class StepResult:
    """Results of one step, over the whole global batch.

    Attributes:
        losses: The means over the global batch.
        outcome: Whether the update was made, and the gradient norm.
        totals: The token counts that the losses are averaged over.
        work: The work of the batch, from which its operations are counted.
        samples: The number of samples in the batch.
        lr: The step's learning rate, even if no update was made.
        tasks: Counts by task; only steps that are logged have them.
        experts: Loads of sparse experts; only logged steps of a model with experts have them.
    """

    losses: StepLosses
    outcome: StepOutcome
    totals: LossTotals
    work: StepWork
    samples: int
    lr: float
    tasks: TaskCounts | None = None
    experts: ExpertLoads | None = None


@dataclass(frozen=True)
class Counters:
    """Progress of a run, counted from its beginning.

    Attributes:
        steps: Steps done.
        samples: Samples trained on.
        tokens: Tokens trained on.
        skipped: Samples that were replaced because they could not be read.
        bad_steps: Updates that were left out.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    bad_steps: int = 0

    def after(self, result: StepResult, skipped: int, bad_steps: int) -> Counters:
        """Return the counters after one more step. ``skipped`` and ``bad_steps`` are the totals since the run began."""
        return replace(
            self, steps=self.steps + 1, samples=self.samples + result.samples, tokens=self.tokens + result.work.tokens,
            skipped=skipped, bad_steps=bad_steps,
        )  # fmt: skip


@dataclass(frozen=True)
class StepDone:
    """A finished step, as hooks and the log see it: its result, the counters after it, and its duration in seconds."""

    result: StepResult
    counters: Counters
    seconds: float

    @property
    def step(self) -> int:
        """Return the step's number; the first step of a run is 0."""
        return self.counters.steps - 1
