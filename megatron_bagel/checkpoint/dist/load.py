# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is loaded, bit for bit or only its weights. state.py says what it holds.

All functions here are collective: every rank calls them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch import nn

from megatron_bagel.checkpoint.dist import step_folders, unpickle_guard
from megatron_bagel.checkpoint.dist.optimizer_state import load_optimizer_state
from megatron_bagel.checkpoint.dist.state import (
    EXTRA_STATE,
    Trained,
    data_parallel_group,
    module_state,
    sharded_state,
    sharded_tensors,
    unwrapped,
)
from megatron_bagel.checkpoint.dist.stored_adapter import refuse_adapters
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck, refuse_not_finite
from megatron_bagel.checkpoint.hf.load import assign, entries_of, matches, named_weights
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.common.notices import say_once
from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora import is_factor

logger = logging.getLogger(__name__)

# Settings of a model that may change between runs, because they decide neither a stored tensor nor its meaning.
_MAY_DIFFER = (
    "max_latent_size",
    "interpolate_pos",
    "timestep_shift",
    "llm.max_position_embeddings",
    "llm.initializer_range",
    "llm.extra",
    "vit.extra",
    "autoencoder.resolution",
)


def load_checkpoint(folder: str | Path, trained: Trained, check_weights: WeightCheck = "sampled") -> tuple[int, dict[str, Any]]:
    """Fill weights, optimizer and EMA from ``folder``, bit for bit.

    Returns:
        The number of steps done, and the run's state.

    Raises:
        ValueError: If the folder is no complete checkpoint, does not hold exactly what this run trains, or a weight is not finite.
    """
    folder = Path(folder)
    state = _read_safely(folder)
    _check_same_model(BagelArch.from_dict(state["arch"]), trained.arch, folder)
    if trained.adapter is None:
        refuse_adapters(state, folder)
    template = sharded_state(trained, is_loading=True)
    _check_contents(folder, template)
    fill(trained, _load(folder, template))
    _refuse_not_finite(trained.modules, folder, check_weights)
    return int(state["step"]), state["run"]


def fill(trained: Trained, loaded: dict[str, Any]) -> None:
    """Put the loaded values of ``sharded_state(is_loading=True)`` into modules, optimizer and EMA."""
    _fill_modules(trained.modules, loaded, base_is_loaded=trained.adapter is not None)
    # The distributed optimizer copies into leaf tensors that require gradients.
    with torch.no_grad():
        load_optimizer_state(trained.optimizer, loaded)
        if trained.ema is not None:
            trained.ema.load_state_dict(loaded["ema"])


def load_weights_only(
    folder: str | Path,
    modules: Mapping[str, nn.Module],
    arch: BagelArch,
    weights: str = "model",
    allow_missing: Sequence[str] = (),
    initial_value: Callable[[Entry], torch.Tensor] | None = None,
    check_weights: WeightCheck = "sampled",
) -> None:
    """Fill only the modules, from the trained weights ("model") or their average ("ema"). A frozen weight is its average.

    The log lists which tensors were loaded, unused and missing. The optimizer is not touched: call
    ``optimizer.reload_model_params()`` afterwards so that its main weights follow.

    Args:
        folder: The checkpoint.
        modules: The modules by name.
        arch: The model of this run.
        weights: "model" or "ema".
        allow_missing: Shell patterns of Hugging Face names that the checkpoint may lack.
        initial_value: Returns the full value of a weight that it lacks.
        check_weights: How many values of each weight are checked to be finite.

    Raises:
        ValueError: Like ``load_checkpoint``, and if a checkpoint without an average is asked for "ema".
    """
    if weights not in ("model", "ema"):
        raise ValueError(f"weights {weights!r} are unknown; choose model or ema")
    folder = Path(folder)
    state = _read_safely(folder)
    refuse_adapters(state, folder)
    saved_arch, weight_map = BagelArch.from_dict(state["arch"]), WeightMap(arch)
    _check_same_model(_requested_parts(saved_arch, arch, bool(allow_missing)), arch, folder)
    template, stored_shapes = {"model": _without_adapters(module_state(modules))}, _stored_shapes(folder)
    if weights == "ema":
        _request_averages(folder, state, template["model"], stored_shapes)
    missing_names = _remove_missing(template["model"], weight_map, stored_shapes, allow_missing)
    requested_keys = _check_contents(folder, template, exact=False)
    _fill_modules(modules, _load(folder, template), missing_names)
    _refuse_not_finite(modules, folder, check_weights)
    if initial_value is not None:
        _fill_missing(modules, weight_map, missing_names, initial_value)
    _log_loaded(folder, weights, requested_keys, WeightMap(saved_arch), missing_names)


def _without_adapters(states: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the states of modules without the factors of adapters, which start from values of their own."""
    return {name: {key: tensor for key, tensor in state.items() if not is_factor(key)} for name, state in states.items()}


def _requested_parts(saved: BagelArch, current: BagelArch, may_lack_parts: bool) -> BagelArch:
    """Return the checkpoint's model with the parts that this run requests of it."""
    # The checkpoint may hold a part that this run has switched off; its tensors are not requested.
    vit, autoencoder = saved.vit if current.vit else None, saved.autoencoder if current.autoencoder else None
    if may_lack_parts:  # For a part that the checkpoint's run did not have, each tensor is checked against the patterns.
        vit, autoencoder = vit or current.vit, autoencoder or current.autoencoder
    return replace(saved, vit=vit, autoencoder=autoencoder)


def _request_averages(
    folder: Path, state: Mapping[str, Any], template: Mapping[str, dict[str, Any]], stored_shapes: Mapping[str, Any]
) -> None:
    """Request the average of each weight that has one, in place of the weight. Raises ValueError if the checkpoint has none."""
    if not step_folders.is_average(state) and not any(key.startswith("ema.") for key in stored_shapes):
        raise ValueError(f"{folder} holds no EMA; load its model weights instead")
    for part in template.values():
        for name, tensor in part.items():
            if f"ema.{tensor.key}" in stored_shapes:
                part[name] = _in_fp32(tensor, f"ema.{tensor.key}")


def _remove_missing(
    template: Mapping[str, dict[str, Any]], weight_map: WeightMap, stored_shapes: Mapping[str, Any], allow_missing: Sequence[str]
) -> set[str]:
    """Remove from ``template`` the weights that are not stored and need not be; return their names."""
    missing_names = set()
    for part in template.values():
        for name, tensor in list(part.items()):
            entry = weight_map.entries.get(tensor.key)
            if tensor.key not in stored_shapes and entry is not None and all(matches(hf, allow_missing) for hf in entry.hf):
                missing_names.add(tensor.key)
                del part[name]
    return missing_names


def _log_loaded(folder: Path, weights: str, requested_keys: Set[str], saved: WeightMap, missing_names: Set[str]) -> None:
    """Log on rank 0 what was loaded and what stayed unused, and on every rank which of its weights were missing."""
    if dist.get_rank() == 0:
        unused_names = sorted(saved.entries.keys() - {key.removeprefix("ema.") for key in requested_keys})
        logger.info(
            "%s: %d tensors loaded (%s weights); not used by this model: %s", folder, len(requested_keys), weights, shorten(unused_names)
        )
    if missing_names:
        said = f"{len(missing_names)} tensors are absent and allowed to be; they start from their seeded values"
        say_once(logger, f"{folder}: {said}: {shorten(sorted(missing_names))}")


def _read_safely(folder: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint after checking that its files hold only data."""
    state = step_folders.read_state(folder)
    unpickle_guard.refuse_code(folder)
    return state


def _check_same_model(saved: BagelArch, current: BagelArch, folder: Path) -> None:
    """Check that a checkpoint's model is this run's. Raises ValueError naming the settings that differ."""
    saved_settings, current_settings = _flat_settings(asdict(saved)), _flat_settings(asdict(current))
    differences = [
        f"{key} ({saved_settings.get(key)} in the checkpoint, {current_settings.get(key)} in this run)"
        for key in sorted(saved_settings.keys() | current_settings.keys())
        if saved_settings.get(key) != current_settings.get(key) and key not in _MAY_DIFFER
    ]
    if differences:
        raise ValueError(f"{folder} holds another model; these settings differ: {', '.join(differences)}")


def _flat_settings(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name; an absent part is one setting."""
    flat: dict[str, Any] = {}
    for part, value in arch.items():
        flat |= {f"{part}.{key}": setting for key, setting in value.items()} if isinstance(value, Mapping) else {part: value}
    return flat


def _load(folder: Path, template: dict[str, Any]) -> dict[str, Any]:
    strategy = dist_checkpointing.serialization.get_default_load_sharded_strategy(str(folder))
    return dist_checkpointing.load(
        template, str(folder), sharded_strategy=FullyParallelLoadStrategyWrapper(strategy, data_parallel_group())
    )


def _fill_modules(
    modules: Mapping[str, nn.Module], loaded: Mapping[str, Any], allowed_missing: Collection[str] = (), base_is_loaded: bool = False
) -> None:
    for name, module in modules.items():
        # If a part lacks every weight, the result does not even contain its name.
        result = unwrapped(module).load_state_dict(loaded["model"].get(name, {}), strict=False)
        missing_keys = [key for key in result.missing_keys if not key.endswith(EXTRA_STATE) and is_factor(key) == base_is_loaded]
        if result.unexpected_keys or (missing_keys and not allowed_missing):
            raise ValueError(f"module {name} got no value for {shorten(missing_keys)}, and cannot use {shorten(result.unexpected_keys)}")


def _fill_missing(
    modules: Mapping[str, nn.Module], weight_map: WeightMap, missing_names: Set[str], initial_value: Callable[[Entry], torch.Tensor]
) -> None:
    for entry, parameter in entries_of(modules.values(), weight_map):
        if entry.name in missing_names:
            assign(parameter, initial_value(entry), entry)


def _refuse_not_finite(modules: Mapping[str, nn.Module], folder: Path, check_weights: WeightCheck) -> None:
    """Raise ValueError if a weight of this rank is not finite."""
    for name, parameter in named_weights(modules.values()).items():
        refuse_not_finite(parameter, name, folder, check_weights)


def _check_contents(folder: Path, template: Mapping[str, Any], exact: bool = True) -> set[str]:
    """Compare keys and shapes on disk with what all ranks together request.

    With ``exact`` the checkpoint may hold nothing else.

    Returns:
        The requested keys.
    """
    stored_shapes = _stored_shapes(folder)
    # If the vocabulary is padded for the tensor-parallel size, the number of rows may differ.
    rank_shapes = {tensor.key: (tuple(tensor.global_shape), int(tensor.allow_shape_mismatch)) for tensor in sharded_tensors(template)}
    shapes_by_rank: list[dict[str, tuple[tuple[int, ...], int]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes_by_rank, rank_shapes)
    requested_shapes = {
        key: shape_and_free_dims for rank_part in shapes_by_rank if rank_part for key, shape_and_free_dims in rank_part.items()
    }
    missing_keys = sorted(requested_shapes.keys() - stored_shapes.keys())
    unexpected_keys = sorted(stored_shapes.keys() - requested_shapes.keys()) if exact else []
    if missing_keys or unexpected_keys:
        raise ValueError(
            f"{folder} does not hold what this run trains: missing {shorten(missing_keys)}; unexpected {shorten(unexpected_keys)}. Freeze "
            "flags, --use-distributed-optimizer and EMA must be as in the run that saved it; to start afresh from its weights pass "
            "--resume_model_only True"
        )
    shape_errors = [
        f"{key}: {stored_shapes[key]} in the checkpoint, {shape} in this run"
        for key, (shape, free_dims) in requested_shapes.items()
        if stored_shapes[key][free_dims:] != shape[free_dims:]
    ]
    if shape_errors:
        raise ValueError(f"{folder} holds tensors of other shapes: {shorten(shape_errors)}")
    return set(requested_shapes)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.global_shape) for key, t in dist_checkpointing.load_tensors_metadata(str(folder)).items()}


def _in_fp32(tensor: ShardedTensor | ShardedTensorFactory, key: str) -> ShardedTensor | ShardedTensorFactory:
    """Request ``key`` as fp32 into a separate buffer, because an average must not be rounded before the cast to the weight's dtype."""
    buffer = torch.empty_like(tensor.data, dtype=torch.float32)
    if isinstance(tensor, ShardedTensorFactory):
        return replace(tensor, key=key, data=buffer)
    return replace(tensor, key=key, data=buffer, dtype=torch.float32)
