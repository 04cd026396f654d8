"""What a checkpoint holds, and how it is loaded: Megatron-Core dist_checkpointing (torch_dist) for tensors, one JSON file for the rest.

Tensors are in model space under the weight map's names: ``<name>`` is the weight, ``ema.<name>`` its average, and
``optimizer.state.<kind>.<name>`` the optimizer's. A checkpoint therefore does not depend on the parallel sizes that wrote it, and any
part of it can be read without building a model (tensor_reader.py). All functions here are collective: every rank calls them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

import megatron_bagel
from megatron_bagel.checkpoint.dist import unpickle_guard, step_folders
from megatron_bagel.checkpoint.dist.optimizer_state import load_optimizer_state, optimizer_state
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck, refuse_not_finite
from megatron_bagel.checkpoint.hf.load import assign, entries_of, matches, named_weights
from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)

# One key per layer, so that a single tensor can be read; optimizer state in model space, so that any parallel sizes can load it.
_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
#: Name of the vision tower among the modules.
TOWER = "vision"
# Megatron's linear layers add this for fp8. It is empty here, and no released folder has it.
_EXTRA = "_extra_state"
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


def load_checkpoint(folder: str | Path, trained: Trained, check_weights: WeightCheck = "sampled") -> tuple[int, dict[str, Any]]:
    """Fill weights, optimizer and EMA from ``folder``, bit for bit.

    Returns:
        The number of steps done, and the run's state.

    Raises:
        ValueError: If the folder is no complete checkpoint, does not hold exactly what this run trains, or a weight is not finite.
    """
    folder = Path(folder)
    state = _read_safely(folder)
    check_same_model(BagelArch.from_dict(state["arch"]), trained.arch, folder)
    template = sharded_state(trained, is_loading=True)
    _check_contents(folder, template)
    fill(trained, _load(folder, template))
    _refuse_not_finite(trained.modules, folder, check_weights)
    return int(state["step"]), state["run"]


def fill(trained: Trained, loaded: dict[str, Any]) -> None:
    """Put the loaded values of ``sharded_state(is_loading=True)`` into modules, optimizer and EMA."""
    _fill_modules(trained.modules, loaded)
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
    saved = BagelArch.from_dict(state["arch"])
    # The checkpoint may hold a part that this run has switched off; its tensors are not requested.
    saved = replace(saved, vit=saved.vit if arch.vit else None, autoencoder=saved.autoencoder if arch.autoencoder else None)
    if allow_missing:  # For a part that the checkpoint's run did not have, each tensor is checked against the patterns.
        saved = replace(saved, vit=saved.vit or arch.vit, autoencoder=saved.autoencoder or arch.autoencoder)
    check_same_model(saved, arch, folder)
    stored_shapes = _stored_shapes(folder)
    if weights == "ema" and not step_folders.is_average(state) and not any(key.startswith("ema.") for key in stored_shapes):
        raise ValueError(f"{folder} holds no EMA; load its model weights instead")
    template = {"model": module_state(modules)}
    if weights == "ema":
        for part in template["model"].values():
            for name, tensor in part.items():
                if f"ema.{tensor.key}" in stored_shapes:
                    part[name] = _in_fp32(tensor, f"ema.{tensor.key}")
    missing_names = _remove_missing(template["model"], WeightMap(arch), stored_shapes, allow_missing)
    requested_keys = _check_contents(folder, template, exact=False)
    _fill_modules(modules, _load(folder, template), missing_names)
    _refuse_not_finite(modules, folder, check_weights)
    if initial_value is not None:
        for entry, parameter in entries_of(modules.values(), WeightMap(arch)):
            if entry.name in missing_names:
                assign(parameter, initial_value(entry), entry)
    if dist.get_rank() == 0:
        unused_names = sorted(
            WeightMap(BagelArch.from_dict(state["arch"])).entries.keys() - {key.removeprefix("ema.") for key in requested_keys}
        )
        logger.info(
            "%s: %d tensors loaded (%s weights); not used by this model: %s", folder, len(requested_keys), weights, shorten(unused_names)
        )
    for name in sorted(missing_names):
        logger.info("%s: %s is absent and allowed to be: it starts from its seeded value", folder, name)


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


def _read_safely(folder: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint after checking that its files hold only data."""
    state = step_folders.read_state(folder)
    unpickle_guard.refuse_code(folder)
    return state


def module_state(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Return the sharded state of each module under the weight map's names, parameters unchanged."""
    states = {}
    for name, module in modules.items():
        # A copy, because Megatron writes this run's process group into it. Modules outside Megatron are complete on every rank.
        state = sharded_state_dict_default(
            _unwrapped(module), "", (), dict(_METADATA), tp_group=parallel_state.get_tensor_model_parallel_group()
        )
        if name == TOWER:
            # The tower is complete on the ranks of every pipeline stage, or only on the first stage.
            stage = parallel_state.get_pipeline_model_parallel_rank()
            state = {key: replace(tensor, replica_id=(stage, *tensor.replica_id[1:])) for key, tensor in state.items()}
        states[name] = {key: tensor for key, tensor in state.items() if not key.endswith(_EXTRA)}
    return states


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers that call it ``module``, such as Megatron's DDP."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def check_same_model(saved: BagelArch, current: BagelArch, folder: Path) -> None:
    """Check that a checkpoint's model is this run's. Raises ValueError naming the settings that differ."""
    saved_settings, current_settings = _flat_settings(asdict(saved)), _flat_settings(asdict(current))
    differences = [
        f"{key} ({saved_settings.get(key)} in the checkpoint, {current_settings.get(key)} in this run)"
        for key in sorted(saved_settings.keys() | current_settings.keys())
        if saved_settings.get(key) != current_settings.get(key) and key not in _MAY_DIFFER
    ]
    if differences:
        raise ValueError(f"{folder} holds another model; these settings differ: {', '.join(differences)}")


def provenance(step: int, arch: BagelArch, world_size: int) -> dict[str, Any]:
    """Return the JSON head of every checkpoint: format, step, model, and the versions and world size that wrote it."""
    return {
        "format_version": step_folders.FORMAT_VERSION,
        "step": step,
        "arch": arch.to_dict(),
        "versions": {"megatron_bagel": megatron_bagel.__version__, "megatron_core": megatron.core.__version__, "torch": torch.__version__},
        "world_size": world_size,
    }


def sharded_state(trained: Trained, is_loading: bool, own_buffers: bool = False) -> dict[str, Any]:
    """Return everything that a checkpoint stores as tensors, in model space; with ``is_loading`` empty buffers to fill.

    With ``own_buffers`` the optimizer's state is as this rank's buffers hold it. Nothing is gathered, and only the same parallel sizes
    can load it.
    """
    state: dict[str, Any] = {"model": module_state(trained.modules)}
    metadata = {**_METADATA, "distrib_optim_sharding_type": "dp_reshardable"} if own_buffers else _METADATA
    state |= optimizer_state(trained.optimizer, state["model"], is_loading, metadata)
    if trained.ema is not None:
        state["ema"] = trained.ema.sharded_state_dict(state["model"], is_loading=is_loading)
    return state


def _load(folder: Path, template: dict[str, Any]) -> dict[str, Any]:
    strategy = dist_checkpointing.serialization.get_default_load_sharded_strategy(str(folder))
    return dist_checkpointing.load(
        template, str(folder), sharded_strategy=FullyParallelLoadStrategyWrapper(strategy, data_parallel_group())
    )


def _fill_modules(modules: Mapping[str, nn.Module], loaded: Mapping[str, Any], allowed_missing: Collection[str] = ()) -> None:
    for name, module in modules.items():
        # If a part lacks every weight, the result does not even contain its name.
        result = _unwrapped(module).load_state_dict(loaded["model"].get(name, {}), strict=False)
        missing_keys = [key for key in result.missing_keys if not key.endswith(_EXTRA)]
        if result.unexpected_keys or (missing_keys and not allowed_missing):
            raise ValueError(f"module {name} got no value for {shorten(missing_keys)}, and cannot use {shorten(result.unexpected_keys)}")


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


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.global_shape) for key, t in dist_checkpointing.load_tensors_metadata(str(folder)).items()}


def _in_fp32(tensor: ShardedTensor | ShardedTensorFactory, key: str) -> ShardedTensor | ShardedTensorFactory:
    """Request ``key`` as fp32 into a separate buffer, because an average must not be rounded before the cast to the weight's dtype."""
    buffer = torch.empty_like(tensor.data, dtype=torch.float32)
    if isinstance(tensor, ShardedTensorFactory):
        return replace(tensor, key=key, data=buffer)
    return replace(tensor, key=key, data=buffer, dtype=torch.float32)


def data_parallel_group() -> dist.ProcessGroup:
    """Return the group of ranks that hold the same shards of the model and share the work of writing and reading them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _flat_settings(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name; an absent part is one setting."""
    flat: dict[str, Any] = {}
    for part, value in arch.items():
        flat |= {f"{part}.{key}": setting for key, setting in value.items()} if isinstance(value, Mapping) else {part: value}
    return flat
