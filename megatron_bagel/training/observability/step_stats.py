"""What a logged step says about how it went: times by phase, tokens by task and expert, fill of packs, imbalance, memory.

Counts of the global batch come from the vector that a step exchanges anyway (step.py). What only a rank knows (its times, its memory,
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
    """What the global batch was made of: tokens and samples by task, tokens by expert, and how full its packs were."""
    found: dict[str, float] = {
        "expert_tokens/understanding": work.tokens - work.vae_tokens,
        "expert_tokens/generation": work.vae_tokens,
        "pack_fill": work.tokens / (packs * capacity),
    }
    if tasks is not None:
        found |= {f"task_tokens/{task}": number for task, number in tasks.tokens.items()}
        found |= {f"task_samples/{task}": number for task, number in tasks.samples.items()}
    return found


def compared_over_ranks(seconds: Mapping[str, float], batch: StepBatch, tokens: int, replicas: int) -> dict[str, float]:
    """Extremes over all ranks. Collective over the world.

    ``time/<phase>`` and ``time_min/<phase>`` are the slowest and the fastest rank's seconds (rare phases only where there were any);
    ``imbalance/tokens`` and ``imbalance/cost`` the fullest replica's share over the mean; ``memory/...`` the largest of any rank.
    ``batch`` is this replica's, ``tokens`` are those of the global batch.
    """
    mine = {pack.plan.number for pack in batch.packs}
    own_tokens = sum(pack.pack.sequence_length for pack in batch.packs)
    own_cost = sum(plan.cost for plan in batch.plans if plan.number in mine)
    times = list(seconds.values())
    memory = [float(platform.peak_memory_bytes()), float(resident_memory_bytes())]
    numbers = [*times, *(-time for time in times), float(own_tokens), own_cost, *memory]
    largest = torch.tensor(numbers, dtype=torch.float64, device=platform.device())
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    values = largest.tolist()
    count = len(times)
    found: dict[str, float] = {}
    for phase, slowest, fastest in zip(seconds, values[:count], values[count : 2 * count], strict=True):
        if phase not in RARE or slowest > 0:
            found[f"time/{phase}"] = slowest
            found[f"time_min/{phase}"] = -fastest
    most_tokens, most_cost, peak, resident = values[2 * count :]
    found["imbalance/tokens"] = _over_mean(most_tokens, tokens, replicas)
    found["imbalance/cost"] = _over_mean(most_cost, sum(plan.cost for plan in batch.plans), replicas)
    found["memory/peak_bytes"] = peak
    found["memory/resident_bytes"] = resident
    return found


def _over_mean(most: float, total: float, parts: int) -> float:
    return most * parts / total if total else 1.0
