"""The numbers of one optimizer step, and the run's progress after it: made where they are known, and handed on as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_bagel.costs.flops import StepWork
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.training.losses import LossTotals, StepLosses
from megatron_bagel.training.optim.optimizer import StepOutcome


@dataclass(frozen=True)
class TaskCounts:
    """Tokens and samples of each task (dataset group). Additive over packs and ranks as a list of numbers."""

    tokens: Mapping[str, int]
    samples: Mapping[str, int]

    @classmethod
    def of(cls, packs: Sequence[LoadedPack], tasks: Sequence[str]) -> TaskCounts:
        """Of some packs; every sample's group is among ``tasks``."""
        tokens, samples = dict.fromkeys(tasks, 0), dict.fromkeys(tasks, 0)
        for loaded in packs:
            for sample, length in zip(loaded.pack.samples, loaded.pack.sample_lens, strict=True):
                task = group_of(sample.dataset)
                tokens[task] += int(length)
                samples[task] += 1
        return cls(tokens, samples)

    def to_list(self) -> list[float]:
        """As numbers that can be summed over ranks."""
        return [float(number) for counts in (self.tokens, self.samples) for number in counts.values()]

    @classmethod
    def from_list(cls, numbers: Sequence[float], tasks: Sequence[str]) -> TaskCounts:
        """Inverse of ``to_list``."""
        whole = [int(number) for number in numbers]
        return cls(dict(zip(tasks, whole, strict=False)), dict(zip(tasks, whole[len(tasks) :], strict=True)))


def group_of(dataset: str) -> str:
    """The group of a dataset's full name."""
    return dataset.split("/", 1)[0]


@dataclass(frozen=True)
class StepResult:
    """What a step over the whole global batch came to.

    Attributes:
        losses: means over the global batch.
        outcome: whether the update was made, and the gradient norm.
        totals: the tokens that the losses are means over.
        work: what the batch asked of the model.
        samples: samples of the batch.
        lr: the step's learning rate, also where no update was made.
        tasks: counts by task; only steps that are logged have them.
    """

    losses: StepLosses
    outcome: StepOutcome
    totals: LossTotals
    work: StepWork
    samples: int
    lr: float
    tasks: TaskCounts | None = None


@dataclass(frozen=True)
class Counters:
    """Progress that is not in any tensor.

    Attributes:
        steps: steps done.
        samples: samples trained on.
        tokens: tokens trained on.
        skipped: samples that were replaced because they could not be read.
        bad_steps: updates that were left out.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    bad_steps: int = 0

    def after(self, result: StepResult, skipped: int, bad_steps: int) -> Counters:
        """The counters with one more step; ``skipped`` and ``bad_steps`` have been counted since the run began."""
        return replace(
            self, steps=self.steps + 1, samples=self.samples + result.samples, tokens=self.tokens + result.work.tokens,
            skipped=skipped, bad_steps=bad_steps,
        )  # fmt: skip


@dataclass(frozen=True)
class StepDone:
    """A step that is over, as hooks and the log see it: its result, the counters after it, and how many seconds it took."""

    result: StepResult
    counters: Counters
    seconds: float

    @property
    def step(self) -> int:
        """The step's number; the first step of a run is 0."""
        return self.counters.steps - 1
