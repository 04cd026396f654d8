# SPDX-License-Identifier: Apache-2.0
"""The fixed packs of validation: the same held-out samples with the same noise every time and for any parallel sizes."""

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
    """A pack to validate on. ``repeated`` packs only keep ranks in step, and their losses do not count."""

    plan: PackPlan
    repeated: bool = False


def held_out_samples(
    source: GroupSource, count: int, max_num_tokens: int, seed: int = 0, purpose: str = "validation"
) -> dict[str, np.ndarray]:
    """Return indexes of up to ``count`` samples of each dataset of a group, drawn by key.

    Samples of more than ``max_num_tokens`` tokens are skipped, as in training. A dataset with fewer samples gives all of them.
    """
    indexes_by_dataset: dict[str, np.ndarray] = {}
    for name, indexes in source.datasets().items():
        # Long samples are rare. If they are not, up to eight times ``count`` candidates are measured.
        positions = np.arange(min(len(indexes), 8 * count))
        candidates = indexes.start + permuted(positions, len(indexes), seed, purpose, name) if len(indexes) else positions
        measures = source.measure(candidates, 0)
        is_usable = (measures.full_tokens <= max_num_tokens) & (measures.tokens > 0)
        indexes_by_dataset[name] = candidates[is_usable][:count]
    return indexes_by_dataset


def held_out_packs(sources: Sequence[GroupSource], count: int, max_num_tokens: int, max_num_tokens_per_sample: int) -> list[PackPlan]:
    """Pack up to ``count`` held-out samples of every dataset, in epoch 0. Raises ValueError if no sample is short enough."""
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
        pack_rows = fill(waiting[:, 2], max_num_tokens, max_num_tokens)
        samples = tuple((int(source), int(index), 0) for source, index in waiting[pack_rows, :2])
        plans.append(PackPlan(len(plans), samples, int(waiting[pack_rows, 2].sum()), int(waiting[pack_rows, 3].sum()) / COST_UNIT))
        waiting = np.delete(waiting, pack_rows, axis=0)
    return plans


def share_of(plans: Sequence[PackPlan], replica: int, replicas: int, multiple: int = 1) -> list[HeldOutPack]:
    """Return the packs of one replica. All replicas get equally many, a multiple of ``multiple``, padded with repeated packs."""
    packs_per_replica = -(-len(plans) // (replicas * multiple)) * multiple
    replica_packs = [HeldOutPack(plan) for plan in plans[replica::replicas]]
    return replica_packs + [HeldOutPack(plans[0], repeated=True)] * (packs_per_replica - len(replica_packs))
