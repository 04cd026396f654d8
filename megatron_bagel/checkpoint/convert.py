# SPDX-License-Identifier: Apache-2.0
"""Converts between training checkpoints and Hugging Face folders, tensor by tensor: the work behind the converters and exports.

It needs neither process group nor model, and peak memory is a few tensors for a model of any size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_bagel.checkpoint.dist.last_losses import last_losses
from megatron_bagel.checkpoint.dist.stored_adapter import refuse_adapters
from megatron_bagel.checkpoint.dist.stream_write import write_checkpoint
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.folder import HFFolder, PositionTable, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.hub import HubRequest, download
from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights, initial_value
from megatron_bagel.checkpoint.hf.last_reads import LastReads
from megatron_bagel.checkpoint.hf.load import check_against
from megatron_bagel.checkpoint.hf.model_card import CardFacts
from megatron_bagel.checkpoint.hf.read_fused import read_fused
from megatron_bagel.checkpoint.hf.reused_memory import ReusedMemory
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, TensorSpec
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.common.folder_files import AUTOENCODER_CONFIG_FILES
from megatron_bagel.common.hub_names import pinned_hub_name
from megatron_bagel.common.safetensors_header import AUTOENCODER_FILE
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.paths import TYPED, with_hub_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Companions:
    """A model folder's files besides trained weights: ``tokenizer`` (folder or ``.model`` file) and ``autoencoder`` (weight file)."""

    tokenizer: Path | None
    autoencoder: Path | None

    def on_this_machine(self) -> Companions:
        """Return the same files with folders in place of models on a hub. Raises ValueError if they cannot be downloaded."""
        tokenizer, autoencoder = self.tokenizer, self.autoencoder
        if tokenizer is not None and not tokenizer.exists() and (name := pinned_hub_name(str(tokenizer))) is not None:
            tokenizer = download(HubRequest("the run's tokenizer", name), str(name.revision))
        if autoencoder is not None and not autoencoder.exists() and (name := pinned_hub_name(str(autoencoder.parent))) is not None:
            request = HubRequest("the run's autoencoder", name, files=AUTOENCODER_CONFIG_FILES, autoencoder="needed")
            autoencoder = download(request, str(name.revision)) / AUTOENCODER_FILE
        return Companions(tokenizer, autoencoder)


def flags_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's flags by name, by its saved config (sections of flags, or flags directly)."""
    flags: dict[str, Any] = {}
    for key, value in with_hub_names(config).items():
        if key == TYPED:
            continue
        flags |= value if isinstance(value, Mapping) else {key: value}
    return flags


def companions_of(config: Mapping[str, Any]) -> Companions:
    """Return where a run took tokenizer and autoencoder from, by its saved config (sections of flags, or flags directly)."""
    flags = flags_of(config)
    folder = flags.get("model_path") if flags.get("finetune_from_hf") else None
    tokenizer = flags.get("tokenizer_path") or folder or flags.get("llm_path")
    autoencoder = f"{folder}/{AUTOENCODER_FILE}" if folder else flags.get("vae_path")
    if autoencoder and pinned_hub_name(autoencoder) is not None:  # a whole model stands for its autoencoder
        autoencoder = f"{autoencoder}/{AUTOENCODER_FILE}"
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
    """Write the training checkpoint ``folder`` as a folder in the released format.

    The size is logged before anything is written.

    Args:
        folder: The checkpoint.
        out: The folder to write.
        table: Computes position tables.
        weights: Any of "ema" and "model".
        dtype: "bf16", "fp32" or "keep" (each tensor's stored type).
        companions: Tokenizer and autoencoder; None means those of the run.
        untrained_from: A folder that provides parts the run was trained without (vision tower, image generation).
        shard_bytes: The largest size of one weight file.

    Returns:
        ``out``.

    Raises:
        ValueError: If the checkpoint, the requested weights or a companion's file does not exist.
    """
    checkpoint = CheckpointWeights(folder, "sampled", read_once=True)
    refuse_adapters(checkpoint.state, checkpoint.folder)
    _check_kinds(checkpoint, weights)
    companions = companions or companions_of(checkpoint.state["run"].get("config", {}))
    arch, other_source, companions = _with_parts_of(untrained_from, checkpoint.arch, companions.on_this_machine())
    files = {kind: _Export(checkpoint, kind, WeightMap(arch), other_source).file(dtype) for kind in weights}
    size = sum(file.bytes(WeightMap(arch)) for file in files.values())
    logger.info("step %d: writing %s, %.2f GB together, to %s", checkpoint.step, " and ".join(weights), size / 1e9, out)
    return write_folder(
        out, arch, files, table, tokenizer=companions.tokenizer, autoencoder=companions.autoencoder, shard_bytes=shard_bytes,
        facts=_card_facts(checkpoint),
    )  # fmt: skip


def _card_facts(checkpoint: CheckpointWeights) -> CardFacts:
    """Return what the model card says of the run that wrote a checkpoint."""
    run = checkpoint.state["run"]
    config, data = run.get("config", {}), run.get("data") or {}
    return CardFacts(
        checkpoint.step,
        flags_of(config),
        last_losses(checkpoint),
        datasets=dict(zip(data.get("names", ()), data.get("sizes", ()), strict=False)),
        samples=int(run.get("consumed_samples") or 0),
        tokens=int(run.get("consumed_tokens") or 0),
        base_models=[text for text in (config.get(TYPED) or {}).values() if pinned_hub_name(str(text)) is not None],
    )


def _check_kinds(checkpoint: CheckpointWeights, weights: Sequence[str]) -> None:
    """Raise ValueError unless ``weights`` names at least one kind, and only kinds that the checkpoint holds."""
    missing_kinds = [kind for kind in weights if kind not in checkpoint.kinds()]
    if missing_kinds or not weights:
        raise ValueError(f"{checkpoint.folder} holds {' and '.join(checkpoint.kinds())} weights; asked for: {', '.join(weights) or 'none'}")


def _with_parts_of(folder: HFFolder | None, arch: BagelArch, companions: Companions) -> tuple[BagelArch, TensorSource | None, Companions]:
    """Add the vision tower and image generation of ``folder``, if given, that ``arch`` lacks.

    Returns:
        The model with these parts, the weights of the folder, and the files of the model folder with the autoencoder of ``folder``.
    """
    if folder is None:
        return arch, None, companions
    kinds = folder.available_weights()
    if not kinds:
        raise ValueError(f"{folder.path} has neither ema.safetensors nor model.safetensors to take untrained parts from")
    folder_arch = folder.arch
    if arch.vit is None and folder_arch.vit is not None:
        names = ("vit_max_num_patch_per_side", "vit_select_layer", "connector_act", "vit_rope")
        arch = replace(arch, vit=folder_arch.vit, **{name: getattr(folder_arch, name) for name in names})
    if arch.autoencoder is None and folder_arch.autoencoder is not None:
        size = folder.stored_latent_size(kinds[0]) or folder_arch.max_latent_size
        settings: dict[str, Any] = {name: getattr(folder_arch, name) for name in ("latent_patch_size", "timestep_shift")}
        arch = replace(arch, autoencoder=folder_arch.autoencoder, max_latent_size=size, **settings)
        companions = replace(companions, autoencoder=folder.path / "ae.safetensors")
    return arch, folder.weights(kinds[0]), companions


@dataclass(frozen=True)
class _Export:
    """The tensors of one weight file: the checkpoint's, and ``other_source`` for those that the checkpoint lacks."""

    checkpoint: CheckpointWeights
    kind: str
    weight_map: WeightMap
    other_source: TensorSource | None
    memory: ReusedMemory = field(default_factory=ReusedMemory)

    @cached_property
    def _checkpoint_names(self) -> frozenset[str]:
        return frozenset(WeightMap(self.checkpoint.arch).entries)

    @property
    def _untrained(self) -> TensorSource:
        if self.other_source is None:
            raise ValueError(f"{self.checkpoint.folder} lacks weights of this model, and no folder of untrained parts was given")
        return self.other_source

    def file(self, dtype: str) -> WeightFile:
        other_names = [name for name in self.weight_map.entries if name not in self._checkpoint_names]
        for name in other_names:
            entry = self.weight_map.entries[name]
            if self.other_source is None or any(
                hf not in self.other_source or self.other_source.spec(hf)[0] != shape for hf, shape in _parts(entry)
            ):
                raise ValueError(f"{name} is neither in {self.checkpoint.folder} nor, in this shape, in the folder of untrained parts")
        if other_names:
            logger.info("%d parameters were not trained and are copied unchanged", len(other_names))
        return WeightFile(self._get, dtype, self._stored_type, self.memory)

    def _get(self, name: str) -> torch.Tensor:
        if name in self._checkpoint_names:
            return self.checkpoint.read(self.checkpoint.key(name, self.kind), self.memory)
        return read_fused(self._untrained, self.weight_map.entries[name], self.memory)

    def _stored_type(self, name: str) -> torch.dtype:
        if name in self._checkpoint_names:
            return self.checkpoint.spec(self.checkpoint.key(name, self.kind))[1]
        return self._untrained.spec(self.weight_map.entries[name].hf[0])[1]


def _parts(entry: Entry) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(entry.hf, entry.hf_shapes, strict=True))


def import_folder(
    folder: str | Path,
    directory: str | Path,
    weights: Sequence[str] = ("ema",),
    allow_missing: Sequence[str] = (),
    hub_name: str | None = None,
    **overrides: Any,
) -> Path:
    """Write a folder in the released format as a checkpoint of 0 steps under ``directory``.

    Tensors keep their types. Model weights come from "model" if given, else from "ema"; with "ema" alone the weights are stored once
    and also serve as the average. There is no optimizer state: train from the result with ``--resume_model_only True``.

    Args:
        folder: The folder to import.
        directory: The folder of checkpoints.
        weights: Any of "ema" and "model".
        allow_missing: Shell patterns of names that the folder may lack. Such weights get seed 0's values, and are logged.
        hub_name: The model on a hub that the folder was downloaded from, with its commit.
        overrides: Settings of ``BagelArch`` that replace the folder's.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: If other tensors are missing, any is unexpected or of another shape, or ``max_latent_size`` is not the stored one.
    """
    if not weights:
        raise ValueError(f"nothing to import from {folder}: choose ema, model or both")
    source = _with_stored_latent_size(folder, weights[0], overrides)
    tensors = _FolderTensors(source.arch, {kind: source.weights(kind, read_once=True) for kind in weights})
    tensors.check(allow_missing)
    config: dict[str, Any] = {"finetune_from_hf": True, "model_path": str(Path(folder).resolve())}
    if source.sources.llm_path is not None and not (source.path / "llm_config.json").is_file():
        config["tokenizer_path"] = str(source.sources.llm_path.resolve())
    if hub_name is not None:
        config[TYPED] = {"model_path": hub_name}
    head = {
        "run": {"config": config},
        "ema_is_model": tuple(weights) == ("ema",),
    }
    return write_checkpoint(directory, 0, source.arch, tensors.specs(), tensors.get, head, tensors.memory)


class _FolderTensors:
    """The tensors of a checkpoint of ``arch`` that ``readers`` ("ema", "model" or both) provide; seed 0 provides the others."""

    def __init__(self, arch: BagelArch, readers: Mapping[str, SafetensorsReader]) -> None:
        self._arch, self._weight_map, self._readers = arch, WeightMap(arch), readers
        self.memory = ReusedMemory()
        self._sources: dict[str, tuple[TensorSource, Entry]] = {}
        model, average = readers.get("model", readers.get("ema")), readers.get("ema") if "model" in readers else None
        for prefix, reader in (("", model), ("ema.", average)):
            if reader is not None:
                self._sources |= {prefix + name: (reader, entry) for name, entry in self._weight_map.entries.items()}

    def check(self, allow_missing: Sequence[str]) -> None:
        """Log what the folder lacks. Raises ValueError if it lacks or holds more than it may."""
        for reader in self._readers.values():
            if missing_names := check_against(reader, self._weight_map, allow_missing).missing:
                logger.info(
                    "%s lacks %d tensors, which start from seeded values: %s", reader.path, len(missing_names), ", ".join(missing_names)
                )

    def specs(self) -> dict[str, TensorSpec]:
        return {key: (entry.shape, _stored_dtype(reader, entry)) for key, (reader, entry) in self._sources.items()}

    def get(self, key: str) -> torch.Tensor:
        reader, entry = self._sources[key]
        return read_fused(reader, entry, self.memory) if entry.hf[0] in reader else initial_value(entry, self._arch, seed=0)


def _stored_dtype(source: TensorSource, entry: Entry) -> torch.dtype:
    """Return the type of a weight in ``source``, or fp32 if it is seeded."""
    return source.spec(entry.hf[0])[1] if entry.hf[0] in source else torch.float32


def _with_stored_latent_size(folder: str | Path, kind: str, overrides: Mapping[str, Any]) -> HFFolder:
    """Open the folder with the ``max_latent_size`` of its stored position table, whatever its config.json says."""
    source, requested = HFFolder(folder, **overrides), overrides.get("max_latent_size")
    stored_size = source.stored_latent_size(kind)
    if stored_size is None or stored_size == source.arch.max_latent_size:
        return source
    if requested is not None:
        raise ValueError(
            f"{folder} was trained with max_latent_size {stored_size}, the side of its position table, but --max-latent-size says "
            f"{requested}. Leave the flag out; a run that starts from the checkpoint may choose another --max_latent_size"
        )
    return HFFolder(folder, **{**overrides, "max_latent_size": stored_size})


def write_initial_weights(initial_weights: InitialWeights, directory: str | Path, companions: Companions) -> Path:
    """Write the weights that a run would start from (pretrained parts, seeded values) as a checkpoint of 0 steps.

    Tensors of a folder keep their types, and seeded ones are fp32.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: If a folder lacks a required tensor.
    """
    for line in initial_weights.check().lines(initial_weights.pretrained.path):
        logger.info(line)
    pretrained, entries = initial_weights.pretrained, WeightMap(initial_weights.arch).entries
    specs: dict[str, TensorSpec] = {name: (entry.shape, _stored_dtype(pretrained, entry)) for name, entry in entries.items()}
    memory = ReusedMemory()
    reads = LastReads(pretrained, (name for entry in entries.values() if entry.hf[0] in pretrained for name in entry.hf))

    def get(name: str) -> torch.Tensor:
        entry = entries[name]
        if entry.hf[0] not in pretrained:
            return initial_weights.seeded(entry)
        full = read_fused(pretrained, entry, memory)
        reads.done(entry.hf)
        return full

    flags = {"llm_path": companions.tokenizer, "vae_path": companions.autoencoder}
    config = {name: str(path.resolve()) for name, path in flags.items() if path is not None}
    head = {"run": {"config": config}, "ema_is_model": True}
    return write_checkpoint(directory, 0, initial_weights.arch, specs, get, head, memory)
