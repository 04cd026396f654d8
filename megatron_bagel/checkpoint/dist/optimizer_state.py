"""Optimizer state in a checkpoint, the same on disk whether one optimizer holds all parameters or two share them.

The vision tower has an optimizer of its own where it is data-parallel over the world. Tensors lie under their parameters' names either
way; everything else (step, learning rate, ...) is equal in all optimizers of a run, and stored once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer

from megatron_bagel.platform import megatron_compat

#: Entry of the first optimizer, and of another one beside it.
FIRST, BESIDE = "optimizer", "optimizer_beside"


def optimizers_with_state(optimizer: MegatronOptimizer | None) -> dict[str, MegatronOptimizer]:
    """The optimizers inside Megatron's chain by their entry in the state; without stubs, of stages that are frozen altogether.

    Raises ValueError for more than two.
    """
    if optimizer is None:
        return {}
    leaves = [leaf for leaf in getattr(optimizer, "chained_optimizers", [optimizer]) if not getattr(leaf, "is_stub_optimizer", False)]
    if len(leaves) > 2:
        raise ValueError(f"a checkpoint holds the state of one or two optimizers; this run has {len(leaves)}")
    return dict(zip((FIRST, BESIDE), leaves, strict=False))


def optimizer_state(
    optimizer: MegatronOptimizer | None, model_state: Mapping[str, Any], is_loading: bool, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Sharded state of every optimizer by its entry, in the model space of ``model_state``; with ``is_loading`` buffers to be filled."""
    with megatron_compat.padded_buckets(optimizer):
        states = {
            entry: leaf.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(metadata))
            for entry, leaf in optimizers_with_state(optimizer).items()
        }
    if metadata["distrib_optim_sharding_type"] == "dp_reshardable" and BESIDE in states:
        # Keys are numbers of buffers there, which both optimizers count from 0.
        add_prefix_for_sharding(states[BESIDE], f"{BESIDE}.")
    return states


def load_optimizer_state(optimizer: MegatronOptimizer | None, loaded: Mapping[str, Any]) -> None:
    """Take over what ``optimizer_state(is_loading=True)`` asked for. What is no tensor comes from the first entry."""
    leaves = optimizers_with_state(optimizer)
    # All of them before the first is loaded, which takes its state apart.
    states = {entry: loaded[FIRST] if entry == FIRST else _completed(loaded[entry], loaded[FIRST]) for entry in leaves}
    for entry, leaf in leaves.items():
        leaf.load_state_dict(states[entry])


def _completed(own: Any, first: Any) -> Any:
    """``own`` with the settings that only ``first`` has. Parameters are numbered, so integers as keys are none."""
    if isinstance(own, Mapping) and isinstance(first, Mapping):
        merged = {key: _completed(value, first[key]) if key in first else value for key, value in own.items()}
        return merged | {key: copy.deepcopy(value) for key, value in first.items() if key not in own and isinstance(key, str)}
    if isinstance(own, list) and isinstance(first, list) and len(own) == len(first):
        return [_completed(left, right) if isinstance(left, Mapping) else left for left, right in zip(own, first, strict=True)]
    return own
