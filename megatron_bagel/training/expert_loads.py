# SPDX-License-Identifier: Apache-2.0
"""What the routers of all ranks did in one step: the load of each sparse expert, dropped choices, entropy and auxiliary losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_bagel import platform
from megatron_bagel.model.router_statistics import RouterStatistics
from megatron_bagel.model.sparse_mlp import routers_of

#: Names of the kinds in logs.
_NAMES = {"und": "understanding", "gen": "generation", "both": "all"}


@dataclass(frozen=True)
class KindLoads:
    """The routers of one expert kind, over the global batch.

    Attributes:
        layers: The sparse layers, counted from 0.
        load: The choices that each expert got, by layer.
        tokens: The tokens that each layer's router saw.
        dropped: The choices that a capacity dropped, by layer.
        entropy: The mean entropy of a token's probabilities in nats, by layer.
        balance: The balance loss without its coefficient, by layer; 0 if it is off.
        z: The z-loss without its coefficient, by layer; 0 if it is off.
    """

    layers: tuple[int, ...]
    load: tuple[tuple[float, ...], ...]
    tokens: tuple[float, ...]
    dropped: tuple[float, ...]
    entropy: tuple[float, ...]
    balance: tuple[float, ...]
    z: tuple[float, ...]

    def metrics(self) -> dict[str, float]:
        """Return a few numbers for the log. ``max_load`` is the largest load over the mean, 1 for a perfect balance."""
        kept = sum(map(sum, self.load))
        choices = kept + sum(self.dropped)
        return {
            "max_load": max((max(load) * len(load) / sum(load) for load in self.load if sum(load)), default=1.0),
            "idle_experts": sum(load.count(0.0) for load in self.load) / len(self.layers),
            "dropped_share": sum(self.dropped) / choices if choices else 0.0,
            "router_entropy": sum(self.entropy) / len(self.layers),
            "balance_loss": sum(self.balance) / len(self.layers),
            "z_loss": sum(self.z) / len(self.layers),
        }


@dataclass(frozen=True)
class ExpertLoads:
    """The loads by the name of the expert kind: understanding, generation, or all for an MLP that serves every token."""

    kinds: Mapping[str, KindLoads]

    def metrics(self) -> dict[str, float]:
        """Return numbers for the log, each under ``experts/<kind>/``."""
        return {f"experts/{kind}/{name}": value for kind, loads in self.kinds.items() for name, value in loads.metrics().items()}

    def record(self) -> dict[str, Any]:
        """Return the loads by layer and expert as plain values."""
        return {
            kind: {
                "layers": list(loads.layers), "load": [list(map(int, load)) for load in loads.load],
                "dropped": list(map(int, loads.dropped)), "entropy": list(loads.entropy),
            }
            for kind, loads in self.kinds.items()
        }  # fmt: skip


def global_expert_loads(chunks: Sequence[torch.nn.Module], layers: int, num_experts: int) -> ExpertLoads:
    """Return the loads of the step, summed over all ranks. Collective over the world.

    Args:
        chunks: The decoder chunks of this rank.
        layers: The layers of the decoder.
        num_experts: The experts of one MLP.
    """
    width = num_experts + RouterStatistics.EXTRA
    # The last column marks that a layer is sparse.
    sums = torch.zeros(len(_NAMES), layers, width + 1, dtype=torch.float64, device=platform.device())
    for chunk in chunks:
        for kind, router in routers_of(chunk):
            row = sums[list(_NAMES).index(kind), router.layer_number - 1]
            row[:width] = router.statistics.sums(sums.device)
            row[width] = 1
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    kinds = {}
    for name, rows in zip(_NAMES.values(), sums.cpu(), strict=True):
        sparse = [layer for layer in range(layers) if rows[layer, width]]
        if sparse:
            kinds[name] = _kind_loads(tuple(sparse), rows[sparse].tolist(), num_experts)
    return ExpertLoads(kinds)


def _kind_loads(layers: tuple[int, ...], rows: Sequence[Sequence[float]], num_experts: int) -> KindLoads:
    extra = [row[num_experts:] for row in rows]
    return KindLoads(
        layers=layers,
        load=tuple(tuple(row[:num_experts]) for row in rows),
        tokens=tuple(numbers[0] for numbers in extra),
        dropped=tuple(numbers[1] for numbers in extra),
        entropy=tuple(numbers[2] / numbers[0] if numbers[0] else 0.0 for numbers in extra),
        balance=tuple(numbers[3] for numbers in extra),
        z=tuple(numbers[4] for numbers in extra),
    )
