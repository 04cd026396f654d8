"""What a checkpoint holds, and loading it: Megatron-Core dist_checkpointing (torch_dist) for tensors, one JSON file for everything else.

Tensors lie in model space under the weight map's names: `<name>` is the weight, `ema.<name>` its average,
`optimizer.state.<kind>.<name>` the optimizer's. So a checkpoint does not depend on the layout that wrote it, and any part of it can be read
without building a model (tensor_reader.py). All functions here are collective: every rank calls them.
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
from megatron_bagel.checkpoint.hf.load import assign, entries_of, matches
from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)

# One key per layer, so that a single tensor can be read; optimizer state in model space, so that any layout can load it.
_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
#: Name of the vision tower among the modules.
TOWER = "vision"
# What Megatron's linear layers add for fp8: empty here, and no weight of a released folder has it.
_EXTRA = "_extra_state"
# Settings of a model that may change from one run to the next: they decide no stored tensor, nor what the stored ones mean.
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
    """The part of the EMA that a checkpoint needs (training/optim/ema.py has the class)."""

    def sharded_state_dict(self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None: ...


@dataclass
class Trained:
    """What a run trains. `modules`: name -> module, wrapped or not: "decoder" or "decoder.0", ... and, with a ViT, "vision"."""

    modules: Mapping[str, nn.Module]
    arch: BagelArch
    optimizer: MegatronOptimizer | None = None
    ema: EmaState | None = None


def load_checkpoint(folder: str | Path, trained: Trained) -> tuple[int, dict[str, Any]]:
    """Fill weights, optimizer and EMA from `folder`, bit for bit; returns (steps done, run_state).

    Raises ValueError when the folder is no complete checkpoint, or does not hold exactly what this run trains.
    """
    folder = Path(folder)
    state = _read_safely(folder)
    check_same_model(BagelArch.from_dict(state["arch"]), trained.arch, folder)
    wanted = sharded_state(trained, is_loading=True)
    _check_contents(folder, wanted)
    fill(trained, _load(folder, wanted))
    return int(state["step"]), state["run"]


def fill(trained: Trained, loaded: dict[str, Any]) -> None:
    """Take over what `sharded_state(is_loading=True)` asked for, after it was loaded."""
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
    absent: Callable[[Entry], torch.Tensor] | None = None,
) -> None:
    """Fill only the modules, from the trained weights ("model") or their average ("ema"); a frozen weight is its own average.

    `allow_missing` (shell patterns of Hugging Face names) and `absent` (gives the full value of such a weight) are those of
    `weights.load_weights`. What was loaded, left over and missing is logged. The optimizer is not touched: call
    `optimizer.reload_model_params()` afterwards so that its main weights follow.
    Raises ValueError like `load_checkpoint`, and when "ema" is asked of a checkpoint without one.
    """
    if weights not in ("model", "ema"):
        raise ValueError(f"weights {weights!r} are unknown; choose model or ema")
    folder = Path(folder)
    state = _read_safely(folder)
    saved = BagelArch.from_dict(state["arch"])
    # A part that this run has switched off may be there: its tensors are not asked for.
    saved = replace(saved, vit=saved.vit if arch.vit else None, autoencoder=saved.autoencoder if arch.autoencoder else None)
    if allow_missing:  # A part that run did not have: whether it may be missing is decided tensor by tensor.
        saved = replace(saved, vit=saved.vit or arch.vit, autoencoder=saved.autoencoder or arch.autoencoder)
    check_same_model(saved, arch, folder)
    present = _stored_shapes(folder)
    if weights == "ema" and not step_folders.is_average(state) and not any(key.startswith("ema.") for key in present):
        raise ValueError(f"{folder} holds no EMA; load its model weights instead")
    wanted = {"model": module_state(modules)}
    if weights == "ema":
        for part in wanted["model"].values():
            for name, tensor in part.items():
                if f"ema.{tensor.key}" in present:
                    part[name] = _in_fp32(tensor, f"ema.{tensor.key}")
    lacking = _take_out_missing(wanted["model"], WeightMap(arch), present, allow_missing)
    asked = _check_contents(folder, wanted, all_of_it=False)
    _fill_modules(modules, _load(folder, wanted), lacking)
    if absent is not None:
        for entry, parameter in entries_of(modules.values(), WeightMap(arch)):
            if entry.ours in lacking:
                assign(parameter, absent(entry), entry)
    if dist.get_rank() == 0:
        unused = sorted(WeightMap(BagelArch.from_dict(state["arch"])).entries.keys() - {key.removeprefix("ema.") for key in asked})
        logger.info("%s: %d tensors loaded (%s weights); not used by this model: %s", folder, len(asked), weights, shorten(unused))
    for name in sorted(lacking):
        logger.info("%s: %s is absent and allowed to be: it starts from its seeded value", folder, name)


def _take_out_missing(
    wanted: Mapping[str, dict[str, Any]], weight_map: WeightMap, present: Mapping[str, Any], allow_missing: Sequence[str]
) -> set[str]:
    """Remove from `wanted` the weights that are not `present` and need not be; returns their names."""
    lacking = set()
    for part in wanted.values():
        for name, tensor in list(part.items()):
            entry = weight_map.entries.get(tensor.key)
            if tensor.key not in present and entry is not None and all(matches(hf, allow_missing) for hf in entry.hf):
                lacking.add(tensor.key)
                del part[name]
    return lacking


def _read_safely(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint that is about to be loaded, its files found to hold nothing but data."""
    state = step_folders.read_state(folder)
    unpickle_guard.refuse_code(folder)
    return state


def module_state(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Sharded state of each module, parameters kept as they are. Keys are the weight map's names."""
    states = {}
    for name, module in modules.items():
        while hasattr(module, "module"):
            module = module.module
        # A copy, for Megatron writes this run's process group into it. What is not a Megatron module is whole on every rank.
        state = sharded_state_dict_default(
            module, "", (), dict(_METADATA), tp_group=parallel_state.get_tensor_model_parallel_group()
        )
        if name == TOWER:
            # Whole on the ranks of every pipeline stage, or on the first alone.
            stage = parallel_state.get_pipeline_model_parallel_rank()
            state = {key: replace(tensor, replica_id=(stage, *tensor.replica_id[1:])) for key, tensor in state.items()}
        states[name] = {key: tensor for key, tensor in state.items() if not key.endswith(_EXTRA)}
    return states


def check_same_model(saved: BagelArch, ours: BagelArch, folder: Path) -> None:
    """Raise ValueError naming the settings in which a checkpoint's model differs from this run's."""
    there, here = _flat(asdict(saved)), _flat(asdict(ours))
    differing = [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key not in _MAY_DIFFER
    ]
    if differing:
        raise ValueError(f"{folder} holds another model; these settings differ: {', '.join(differing)}")


def provenance(step: int, arch: BagelArch, world_size: int) -> dict[str, Any]:
    """The JSON head of every checkpoint: format, step, model, and the versions and world size that wrote it."""
    return {
        "format_version": step_folders.FORMAT_VERSION,
        "step": step,
        "arch": arch.to_dict(),
        "versions": {"megatron_bagel": megatron_bagel.__version__, "megatron_core": megatron.core.__version__, "torch": torch.__version__},
        "world_size": world_size,
    }


def sharded_state(trained: Trained, is_loading: bool, own_buffers: bool = False) -> dict[str, Any]:
    """Everything a checkpoint stores as tensors, in model space; with `is_loading` empty buffers to be filled.

    With `own_buffers` the optimizer's state is as it lies on this rank: nothing is gathered, and only the same layout can load it.
    """
    state: dict[str, Any] = {"model": module_state(trained.modules)}
    metadata = {**_METADATA, "distrib_optim_sharding_type": "dp_reshardable"} if own_buffers else _METADATA
    state |= optimizer_state(trained.optimizer, state["model"], is_loading, metadata)
    if trained.ema is not None:
        state["ema"] = trained.ema.sharded_state_dict(state["model"], is_loading=is_loading)
    return state


def _load(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    strategy = dist_checkpointing.serialization.get_default_load_sharded_strategy(str(folder))
    return dist_checkpointing.load(wanted, str(folder), sharded_strategy=FullyParallelLoadStrategyWrapper(strategy, data_parallel_group()))


def _fill_modules(modules: Mapping[str, nn.Module], loaded: Mapping[str, Any], lacking: Collection[str] = ()) -> None:
    for name, module in modules.items():
        while hasattr(module, "module"):
            module = module.module
        # Of a part that lacks every weight nothing comes back, not even its name.
        result = module.load_state_dict(loaded["model"].get(name, {}), strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(_EXTRA)]
        if result.unexpected_keys or (missing and not lacking):
            raise ValueError(f"module {name} got no value for {shorten(missing)}, and has no place for {shorten(result.unexpected_keys)}")


def _check_contents(folder: Path, wanted: Mapping[str, Any], all_of_it: bool = True) -> set[str]:
    """Compare keys and shapes on disk with what all ranks together ask for (`all_of_it`: and nothing else may be there).

    Returns the keys asked for.
    """
    present = _stored_shapes(folder)
    # Where the vocabulary is padded for a layout, the number of rows may differ.
    mine = {tensor.key: (tuple(tensor.global_shape), int(tensor.allow_shape_mismatch)) for tensor in sharded_tensors(wanted)}
    everyone: list[dict[str, tuple[tuple[int, ...], int]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    asked = {key: held for part in everyone if part for key, held in part.items()}
    missing = sorted(asked.keys() - present.keys())
    surplus = sorted(present.keys() - asked.keys()) if all_of_it else []
    if missing or surplus:
        raise ValueError(
            f"{folder} does not hold what this run trains: missing {shorten(missing)}; left over {shorten(surplus)}. Freeze flags, "
            "--use-distributed-optimizer and EMA must be as in the run that saved it; to start afresh from its weights pass "
            "--resume_model_only True"
        )
    wrong = [f"{key}: {present[key]} there, {shape} here" for key, (shape, free) in asked.items() if present[key][free:] != shape[free:]]
    if wrong:
        raise ValueError(f"{folder} holds tensors of other shapes: {shorten(wrong)}")
    return set(asked)


def sharded_tensors(state: Any) -> Sequence[ShardedTensor]:
    """Every sharded tensor in a state, those that factories make included."""
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
    """Ask for `key` as fp32, into a buffer of its own: an average must not be rounded before it is cast to the weight's dtype."""
    buffer = torch.empty_like(tensor.data, dtype=torch.float32)
    if isinstance(tensor, ShardedTensorFactory):
        return replace(tensor, key=key, data=buffer)
    return replace(tensor, key=key, data=buffer, dtype=torch.float32)


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks that hold the same shards of the model, and share the work of writing and reading them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _flat(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name; a part that is absent is one setting."""
    flat: dict[str, Any] = {}
    for part, value in arch.items():
        flat |= {f"{part}.{key}": setting for key, setting in value.items()} if isinstance(value, Mapping) else {part: value}
    return flat
