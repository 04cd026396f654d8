"""Exponential moving average of the fp32 main weights, each rank keeping only the slices it updates: no rank holds all of it.

The slices are those of the distributed optimizer (or an even cut of each parameter without it), so the update is local.
Whole tensors appear one at a time, when something asks: export, evaluation, checkpoints. Sums over ranks that put slices
together are taken on the bit patterns as integers, where all but one rank hold zeros, so every value comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_bagel.common.assignment import longest_first
from megatron_bagel.training.optim.optimizer import OwnedSlice, main_weight_slice, owned_slices, synced_parameters

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


@dataclass
class _Entry:
    """One tracked parameter: ``average`` is fp32, flat, and covers ``owned`` only."""

    name: str
    parameter: torch.nn.Parameter
    owned: OwnedSlice
    average: Tensor


class ShardedEma:
    """ema <- decay * ema + (1 - decay) * weight after every successful optimizer step, starting at the initial weights.

    ``modules`` maps a name ("decoder", "vision", or "decoder.0", ... with several pipeline chunks) to a wrapped module; a
    parameter's name here is ``<module name>.<parameter name>``. Only parameters that train are tracked: the average of a
    frozen one is the parameter. There is no bias correction, as in the original.

    Everything that yields or takes whole tensors is collective: all ranks call it, in the same order.
    """

    def __init__(self, modules: Mapping[str, DistributedDataParallel], optimizer: MegatronOptimizer, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema is {decay}; it must be in [0, 1). Typical: 0.9999 for long runs, 0.99 for a few hundred steps.")
        self.decay = decay
        self._modules = list(modules.values())
        named = {f"{prefix}.{name}": p for prefix, module in modules.items() for name, p in module.module.named_parameters()}
        tracked = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        group_of = {parameter: module.dp_cp_group for module in modules.values() for parameter in module.module.parameters()}
        slices = owned_slices(optimizer, list(tracked.values()), [group_of[parameter] for parameter in tracked.values()])
        self._entries = [
            _Entry(name, parameter, owned, main_weight_slice(parameter, owned).clone())
            for (name, parameter), owned in zip(tracked.items(), slices, strict=True)
        ]
        self._by_name = {entry.name: entry for entry in self._entries}

    @property
    def names(self) -> list[str]:
        """Names of the tracked parameters."""
        return list(self._by_name)

    def local_bytes(self) -> int:
        """Bytes of the average held by this rank."""
        return sum(entry.average.numel() * entry.average.element_size() for entry in self._entries)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again at the current main weights (after weights were loaded without an average)."""
        for entry in self._entries:
            entry.average.copy_(main_weight_slice(entry.parameter, entry.owned))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current main weights; local, no communication."""
        averages = [entry.average for entry in self._entries]
        weights = [main_weight_slice(entry.parameter, entry.owned) for entry in self._entries]
        # lerp is the same formula with one rounding less than scaling and adding, and reads each tensor once.
        if averages:
            torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    def named_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tracked average as a whole fp32 tensor of the parameter's (tensor-parallel local) shape, one at a time."""
        for entry in self._entries:
            yield entry.name, _assemble(entry, entry.average)

    @torch.no_grad()
    def load_full_tensor(self, name: str, tensor: Tensor) -> None:
        """Set one average from a whole tensor, which every rank passes. Raises ValueError on an unknown name or wrong shape."""
        entry = self._by_name.get(name)
        if entry is None:
            raise ValueError(f"EMA has no parameter {name!r}: it is frozen, or belongs to another model.")
        if tensor.shape != entry.parameter.shape:
            raise ValueError(f"EMA tensor {name} has shape {tuple(tensor.shape)}; the model's is {tuple(entry.parameter.shape)}.")
        entry.average.copy_(tensor.reshape(-1)[entry.owned.start : entry.owned.stop])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's weights are the averages (evaluation, sample images); afterwards as they were, bit for bit."""
        with synced_parameters(self._modules), torch.no_grad():
            kept = [main_weight_slice(entry.parameter, entry.owned).clone() for entry in self._entries]
            for entry in self._entries:
                entry.parameter.copy_(_assemble(entry, entry.average))
        try:
            yield
        finally:
            with torch.no_grad():
                for entry, own in zip(self._entries, kept, strict=True):
                    entry.parameter.copy_(_assemble(entry, own))

    def sharded_state_dict(
        self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False, prefix: str = "ema"
    ) -> dict[str, Sharded]:
        """The average in model space for dist_checkpointing, each whole tensor on one rank of its data-parallel group.

        Tensors are dealt to the ranks by size, so a rank holds about 1/DP of the average while saving, and the checkpoint loads
        on any layout. ``model_sharded_state_dict`` (any nesting, made with ``keep_vars=True``) gives keys and global shapes; a
        tensor's key is ``<prefix>.<model key>``. With ``is_loading`` the tensors are empty buffers for the loader.
        """
        shardings = get_param_id_to_sharded_param_map(dict(model_sharded_state_dict), [entry.parameter for entry in self._entries])
        state: dict[str, Sharded] = {}
        for index, (entry, owner) in enumerate(zip(self._entries, self._owners(), strict=True)):
            if index not in shardings:
                raise ValueError(f"Parameter {entry.name} is trained but is not in the model's sharded state: it would not be saved.")
            group_size, mine = dist.get_world_size(entry.owned.group), owner == dist.get_rank(entry.owned.group)
            if is_loading:
                whole = torch.empty(entry.parameter.shape, dtype=torch.float32, device=entry.average.device) if mine else None
            else:
                whole = _assemble(entry, entry.average, owner)
            if mine and whole is not None:
                sharded = make_sharded_optimizer_tensor(shardings[index], whole, prefix)
                replica = (0, 0, 0) if _over_world(group_size) else sharded.replica_id
                state[entry.name] = replace(sharded, replica_id=_single_replica(replica, entry.owned.instance))
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``sharded_state_dict(is_loading=True)`` asked for, after dist_checkpointing filled it."""
        for entry, owner in zip(self._entries, self._owners(), strict=True):
            group = entry.owned.group
            if owner == dist.get_rank(group):
                whole = state[entry.name].detach().to(entry.average.device, torch.float32).contiguous()
            else:
                whole = torch.empty(entry.parameter.shape, dtype=torch.float32, device=entry.average.device)
            if dist.get_world_size(group) > 1:
                dist.broadcast(whole, src=dist.get_global_rank(group, owner), group=group)
            entry.average.copy_(whole.reshape(-1)[entry.owned.start : entry.owned.stop])

    def _owners(self) -> list[int]:
        """Group rank that holds each whole tensor in a checkpoint: largest first to the least loaded, the same on all its ranks.

        Every group deals by itself: ranks of the tower's group, the world, hold different parts of the decoder.
        """
        owners = [0] * len(self._entries)
        for group in {entry.owned.group for entry in self._entries}:
            mine = [index for index, entry in enumerate(self._entries) if entry.owned.group == group]
            dealt = longest_first([self._entries[index].parameter.numel() for index in mine], dist.get_world_size(group))
            for index, owner in zip(mine, dealt, strict=True):
                owners[index] = owner
        return owners


def _over_world(group_size: int) -> bool:
    """Whether a group is larger than the decoder's data-parallel ones: its module is whole on all model-parallel ranks too."""
    return group_size > dist.get_world_size(parallel_state.get_data_parallel_group(with_context_parallel=True))


def _single_replica(replica_id: int | tuple[int, ...], instance: int) -> int | tuple[int, ...]:
    """The model's replica id with its last (data-parallel) part replaced: only one rank of the group holds the tensor."""
    return (*replica_id[:-1], instance) if isinstance(replica_id, tuple) else instance


@torch.no_grad()
def _assemble(entry: _Entry, own: Tensor, owner: int | None = None) -> Tensor:
    """Put the slices of one parameter together, on every rank of its group or (``owner``) valid on that group rank only."""
    group = entry.owned.group
    whole = torch.zeros(entry.parameter.numel(), dtype=torch.float32, device=own.device)
    whole[entry.owned.start : entry.owned.stop] = own
    if dist.get_world_size(group) > 1:
        bits = whole.view(torch.int32)
        if owner is None:
            dist.all_reduce(bits, group=group)
        else:
            dist.reduce(bits, dst=dist.get_global_rank(group, owner), group=group)
    return whole.view(entry.parameter.shape)
