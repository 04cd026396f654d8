# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds: Megatron-Core dist_checkpointing (torch_dist) for tensors, one JSON file for the rest. load.py loads it.

Tensors are in model space under the weight map's names: ``<name>`` is the weight, ``ema.<name>`` its average, and
``optimizer.state.<kind>.<name>`` the optimizer's. A checkpoint therefore does not depend on the parallel sizes that wrote it, and any
part of it can be read without building a model (tensor_reader.py). All functions here are collective: every rank calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

import megatron_bagel
from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.checkpoint.dist.optimizer_state import optimizer_state
from megatron_bagel.checkpoint.dist.stored_adapter import ADAPTER, StoredAdapter
from megatron_bagel.config.architecture import BagelArch

# One key per layer, so that a single tensor can be read; optimizer state in model space, so that any parallel sizes can load it.
_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
#: Name of the vision tower among the modules.
TOWER = "vision"
#: Megatron's linear layers add this for fp8. It is empty here, and no released folder has it.
EXTRA_STATE = "_extra_state"


class EmaState(Protocol):
    """The part of the EMA that a checkpoint needs (``training/optim/ema.py`` has the class)."""

    def sharded_state_dict(self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """The averages as sharded tensors, cut as the weights are."""

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over averages that a checkpoint held."""

    def local_bytes(self) -> int:
        """Bytes of the average on this rank."""


@dataclass
class Trained:
    """What a run trains. ``modules`` are wrapped or not: "decoder" or "decoder.0", ... and, with a ViT, "vision"."""

    modules: Mapping[str, nn.Module]
    arch: BagelArch
    optimizer: MegatronOptimizer | None = None
    ema: EmaState | None = None
    #: The adapters that train and their base, whose weights no checkpoint repeats; None in a run without adapters.
    adapter: StoredAdapter | None = None


def module_state(modules: Mapping[str, nn.Module], only_trained: bool = False) -> dict[str, dict[str, Any]]:
    """Return the sharded state of each module under the weight map's names, parameters unchanged.

    With ``only_trained`` parameters without gradients are left out.
    """
    states = {}
    for name, module in modules.items():
        # A copy, because Megatron writes this run's process group into it. Modules outside Megatron are complete on every rank.
        state = sharded_state_dict_default(
            unwrapped(module), "", (), dict(_METADATA), tp_group=parallel_state.get_tensor_model_parallel_group()
        )
        if name == TOWER:
            # The tower is complete on the ranks of every pipeline stage, or only on the first stage.
            stage = parallel_state.get_pipeline_model_parallel_rank()
            state = {key: replace(tensor, replica_id=(stage, *tensor.replica_id[1:])) for key, tensor in state.items()}
        frozen = {key for key, weight in unwrapped(module).named_parameters() if only_trained and not weight.requires_grad}
        states[name] = {key: tensor for key, tensor in state.items() if not key.endswith(EXTRA_STATE) and key not in frozen}
    return states


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers that call it ``module``, such as Megatron's DDP."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def provenance(step: int, arch: BagelArch, world_size: int, adapter: StoredAdapter | None = None) -> dict[str, Any]:
    """Return the JSON head of every checkpoint: format, step, model, adapters, and the versions and world size that wrote it."""
    return {
        "format_version": step_folders.FORMAT_VERSION,
        "step": step,
        "arch": arch.to_dict(),
        "versions": {"megatron_bagel": megatron_bagel.__version__, "megatron_core": megatron.core.__version__, "torch": torch.__version__},
        "world_size": world_size,
        **({ADAPTER: adapter.to_dict()} if adapter is not None else {}),
    }


def sharded_state(trained: Trained, is_loading: bool, own_buffers: bool = False) -> dict[str, Any]:
    """Return everything that a checkpoint stores as tensors, in model space; with ``is_loading`` empty buffers to fill.

    With ``own_buffers`` the optimizer's state is as this rank's buffers hold it. Nothing is gathered, and only the same parallel sizes
    can load it.
    """
    state: dict[str, Any] = {"model": module_state(trained.modules, only_trained=trained.adapter is not None)}
    metadata = {**_METADATA, "distrib_optim_sharding_type": "dp_reshardable"} if own_buffers else _METADATA
    state |= optimizer_state(trained.optimizer, state["model"], is_loading, metadata)
    if trained.ema is not None:
        state["ema"] = trained.ema.sharded_state_dict(state["model"], is_loading=is_loading)
    return state


def sharded_tensors(state: Any) -> Sequence[ShardedTensor]:
    """Return every sharded tensor in a state, including those that factories build."""
    if isinstance(state, ShardedTensorFactory):
        return sharded_tensors(state.build())
    if isinstance(state, ShardedTensor):
        return [state]
    if isinstance(state, ShardedBase):
        return []
    values = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in sharded_tensors(value)]


def data_parallel_group() -> dist.ProcessGroup:
    """Return the group of ranks that hold the same shards of the model and share the work of writing and reading them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
