# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the fp32 main weights. Each rank keeps the slices it updates, so no rank holds all of it.

The slices are those of the distributed optimizer (or even slices of each parameter without it), so the update is local.
Export, evaluation and checkpoints assemble full tensors, one at a time. Ranks assemble a tensor by adding bit patterns as
integers. All ranks but one hold zeros for an element, so every value is exact, bit for bit.
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
from megatron_bagel.training.optim.one_pass import OnePassAdamW
from megatron_bagel.training.optim.optimizer import (
    OwnedSlice,
    leaf_optimizers,
    main_weight_slice,
    owned_slices,
    synced_parameters,
)

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


@dataclass
class _Entry:
    """A tracked parameter. Its ``average`` is fp32, flat, and covers the ``owned`` slice only."""

    name: str
    parameter: torch.nn.Parameter
    owned: OwnedSlice
    average: Tensor


class ShardedEma:
    """Keeps the average ema <- decay * ema + (1 - decay) * weight, which starts at the initial weights.

    ``update`` runs after every successful optimizer step. ``modules`` maps a name ("decoder", "vision", or "decoder.0", ... with
    several pipeline chunks) to a wrapped module; a parameter's name here is ``<module name>.<parameter name>``. Only parameters
    that train are tracked: the average of a frozen parameter is the parameter. There is no bias correction, as in the original.

    Methods that yield or take full tensors are collective: all ranks call them in the same order.
    """

    def __init__(
        self, modules: Mapping[str, DistributedDataParallel], optimizer: MegatronOptimizer, decay: float, warmup: bool = False
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"--ema is {decay}; it must be in [0, 1). Use 0.9999 for long runs and 0.99 for a few hundred steps")
        self.decay, self.warmup = decay, warmup
        self._modules = list(modules.values())
        named = {f"{prefix}.{name}": p for prefix, module in modules.items() for name, p in module.module.named_parameters()}
        tracked = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        group_of = {parameter: _replicas_of(module, parameter) for module in modules.values() for parameter in module.module.parameters()}
        slices = owned_slices(optimizer, list(tracked.values()), [group_of[parameter] for parameter in tracked.values()])
        self._entries = [
            _Entry(name, parameter, owned, main_weight_slice(parameter, owned).clone())
            for (name, parameter), owned in zip(tracked.items(), slices, strict=True)
        ]
        self._by_name = {entry.name: entry for entry in self._entries}
        self._one_pass = [leaf.optimizer for leaf in leaf_optimizers(optimizer) if isinstance(leaf.optimizer, OnePassAdamW)]
        self._in_one_pass = self._join()

    @property
    def names(self) -> list[str]:
        """Return the names of the tracked parameters."""
        return list(self._by_name)

    def local_bytes(self) -> int:
        """Return the bytes of the average on this rank."""
        return sum(entry.average.numel() * entry.average.element_size() for entry in self._entries)

    @torch.no_grad()
    def reset(self) -> None:
        """Set the average to the current main weights, for weights that were loaded without an average."""
        for entry in self._entries:
            entry.average.copy_(main_weight_slice(entry.parameter, entry.owned))

    @torch.no_grad()
    def update(self, steps: int = 0) -> None:
        """Move the average towards the current main weights, without communication. With ``warmup`` the decay depends on the steps done.

        Averages that the optimizer has already updated with the weights stay as they are (``prepare``).
        """
        entries = [entry for entry in self._entries if entry.name not in self._in_one_pass]
        averages = [entry.average for entry in entries]
        weights = [main_weight_slice(entry.parameter, entry.owned) for entry in entries]
        decay = self._decay(steps)
        # lerp is the same formula with one rounding fewer than scaling and adding, and reads each tensor once.
        if averages:
            torch._foreach_lerp_(averages, weights, 1.0 - decay)

    def prepare(self, steps: int = 0) -> None:
        """Tell optimizers that update averages with their weights (``one_pass.py``) the decay of the coming update."""
        for optimizer in self._one_pass:
            optimizer.decay = self._decay(steps)

    def _decay(self, steps: int) -> float:
        return min(self.decay, (1 + steps) / (10 + steps)) if self.warmup else self.decay

    def _join(self) -> set[str]:
        """Hand the averages of weights that are slices of this rank to their optimizer, and return the names of these parameters."""
        entries = {_location(main_weight_slice(entry.parameter, entry.owned)): entry for entry in self._entries}
        joined = set()
        for optimizer in self._one_pass:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                if (entry := entries.get(_location(weight))) is not None:
                    optimizer.averages[weight] = entry.average
                    joined.add(entry.name)
        return joined

    def named_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every average as a full fp32 tensor with the parameter's (tensor-parallel local) shape, one at a time."""
        for entry in self._entries:
            yield entry.name, _assemble(entry, entry.average)

    @torch.no_grad()
    def load_full_tensor(self, name: str, tensor: Tensor) -> None:
        """Set one average from a full tensor, which every rank passes. Raises ValueError for an unknown name or a wrong shape."""
        entry = self._by_name.get(name)
        if entry is None:
            raise ValueError(f"the average has no parameter {name!r}: it is frozen here, or belongs to another model")
        if tensor.shape != entry.parameter.shape:
            raise ValueError(
                f"the average of {name} has shape {tuple(tensor.shape)}, but the model's parameter has {tuple(entry.parameter.shape)}"
            )
        entry.average.copy_(tensor.reshape(-1)[entry.owned.start : entry.owned.stop])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's weights by the averages within the block, and restore them afterwards bit for bit."""
        with synced_parameters(self._modules), torch.no_grad():
            saved_slices = [main_weight_slice(entry.parameter, entry.owned).clone() for entry in self._entries]
            for entry in self._entries:
                entry.parameter.copy_(_assemble(entry, entry.average))
        try:
            yield
        finally:
            with torch.no_grad():
                for entry, saved_slice in zip(self._entries, saved_slices, strict=True):
                    entry.parameter.copy_(_assemble(entry, saved_slice))

    def sharded_state_dict(
        self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False, prefix: str = "ema"
    ) -> dict[str, Sharded]:
        """Return the average for ``dist_checkpointing``, each full tensor on one rank of its data-parallel group.

        Tensors are assigned to ranks by size, so a rank holds about 1/DP of the average while saving, and the checkpoint loads
        with any parallel sizes.

        Args:
            model_sharded_state_dict: The model's state (any nesting, made with ``keep_vars=True``), which gives keys and shapes.
            is_loading: Whether the tensors are empty buffers for the loader.
            prefix: The first part of a tensor's key, ``<prefix>.<model key>``.
        """
        shardings = get_param_id_to_sharded_param_map(dict(model_sharded_state_dict), [entry.parameter for entry in self._entries])
        state: dict[str, Sharded] = {}
        for index, (entry, owner) in enumerate(zip(self._entries, self._owners(), strict=True)):
            if index not in shardings:
                raise ValueError(f"parameter {entry.name} is trained but is not in the model's sharded state: it would not be saved")
            group_size, is_owner = dist.get_world_size(entry.owned.group), owner == dist.get_rank(entry.owned.group)
            if is_loading:
                tensor = torch.empty(entry.parameter.shape, dtype=torch.float32, device=entry.parameter.device) if is_owner else None
            else:
                tensor = _assemble(entry, entry.average, owner)
            if is_owner and tensor is not None:
                sharded = make_sharded_optimizer_tensor(shardings[index], tensor, prefix)
                replica = (0, 0, 0) if _over_world(group_size) else sharded.replica_id
                state[entry.name] = replace(sharded, replica_id=_single_replica(replica, entry.owned.instance))
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the average from the buffers of ``sharded_state_dict(is_loading=True)``, which ``dist_checkpointing`` has filled."""
        for entry, owner in zip(self._entries, self._owners(), strict=True):
            group = entry.owned.group
            if owner == dist.get_rank(group):
                tensor = state[entry.name].detach().to(entry.parameter.device, torch.float32).contiguous()
            else:
                tensor = torch.empty(entry.parameter.shape, dtype=torch.float32, device=entry.parameter.device)
            if dist.get_world_size(group) > 1:
                dist.broadcast(tensor, src=dist.get_global_rank(group, owner), group=group)
            entry.average.copy_(tensor.reshape(-1)[entry.owned.start : entry.owned.stop])

    def _owners(self) -> list[int]:
        """Return the group rank that saves each full tensor: largest first to the least loaded, the same on all ranks of a group.

        Every group assigns its own tensors, because ranks of the tower's group, the world, hold different parts of the decoder.
        """
        owners = [0] * len(self._entries)
        for group in {entry.owned.group for entry in self._entries}:
            indexes = [index for index, entry in enumerate(self._entries) if entry.owned.group == group]
            group_owners = longest_first([self._entries[index].parameter.numel() for index in indexes], dist.get_world_size(group))
            for index, owner in zip(indexes, group_owners, strict=True):
                owners[index] = owner
        return owners


def _location(tensor: Tensor) -> tuple[int, int]:
    """Return where the numbers of a tensor are. Tensors without memory or elements are nowhere, so no two of them are the same."""
    return (tensor.data_ptr(), tensor.numel()) if tensor.numel() and not tensor.is_meta else (id(tensor), 0)


def _replicas_of(module: DistributedDataParallel, parameter: torch.nn.Parameter) -> dist.ProcessGroup:
    """Return the ranks that hold a parameter alike. Megatron marks experts that are divided over ranks with ``allreduce`` False."""
    return module.dp_cp_group if getattr(parameter, "allreduce", True) else module.expt_dp_group


def _over_world(group_size: int) -> bool:
    """Return whether a group is larger than the decoder's data-parallel groups, so that every rank has its complete module."""
    return group_size > dist.get_world_size(parallel_state.get_data_parallel_group(with_context_parallel=True))


def _single_replica(replica_id: int | tuple[int, ...], instance: int) -> int | tuple[int, ...]:
    """Return the model's replica id with ``instance`` as its last (data-parallel) part, because one rank of the group has the tensor."""
    return (*replica_id[:-1], instance) if isinstance(replica_id, tuple) else instance


@torch.no_grad()
def _assemble(entry: _Entry, local_slice: Tensor, owner: int | None = None) -> Tensor:
    """Return the full tensor of all ranks' slices, on every rank of the group or, with ``owner``, valid on that group rank only."""
    group = entry.owned.group
    # An average in host memory is joined where the collectives work.
    tensor = torch.zeros(entry.parameter.numel(), dtype=torch.float32, device=entry.parameter.device)
    tensor[entry.owned.start : entry.owned.stop] = local_slice
    if dist.get_world_size(group) > 1:
        bits = tensor.view(torch.int32)
        if owner is None:
            dist.all_reduce(bits, group=group)
        else:
            dist.reduce(bits, dst=dist.get_global_rank(group, owner), group=group)
    return tensor.view(entry.parameter.shape)
