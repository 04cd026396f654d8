# SPDX-License-Identifier: Apache-2.0
"""Statistics of a logged step: times by phase, tokens by task and expert, fill of packs, imbalance, memory.

Counts of the global batch come from the vector that every step exchanges (``step.py``). What only a rank knows (its times, its memory,
the share of its replica) is compared once per logged step, in one exchange of about 200 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_bagel import platform
from megatron_bagel.costs.flops import StepWork
from megatron_bagel.data.loading.loader import StepBatch
from megatron_bagel.platform.device import resident_memory_bytes
from megatron_bagel.training.observability.timers import RARE
from megatron_bagel.training.step_result import TaskCounts


def composition(work: StepWork, tasks: TaskCounts | None, packs: int, capacity: int) -> dict[str, float]:
    """Return the composition of the global batch: tokens and samples by task, tokens by expert, and how full its packs were."""
    counts: dict[str, float] = {
        "expert_tokens/understanding": work.tokens - work.vae_tokens,
        "expert_tokens/generation": work.vae_tokens,
        "pack_fill": work.tokens / (packs * capacity),
    }
    if tasks is not None:
        counts |= {f"task_tokens/{task}": number for task, number in tasks.tokens.items()}
        counts |= {f"task_samples/{task}": number for task, number in tasks.samples.items()}
    return counts


def compared_over_ranks(seconds: Mapping[str, float], batch: StepBatch, tokens: int, replicas: int) -> dict[str, float]:
    """Return extremes over all ranks. Collective over the world.

    Args:
        seconds: This rank's seconds by phase.
        batch: The global batch, with the packs of this replica.
        tokens: The tokens of the global batch.
        replicas: The number of data-parallel replicas.

    Returns:
        ``time/<phase>`` and ``time_min/<phase>``, the seconds of the slowest and the fastest rank (rare phases only if they occurred);
        ``imbalance/tokens`` and ``imbalance/cost``, the largest share of a replica over the mean; ``memory/...``, the largest of any rank.
    """
    local_tokens = sum(pack.pack.sequence_length for pack in batch.packs)
    local_cost = sum(pack.plan.cost for pack in batch.packs)
    times = list(seconds.values())
    memory = [float(platform.peak_memory_bytes()), float(resident_memory_bytes())]
    numbers = [*times, *(-time for time in times), float(local_tokens), local_cost, *memory]
    largest = torch.tensor(numbers, dtype=torch.float64, device=platform.device())
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    values = largest.tolist()
    count = len(times)
    extremes: dict[str, float] = {}
    for phase, slowest, fastest in zip(seconds, values[:count], values[count : 2 * count], strict=True):
        if phase not in RARE or slowest > 0:
            extremes[f"time/{phase}"] = slowest
            extremes[f"time_min/{phase}"] = -fastest
    max_tokens, max_cost, peak, resident = values[2 * count :]
    extremes["imbalance/tokens"] = _over_mean(max_tokens, tokens, replicas)
    extremes["imbalance/cost"] = _over_mean(max_cost, batch.totals.cost, replicas)
    extremes["memory/peak_bytes"] = peak
    extremes["memory/resident_bytes"] = resident
    return extremes


def _over_mean(largest: float, total: float, parts: int) -> float:
    """Return the largest of ``parts`` shares of ``total`` over their mean."""
    return largest * parts / total if total else 1.0
