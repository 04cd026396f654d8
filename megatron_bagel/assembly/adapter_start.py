# SPDX-License-Identifier: Apache-2.0
"""The starting point of a run that trains adapters: the weights that they belong to, and the first values of the adapters."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_bagel.assembly.modules import Modules
from megatron_bagel.assembly.starting_weights import InitialSettings, StartSettings, WeightSource, load_folder
from megatron_bagel.checkpoint.dist.stored_adapter import StoredAdapter, adapter_of, identify
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.base_identity import BaseIdentity, path_of
from megatron_bagel.checkpoint.hf.load import assign, entries_of
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora import LoraSettings

logger = logging.getLogger(__name__)


def adapter_of_run(lora: LoraSettings, source: WeightSource, start: StartSettings) -> StoredAdapter:
    """Return the adapters of a run and their base, which is read as far as its digest needs.

    The base is the folder that the run starts from. A run that continues a checkpoint of adapters, or starts from one, takes that
    checkpoint's base.

    Raises:
        ValueError: The run starts from no folder, the base has moved or changed, or the checkpoint's adapters are others.
    """
    folder = source.checkpoint or source.folder
    if folder is None:
        raise ValueError("--lora_rank needs --resume_from and --resume_model_only True: a folder or checkpoint with all weights")
    stored = adapter_of(folder)
    if stored is None:
        if source.checkpoint is not None:
            raise ValueError(
                f"{folder} is the checkpoint of a run without adapters, which --lora_rank cannot continue. Start from its weights with "
                "--resume_model_only True, and give the run a --checkpoint_dir of its own"
            )
        return StoredAdapter(lora, identify(folder, source.weights, source.weights_name))
    _check_same_adapters(stored.lora, lora, folder)
    path = path_of(stored.base, start.adapter_base, "say where it is now with --lora_base")
    current = identify(path, stored.base.weights, stored.base.weights_name)
    stored.base.check(current, folder)
    return StoredAdapter(lora, current)


def _check_same_adapters(stored: LoraSettings, lora: LoraSettings, folder: Path) -> None:
    ours, theirs = lora.to_dict(), stored.to_dict()
    differing = [name for name in ours if ours[name] != theirs[name] and name != "dropout"]
    differences = [f"--lora_{name} ({theirs[name]} there, {ours[name]} here)" for name in differing]
    if differences:
        raise ValueError(f"{folder} holds other adapters: {', '.join(differences)}")


def load_base(initial: InitialSettings, base: BaseIdentity, modules: Modules, arch: BagelArch) -> None:
    """Fill every weight that is no adapter from the base."""
    source = WeightSource(folder=Path(base.folder), weights=base.weights, weights_name=base.weights_name)
    load_folder(initial, source, base.weights, modules, arch)


def fill_adapters(source: WeightSource, adapter: StoredAdapter, modules: Modules, arch: BagelArch, seed: int) -> None:
    """Give the adapters their first values: those of the checkpoint of adapters that the run starts from, or seeded ones."""
    parts, adapter_map = list(modules.named.values()), AdapterMap(arch, adapter.lora)
    if source.folder is None or adapter_of(source.folder) is None:
        adapter_map.initialise(parts, seed)
        return
    stored = CheckpointWeights(source.folder, "sampled")
    read = stored.ema if source.weights == "ema" else stored.model
    for entry, parameter in adapter_map.adapter_entries(parts):
        assign(parameter, read(entry.name), entry)
    for entry, parameter in entries_of(parts, WeightMap(arch)):
        if adapter.lora.trains_in_full(entry.name):
            assign(parameter, read(entry.name), entry)
    logger.info("the adapters start from the %s weights of %s", source.weights, source.folder)
