"""A sample whose picture cannot be read at run time is replaced by the next one of its dataset that fits into its place.

Which one that is follows from the plan and the index alone, so every rank that hears of the failure makes the same new plan. The
sequence of packs does not change: the next sample comes in its own place too, once more in this epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.planner.cost_model import COST_UNIT, SampleSource
from megatron_bagel.data.planner.planner import PlannerConfig

_LOOKAHEAD = 64  # samples measured at once
_TRIES = 64  # runs of them looked through


class SiblingSource(SampleSource, Protocol):
    """A source that knows its datasets."""

    def siblings(self, index: int) -> range:
        """Indexes of the run of the source's samples, all of one dataset, that ``index`` belongs to."""
        ...


def replaced_plan(plan: PackPlan, failed: Collection[int], sources: Sequence[SiblingSource], limits: PlannerConfig) -> PackPlan:
    """``plan`` without the samples at the places ``failed``, each replaced by the next of its dataset that is short enough.

    Where a dataset has none the pack goes without. Raises ValueError when nothing is left of the pack.
    """
    samples: list[tuple[int, int, int] | None] = list(plan.samples)
    weights = [_weights(sources, sample) for sample in samples]
    for place in sorted(failed):
        room = limits.max_num_tokens - sum(tokens for other, (tokens, _) in enumerate(weights) if other != place)
        samples[place] = _next_fitting(plan.samples[place], samples, sources, room, limits.max_num_tokens_per_sample)
        weights[place] = _weights(sources, samples[place]) if samples[place] is not None else (0, 0)
    left = tuple(sample for sample in samples if sample is not None)
    if not left:
        source, index, _ = plan.samples[0]
        raise ValueError(
            f"{sources[source].describe(index)} cannot be read, and its dataset has no other sample to replace it; "
            "check the index with data_tools/verify_index.py"
        )
    tokens, cost = (sum(column) for column in zip(*weights, strict=True))
    return dataclasses.replace(plan, samples=left, tokens=tokens, cost=cost / COST_UNIT)


def _weights(sources: Sequence[SiblingSource], sample: tuple[int, int, int]) -> tuple[int, int]:
    """(tokens, cost) of one sample."""
    source, index, epoch = sample
    measures = sources[source].measure(np.array([index]), epoch)
    return int(measures.tokens[0]), int(measures.cost[0])


def _next_fitting(
    sample: tuple[int, int, int], taken: Collection[object], sources: Sequence[SiblingSource], room: int, longest: int
) -> tuple[int, int, int] | None:
    source, index, epoch = sample
    siblings = sources[source].siblings(index)
    begin, size = index - siblings.start, len(siblings)
    for run in range(0, min(size - 1, _LOOKAHEAD * _TRIES), _LOOKAHEAD):
        steps = np.arange(run + 1, min(run + _LOOKAHEAD, size - 1) + 1)
        indexes = siblings.start + (begin + steps) % size
        measures = sources[source].measure(indexes, epoch)
        fits = (measures.tokens <= room) & (measures.tokens > 0) & (measures.full_tokens <= longest)
        for found in indexes[fits].tolist():
            if (source, found, epoch) not in taken:
                return source, found, epoch
    return None
