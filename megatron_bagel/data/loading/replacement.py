# SPDX-License-Identifier: Apache-2.0
"""Replaces a sample whose picture cannot be read at run time by the next sample of its dataset that fits into the pack.

The plan and the index alone decide which sample that is, so every rank that learns of the failure makes the same new plan. The
sequence of packs does not change: the substitute also appears at its original position, so it comes twice in this epoch.
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
_MAX_RUNS = 64  # runs of samples that are searched


class SiblingSource(SampleSource, Protocol):
    """A source that can tell which samples belong to the same dataset."""

    def siblings(self, index: int) -> range:
        """Return the source's indexes of the run, all of one dataset, that contains ``index``."""
        ...


def replaced_plan(plan: PackPlan, failed: Collection[int], sources: Sequence[SiblingSource], limits: PlannerConfig) -> PackPlan:
    """Return ``plan`` with the samples at the positions ``failed`` replaced by the next ones of their datasets that are short enough.

    A sample without such a substitute is dropped. Raises ValueError if no sample remains.
    """
    samples: list[tuple[int, int, int] | None] = list(plan.samples)
    weights = [_weights(sources, sample) for sample in plan.samples]
    for position in sorted(failed):
        room = limits.max_num_tokens - sum(tokens for number, (tokens, _) in enumerate(weights) if number != position)
        substitute = _next_fitting(plan.samples[position], samples, sources, room, limits.max_num_tokens_per_sample)
        samples[position] = substitute
        weights[position] = _weights(sources, substitute) if substitute is not None else (0, 0)
    remaining = tuple(sample for sample in samples if sample is not None)
    if not remaining:
        source, index, _ = plan.samples[0]
        raise ValueError(
            f"{sources[source].describe(index)} cannot be read, and its dataset has no other sample to replace it; "
            "check the index with data_tools/verify_index.py"
        )
    tokens, cost = (sum(column) for column in zip(*weights, strict=True))
    return dataclasses.replace(plan, samples=remaining, tokens=tokens, cost=cost / COST_UNIT)


def _weights(sources: Sequence[SiblingSource], sample: tuple[int, int, int]) -> tuple[int, int]:
    """Return the tokens and the cost of one sample."""
    source, index, epoch = sample
    measures = sources[source].measure(np.array([index]), epoch)
    return int(measures.tokens[0]), int(measures.cost[0])


def _next_fitting(
    sample: tuple[int, int, int], used_samples: Collection[object], sources: Sequence[SiblingSource], room: int, max_tokens: int
) -> tuple[int, int, int] | None:
    source, index, epoch = sample
    siblings = sources[source].siblings(index)
    offset, size = index - siblings.start, len(siblings)
    for run in range(0, min(size - 1, _LOOKAHEAD * _MAX_RUNS), _LOOKAHEAD):
        steps = np.arange(run + 1, min(run + _LOOKAHEAD, size - 1) + 1)
        indexes = siblings.start + (offset + steps) % size
        measures = sources[source].measure(indexes, epoch)
        is_usable = (measures.tokens <= room) & (measures.tokens > 0) & (measures.full_tokens <= max_tokens)
        for candidate in indexes[is_usable].tolist():
            if (source, candidate, epoch) not in used_samples:
                return source, candidate, epoch
    return None
