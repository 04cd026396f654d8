"""Between training checkpoints and Hugging Face folders, tensor by tensor: the work behind tools/checkpoint_convert and exports.

No process group and no model: peak memory is a few tensors whatever the size of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_bagel.checkpoint.dist.stream_write import write_checkpoint
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.folder import HFFolder, PositionTable, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.initial_weights import FirstWeights, initial_value
from megatron_bagel.checkpoint.hf.load import TensorSource, check_against
from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Companions:
    """What a model folder holds besides trained weights: `tokenizer` (folder or `.model` file) and `autoencoder` (weight file)."""

    tokenizer: Path | None
    autoencoder: Path | None


def companions_of(config: Mapping[str, Any]) -> Companions:
    """Where a run took tokenizer and autoencoder from, read from its saved config (sections of flags, or flags directly)."""
    flags: dict[str, Any] = {}
    for key, value in config.items():
        flags |= value if isinstance(value, Mapping) else {key: value}
    folder = flags.get("model_path") if flags.get("finetune_from_hf") else None
    tokenizer = flags.get("tokenizer_path") or folder or flags.get("llm_path")
    autoencoder = f"{folder}/ae.safetensors" if folder else flags.get("vae_path")
    return Companions(Path(tokenizer) if tokenizer else None, Path(autoencoder) if autoencoder else None)


def export_checkpoint(
    folder: str | Path,
    out: str | Path,
    table: PositionTable,
    weights: Sequence[str] = ("ema",),
    dtype: str = "bf16",
    companions: Companions | None = None,
    untrained_from: HFFolder | None = None,
    shard_bytes: int | None = None,
) -> Path:
    """Write the training checkpoint `folder` as a folder in the released layout; returns `out`.

    `weights`: any of "ema" and "model"; `dtype`: "bf16", "fp32" or "keep" (each tensor as it is stored); `companions`: by default those
    the run used; `untrained_from`: a folder that gives the parts the run was trained without (vision tower, image generation);
    `shard_bytes`: largest size of one weight file. The size is logged before anything is written. Raises ValueError when the checkpoint,
    the weights asked for, or a companion's file is not there.
    """
    checkpoint = CheckpointWeights(folder)
    absent = [kind for kind in weights if kind not in checkpoint.kinds()]
    if absent or not weights:
        raise ValueError(f"{folder} holds {' and '.join(checkpoint.kinds())} weights; asked for: {', '.join(weights) or 'none'}")
    if companions is None:
        companions = companions_of(checkpoint.state["run"].get("config", {}))
    arch = checkpoint.arch
    rest: TensorSource | None = None
    if untrained_from is not None:
        arch, rest, companions = _with_parts_of(untrained_from, arch, companions)
    files = {kind: _Export(checkpoint, kind, WeightMap(arch), rest).file(dtype) for kind in weights}
    size = sum(file.bytes(WeightMap(arch)) for file in files.values())
    logger.info("step %d: writing %s, %.2f GB together, to %s", checkpoint.step, " and ".join(weights), size / 1e9, out)
    return write_folder(
        out, arch, files, table, tokenizer=companions.tokenizer, autoencoder=companions.autoencoder, shard_bytes=shard_bytes
    )


def _with_parts_of(folder: HFFolder, arch: BagelArch, companions: Companions) -> tuple[BagelArch, TensorSource, Companions]:
    """`arch` with the vision tower and image generation it lacks taken from `folder`, the folder's weights, and its autoencoder."""
    kinds = folder.available_weights()
    if not kinds:
        raise ValueError(f"{folder.path} has neither ema.safetensors nor model.safetensors to take untrained parts from")
    there = folder.arch
    if arch.vit is None and there.vit is not None:
        settings = ("vit_max_num_patch_per_side", "vit_select_layer", "connector_act", "vit_rope")
        arch = replace(arch, vit=there.vit, **{name: getattr(there, name) for name in settings})
    if arch.autoencoder is None and there.autoencoder is not None:
        size = folder.stored_latent_size(kinds[0]) or there.max_latent_size
        settings = {name: getattr(there, name) for name in ("latent_patch_size", "timestep_shift")}
        arch = replace(arch, autoencoder=there.autoencoder, max_latent_size=size, **settings)
        companions = replace(companions, autoencoder=folder.path / "ae.safetensors")
    return arch, folder.weights(kinds[0]), companions


@dataclass(frozen=True)
class _Export:
    """One weight file's tensors: the checkpoint's, and `rest` for what the checkpoint does not have."""

    checkpoint: CheckpointWeights
    kind: str
    weight_map: WeightMap
    rest: TensorSource | None

    @cached_property
    def _own(self) -> frozenset[str]:
        return frozenset(WeightMap(self.checkpoint.arch).entries)

    def file(self, dtype: str) -> WeightFile:
        given = [name for name in self.weight_map.entries if name not in self._own]
        for name in given:
            entry = self.weight_map.entries[name]
            if self.rest is None or any(hf not in self.rest or self.rest.spec(hf)[0] != shape for hf, shape in _parts(entry)):
                raise ValueError(f"{name} is neither in {self.checkpoint.folder} nor, in this shape, in the folder of untrained parts")
        if given:
            logger.info("%d parameters were not trained and are taken as they are", len(given))
        return WeightFile(self._get, dtype, self._stored_type)

    def _get(self, name: str) -> torch.Tensor:
        if name in self._own:
            return self.checkpoint.read(self.checkpoint.key(name, self.kind))
        entry = self.weight_map.entries[name]
        return entry.fuse([self.rest.get(hf) for hf in entry.hf])

    def _stored_type(self, name: str) -> torch.dtype:
        if name in self._own:
            return self.checkpoint.spec(self.checkpoint.key(name, self.kind))[1]
        return self.rest.spec(self.weight_map.entries[name].hf[0])[1]


def _parts(entry: Entry) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(entry.hf, entry.hf_shapes, strict=True))


def import_folder(
    folder: str | Path, directory: str | Path, weights: Sequence[str] = ("ema",), allow_missing: Sequence[str] = (), **overrides: Any
) -> Path:
    """Write a folder in the released layout as a checkpoint of 0 steps under `directory`; returns the checkpoint's folder.

    Model weights come from "model" if given, else from "ema"; tensors keep their types. With "ema" alone the weights are stored once and
    serve as average, too. There is no optimizer state: train from the result with `--resume_model_only True`. Weights that the folder
    lacks and `allow_missing` (shell patterns of their names there) lets it lack get the values that seed 0 gives them, and are logged.
    `overrides` are settings of `BagelArch` that win over the folder's. Raises ValueError when other tensors are missing, when some are
    left over or of another shape, and for a `max_latent_size` that is not the one of the weights.
    """
    if not weights:
        raise ValueError(f"nothing to import from {folder}: choose ema, model or both")
    source = _sized_as_trained(folder, weights[0], overrides)
    weight_map = WeightMap(source.arch)
    readers = {kind: source.weights(kind) for kind in weights}
    for reader in readers.values():
        if absent := check_against(reader, weight_map, allow_missing).missing:
            logger.info("%s lacks %d tensors, which start from seeded values: %s", reader.path, len(absent), ", ".join(absent))
    plan: dict[str, tuple[TensorSource, Entry]] = {}
    for prefix, reader in (("", readers.get("model", readers.get("ema"))), ("ema.", readers.get("ema") if "model" in readers else None)):
        if reader is not None:
            plan |= {prefix + name: (reader, entry) for name, entry in weight_map.entries.items()}
    specs: dict[str, TensorSpec] = {
        key: (entry.shape, reader.spec(entry.hf[0])[1] if entry.hf[0] in reader else torch.float32) for key, (reader, entry) in plan.items()
    }

    def get(key: str) -> torch.Tensor:
        reader, entry = plan[key]
        if entry.hf[0] not in reader:
            return initial_value(entry, source.arch, seed=0)
        return entry.fuse([reader.get(name) for name in entry.hf])

    head = {
        "run": {"config": {"finetune_from_hf": True, "model_path": str(Path(folder).resolve())}},
        "ema_is_model": tuple(weights) == ("ema",),
    }
    return write_checkpoint(directory, 0, source.arch, specs, get, head)


def _sized_as_trained(folder: str | Path, kind: str, overrides: Mapping[str, Any]) -> HFFolder:
    """The folder, with the `max_latent_size` of its stored position table, whatever its config.json says or leaves out."""
    source, asked = HFFolder(folder, **overrides), overrides.get("max_latent_size")
    stored = source.stored_latent_size(kind)
    if stored is None or stored == source.arch.max_latent_size:
        return source
    if asked is not None:
        raise ValueError(
            f"{folder} was trained with max_latent_size {stored}, as its position table has {stored} x {stored} rows; --max-latent-size "
            f"says {asked}. Leave the flag out; a run that starts from the checkpoint may choose another --max_latent_size"
        )
    return HFFolder(folder, **{**overrides, "max_latent_size": stored})


def write_first_weights(first: FirstWeights, directory: str | Path, companions: Companions) -> Path:
    """Write the weights a run would start from (pretrained parts, seeded values) as a checkpoint of 0 steps; returns its folder.

    Tensors of a folder keep their types, seeded ones are fp32. Raises ValueError when a folder lacks what it must have.
    """
    for line in first.check().lines(first.found.path):
        logger.info(line)
    entries = WeightMap(first.arch).entries
    specs: dict[str, TensorSpec] = {
        name: (entry.shape, first.found.spec(entry.hf[0])[1] if entry.hf[0] in first.found else torch.float32)
        for name, entry in entries.items()
    }

    def get(name: str) -> torch.Tensor:
        entry = entries[name]
        return entry.fuse([first.found.get(hf) for hf in entry.hf]) if entry.hf[0] in first.found else first.seeded(entry)

    flags = {"llm_path": companions.tokenizer, "vae_path": companions.autoencoder}
    config = {name: str(path.resolve()) for name, path in flags.items() if path is not None}
    return write_checkpoint(directory, 0, first.arch, specs, get, {"run": {"config": config}, "ema_is_model": True})
