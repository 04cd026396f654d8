# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's sequence of expert MLPs with a name in checkpoints for every expert, so that a run continues with any parallel sizes."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.moe.experts import SequentialMLP


class NamedExperts(SequentialMLP):
    """Megatron-Core's sequence of expert MLPs. In a checkpoint each expert is a tensor with the expert's number over all ranks."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the state of this rank's experts. A tensor of an expert is replicated over the expert-data-parallel ranks only."""
        state: ShardedStateDict = {}
        first_expert = self.ep_group.rank() * self.num_local_experts
        for number, expert in enumerate(self.local_experts):
            local_prefix = f"{prefix}local_experts.{number}."
            expert_state = expert.sharded_state_dict(local_prefix, sharded_offsets, metadata)
            replace_prefix_for_sharding(expert_state, local_prefix, f"{prefix}local_experts.{first_expert + number}.")
            for tensor in expert_state.values():
                if hasattr(tensor, "replica_id"):
                    tensor.replica_id = (*tensor.replica_id[:2], self.dp_group.rank())
            state |= expert_state
        return state
