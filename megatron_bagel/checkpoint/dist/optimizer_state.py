# SPDX-License-Identifier: Apache-2.0
"""Optimizer state in a checkpoint, which is the same on disk whether one optimizer holds all parameters or several share them.

The vision tower has a separate optimizer if it is data-parallel over the world, and so have sparse experts that are divided over ranks. In
all cases tensors are stored under their parameters' names. Everything else (step, learning rate, ...) is equal in all optimizers of a
run and stored once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_bagel.platform import megatron_compat

_HYBRID_SETTINGS = (
    "cpu_optimizer_cls", "gpu_optimizer_cls", "offload_fraction", "param_update_in_fp32", "pin_cpu_grads", "pin_cpu_params",
    "overlap_cpu_optimizer_d2h_h2d", "fused",
)  # fmt: skip
#: Entries of the main optimizer and of others.
MAIN_ENTRY, OTHER_ENTRIES = "optimizer", ("optimizer_beside", "optimizer_beside_2")


def optimizers_with_state(optimizer: MegatronOptimizer | None) -> dict[str, MegatronOptimizer]:
    """Return the optimizers inside Megatron's chain by their entry in the state, without the stubs of fully frozen stages.

    Raises:
        ValueError: If there are more than three.
    """
    if optimizer is None:
        return {}
    leaves = [leaf for leaf in getattr(optimizer, "chained_optimizers", [optimizer]) if not getattr(leaf, "is_stub_optimizer", False)]
    if len(leaves) > 1 + len(OTHER_ENTRIES):
        raise ValueError(f"a checkpoint holds the state of up to {1 + len(OTHER_ENTRIES)} optimizers; this run has {len(leaves)}")
    return dict(zip((MAIN_ENTRY, *OTHER_ENTRIES), leaves, strict=False))


def optimizer_state(
    optimizer: MegatronOptimizer | None, model_state: Mapping[str, Any], is_loading: bool, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the sharded state of every optimizer by its entry, in the model space of ``model_state``.

    With ``is_loading`` the state consists of empty buffers to fill.
    """
    with megatron_compat.padded_buckets(optimizer):
        states = {
            entry: leaf.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(metadata))
            for entry, leaf in optimizers_with_state(optimizer).items()
        }
    for state in states.values():
        _drop_hybrid_settings(state)
    if metadata["distrib_optim_sharding_type"] == "dp_reshardable":
        # In this format the keys are buffer numbers, which all optimizers count from 0.
        for entry in OTHER_ENTRIES:
            if entry in states:
                add_prefix_for_sharding(states[entry], f"{entry}.")
    return states


def _drop_hybrid_settings(state: Any) -> None:
    """Drop what the hybrid optimizer writes into its groups: classes, which no loader may read, and where its parts are. In place."""
    settings = state.get("optimizer") if isinstance(state, Mapping) else None
    for group in settings["param_groups"] if isinstance(settings, Mapping) else ():
        for name in _HYBRID_SETTINGS:
            group.pop(name, None)


def load_optimizer_state(optimizer: MegatronOptimizer | None, loaded: Mapping[str, Any]) -> None:
    """Load what ``optimizer_state(is_loading=True)`` requested. Values that are not tensors come from the main entry."""
    leaves = optimizers_with_state(optimizer)
    # All states are completed before the first load, which takes its state apart.
    states = {entry: loaded[MAIN_ENTRY] if entry == MAIN_ENTRY else _merge_settings(loaded[entry], loaded[MAIN_ENTRY]) for entry in leaves}
    for entry, leaf in leaves.items():
        leaf.load_state_dict(states[entry])
        _leave_steps_to_the_parts(leaf)


def _leave_steps_to_the_parts(leaf: MegatronOptimizer) -> None:
    """Drop the step count that a load leaves in the hybrid optimizer's groups. In place.

    Before every step the hybrid optimizer copies its groups over those of its parts. Nobody advances its own count, so the part on the GPU,
    which counts in its groups, would take every step after a resume for the first one after it.
    """
    if isinstance(leaf.optimizer, HybridDeviceOptimizer):
        for group in leaf.optimizer.param_groups:
            group.pop("step", None)


def _merge_settings(entry_state: Any, main_state: Any) -> Any:
    """Add the settings that only ``main_state`` has to ``entry_state``. Integer keys number parameters, so they are no settings."""
    if isinstance(entry_state, Mapping) and isinstance(main_state, Mapping):
        merged = {key: _merge_settings(value, main_state[key]) if key in main_state else value for key, value in entry_state.items()}
        return merged | {key: copy.deepcopy(value) for key, value in main_state.items() if key not in entry_state and isinstance(key, str)}
    if isinstance(entry_state, list) and isinstance(main_state, list) and len(entry_state) == len(main_state):
        return [
            _merge_settings(left, right) if isinstance(left, Mapping) else left for left, right in zip(entry_state, main_state, strict=True)
        ]
    return entry_state
