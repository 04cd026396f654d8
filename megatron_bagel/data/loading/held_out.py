"""The fixed packs that a run is validated on: the same held-out samples, with the same noise, every time and on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.planner.cost_model import COST_UNIT
from megatron_bagel.data.planner.group_source import GroupSource
from megatron_bagel.data.planner.packing import fill
from megatron_bagel.data.planner.permutation import permuted


@dataclass(frozen=True)
class HeldOutPack:
    """A pack to validate on. ``repeated`` ones only keep ranks in step with each other: their losses do not count."""

    plan: PackPlan
    repeated: bool = False


def held_out_samples(
    source: GroupSource, count: int, max_num_tokens: int, seed: int = 0, purpose: str = "validation"
) -> dict[str, np.ndarray]:
    """Indexes of up to ``count`` samples of each dataset of a group, drawn by name, at most ``max_num_tokens`` long.

    A dataset with fewer gives all it has; longer samples are passed over, as in training.
    """
    chosen: dict[str, np.ndarray] = {}
    for name, indexes in source.datasets().items():
        # Too long ones are rare; where they are not, a dataset is looked through up to eight times over.
        tried = np.arange(min(len(indexes), 8 * count))
        candidates = indexes.start + permuted(tried, len(indexes), seed, purpose, name) if len(indexes) else tried
        measures = source.measure(candidates, 0)
        fitting = (measures.full_tokens <= max_num_tokens) & (measures.tokens > 0)
        chosen[name] = candidates[fitting][:count]
    return chosen


def held_out_packs(sources: Sequence[GroupSource], count: int, max_num_tokens: int, max_num_tokens_per_sample: int) -> list[PackPlan]:
    """Packs of up to ``count`` held-out samples of every dataset, in epoch 0. Raises ValueError when none fits."""
    rows: list[tuple[int, int, int, int]] = []
    for number, source in enumerate(sources):
        for indexes in held_out_samples(source, count, min(max_num_tokens, max_num_tokens_per_sample)).values():
            measures = source.measure(indexes, 0)
            rows += [(number, int(i), int(t), int(c)) for i, t, c in zip(indexes, measures.tokens, measures.cost, strict=True)]
    if not rows:
        raise ValueError(
            "no held-out sample is short enough to validate on; raise --max_num_tokens_per_sample, or the validation share of --split"
        )
    waiting = np.array(rows, dtype=np.int64)
    plans: list[PackPlan] = []
    while len(waiting):
        taken = fill(waiting[:, 2], max_num_tokens, max_num_tokens)
        samples = tuple((int(source), int(index), 0) for source, index in waiting[taken, :2])
        plans.append(PackPlan(len(plans), samples, int(waiting[taken, 2].sum()), int(waiting[taken, 3].sum()) / COST_UNIT))
        waiting = np.delete(waiting, taken, axis=0)
    return plans


def share_of(plans: Sequence[PackPlan], replica: int, replicas: int, multiple: int = 1) -> list[HeldOutPack]:
    """The packs of one replica: as many for each, a multiple of ``multiple``; what is missing is filled with repeated packs."""
    each = -(-len(plans) // (replicas * multiple)) * multiple
    mine = [HeldOutPack(plan) for plan in plans[replica::replicas]]
    return mine + [HeldOutPack(plans[0], repeated=True)] * (each - len(mine))
