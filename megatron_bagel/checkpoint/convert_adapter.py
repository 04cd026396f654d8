# SPDX-License-Identifier: Apache-2.0
"""Adapters between training checkpoints and PEFT's files, and merged into whole model folders. No process group and no model is needed."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bagel.checkpoint.convert import Companions, companions_of
from megatron_bagel.checkpoint.dist.adapter_reader import merged, opened, read_adapter, read_adapter_checkpoint
from megatron_bagel.checkpoint.dist.step_folders import is_complete
from megatron_bagel.checkpoint.dist.stored_adapter import ADAPTER, StoredAdapter, identify, refuse_adapters
from megatron_bagel.checkpoint.dist.stream_write import write_checkpoint
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.folder import DTYPES, HFFolder, PositionTable, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.peft_folder import MergedSource, ReleasedAdapter, write_peft_folder
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.common.json_files import read_json
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)

#: In a folder that adapters were merged into: their digests, so that none is merged twice.
MERGED_FILE = "merged_adapters.json"


def export_adapter(checkpoint: Path, out: Path, weights: str | None = None, dtype: str = "fp32") -> Path:
    """Write the adapter of a training checkpoint as a PEFT folder.

    Args:
        checkpoint: The checkpoint.
        out: The folder to write; it must be absent or empty.
        weights: "ema" or "model"; None takes the average if there is one.
        dtype: "fp32" or "bf16".

    Returns:
        ``out``.
    """
    reader, stored = opened(checkpoint)
    adapter = read_adapter_checkpoint(checkpoint, weights)
    entries = list(AdapterMap(reader.arch, stored.lora).entries.values())
    return write_peft_folder(out, stored.lora, entries, adapter.factors, stored.base, DTYPES[dtype])


def import_adapter(adapter_path: Path, base: Path, directory: Path, weights: str | None = None) -> Path:
    """Write a PEFT folder as a checkpoint of adapters of 0 steps under ``directory``, for ``--resume_model_only True``.

    Args:
        adapter_path: The PEFT folder.
        base: The model folder or checkpoint that it belongs to.
        directory: The folder of checkpoints.
        weights: The weights of the base: "ema" or "model".

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: The adapter belongs to another base, or cannot be trained on.
    """
    adapter, opened_base = read_adapter(adapter_path), _Base.open(base, weights)
    opened_base.check(adapter)
    lora = adapter.settings(opened_base.arch)
    entries = AdapterMap(opened_base.arch, lora).entries
    specs = {name: (entry.shape, torch.float32) for name, entry in entries.items()}

    def get(name: str) -> torch.Tensor:
        return entries[name].fuse([adapter.factors[hf] for hf in entries[name].hf]).float()

    identity = identify(base, opened_base.weights)
    head = {"run": {"config": opened_base.config}, "ema_is_model": True, ADAPTER: StoredAdapter(lora, identity).to_dict()}
    return write_checkpoint(directory, 0, opened_base.arch, specs, get, head)


def merge_adapter(
    adapter_path: Path, base: Path | None, out: Path, table: PositionTable, weights: str | None = None, dtype: str = "bf16"
) -> Path:
    """Write a whole model folder with the adapter merged into its base.

    Args:
        adapter_path: A PEFT folder, or a checkpoint of adapters.
        base: The base; None takes the folder that the adapter names.
        out: The folder to write; it must be absent or empty.
        table: Computes position tables.
        weights: The weights of the adapter's checkpoint: "ema" or "model"; None takes the average if there is one.
        dtype: "bf16" or "fp32".

    Returns:
        ``out``.

    Raises:
        ValueError: The adapter belongs to another base, or is merged into it already.
    """
    adapter = read_adapter(adapter_path, weights)
    if base is None and adapter.base is None:
        raise ValueError(f"{adapter_path} does not say which weights it belongs to; give their folder with --base")
    opened_base = _Base.open(base or Path(adapter.base.folder), adapter.base.weights if adapter.base else None)  # type: ignore[union-attr]
    opened_base.check(adapter)
    adapter.check_names(WeightMap(opened_base.arch).by_hf)
    digests = [*opened_base.merged_digests(), digest_of(adapter)]
    if len(set(digests)) != len(digests):
        raise ValueError(f"{adapter_path} is merged into {opened_base.path} already; merging it twice would double its effect")
    file = opened_base.file(adapter, dtype)
    companions = opened_base.companions
    write_folder(
        out, opened_base.arch, {"ema": file}, table, tokenizer=companions.tokenizer, autoencoder=companions.autoencoder
    )  # fmt: skip
    (out / MERGED_FILE).write_text(json.dumps({"adapters": digests}, indent=1), encoding="utf-8")
    return out


def digest_of(adapter: ReleasedAdapter) -> str:
    """Return the digest of an adapter's values."""
    total = hashlib.sha256(f"{adapter.scale}".encode())
    for name in sorted(adapter.factors):
        total.update(name.encode())
        total.update(adapter.factors[name].float().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class _Base:
    """The weights that an adapter belongs to: a model folder or a checkpoint."""

    path: Path
    weights: str
    arch: BagelArch
    config: dict[str, Any]
    companions: Companions

    @classmethod
    def open(cls, path: Path, weights: str | None) -> _Base:
        """Open the base. Raises ValueError if it is none."""
        if is_complete(path):
            checkpoint = CheckpointWeights(path)
            refuse_adapters(checkpoint.state, path)
            config = checkpoint.state["run"].get("config", {})
            kind = weights or ("ema" if "ema" in checkpoint.kinds() else "model")
            return cls(path, kind, checkpoint.arch, config, companions_of(config))
        folder = HFFolder(path)
        autoencoder = path / "ae.safetensors"
        companions = Companions(path, autoencoder if autoencoder.is_file() else None)
        config = {"finetune_from_hf": True, "model_path": str(path.resolve())}
        # Where the requested weights are not, those that are there have another identity, which the error then names.
        kind = weights if weights in folder.available_weights() else folder.default_weights()[0]
        return cls(path, kind, folder.arch, config, companions)

    def check(self, adapter: ReleasedAdapter) -> None:
        """Raise ValueError if the adapter says that it belongs to other weights."""
        if adapter.base is not None:
            adapter.base.check(identify(self.path, self.weights, adapter.base.weights_name), adapter.source)
            return
        logger.info("%s does not say which weights it belongs to: whether they are those of %s is not checked", adapter.source, self.path)

    def merged_digests(self) -> list[str]:
        """Return the digests of the adapters that were merged into this folder."""
        file = self.path / MERGED_FILE
        return list(read_json(file, "--base")["adapters"]) if file.is_file() else []

    def file(self, adapter: ReleasedAdapter, dtype: str) -> WeightFile:
        """Return the weight file of the merged model."""
        entries = WeightMap(self.arch).entries
        if is_complete(self.path):
            checkpoint = CheckpointWeights(self.path, "sampled")
            return WeightFile(lambda name: merged(adapter, entries[name], checkpoint.read(checkpoint.key(name, self.weights))), dtype)
        source = MergedSource(HFFolder(self.path).weights(self.weights), adapter)
        return WeightFile(lambda name: entries[name].fuse([source.get(hf) for hf in entries[name].hf]), dtype)
