# SPDX-License-Identifier: Apache-2.0
"""Reads an adapter from a PEFT folder or from a training checkpoint of adapters, under the released names."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_bagel.checkpoint.dist.step_folders import is_complete, latest_checkpoint
from megatron_bagel.checkpoint.dist.stored_adapter import StoredAdapter, adapter_in
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.peft_folder import ReleasedAdapter, is_peft_folder, read_peft_folder
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap


def read_adapter(path: Path, weights: str | None = None) -> ReleasedAdapter:
    """Read the adapter at ``path``: a PEFT folder, a checkpoint of adapters, or the newest checkpoint in a folder.

    Args:
        path: The folder.
        weights: "ema" or "model" of a checkpoint. None takes the average if there is one.

    Raises:
        ValueError: There is no adapter, or it is damaged.
    """
    if is_peft_folder(path):
        return read_peft_folder(path)
    folder = path if is_complete(path) else latest_checkpoint(path) if path.is_dir() else None
    if folder is None:
        raise ValueError(f"--adapter {path} is neither a PEFT folder (adapter_config.json) nor a checkpoint of adapters")
    return read_adapter_checkpoint(folder, weights)


def read_adapter_checkpoint(folder: Path, weights: str | None = None) -> ReleasedAdapter:
    """Read the adapter of a training checkpoint. Raises ValueError for the checkpoint of a whole model."""
    checkpoint, stored = opened(folder)
    kind = weights or ("ema" if "ema" in checkpoint.kinds() else "model")
    if kind not in checkpoint.kinds():
        raise ValueError(f"--weights {kind}: {folder} has only {' and '.join(checkpoint.kinds())} weights")
    lora = stored.lora
    factors = _parts(checkpoint, kind, AdapterMap(checkpoint.arch, lora).entries)
    in_full = {name: entry for name, entry in WeightMap(checkpoint.arch).entries.items() if lora.trains_in_full(name)}
    full = _parts(checkpoint, kind, in_full)
    return ReleasedAdapter(folder, lora.rank, lora.alpha, lora.rslora, factors, stored.base, lora.dropout, full)


def opened(folder: Path) -> tuple[CheckpointWeights, StoredAdapter]:
    """Open a checkpoint of adapters. Raises ValueError for the checkpoint of a whole model."""
    checkpoint = CheckpointWeights(folder, "full")
    stored = adapter_in(checkpoint.state)
    if stored is None:
        raise ValueError(f"{folder} is the checkpoint of a whole model and holds no adapter")
    return checkpoint, stored


def _parts(checkpoint: CheckpointWeights, kind: str, entries: dict[str, Entry]) -> dict[str, torch.Tensor]:
    """Return weights by released names, without the rows that pad a vocabulary."""
    parts: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        tensor = checkpoint.read(checkpoint.key(name, kind))
        parts |= dict(zip(entry.hf, entry.unfuse(tensor[: entry.shape[0]] if entry.vocabulary else tensor), strict=True))
    return parts


def merged(adapter: ReleasedAdapter, entry: Entry, full: torch.Tensor) -> torch.Tensor:
    """Return one of our weights with the adapter merged into it, fp32, or as it is if the adapter does not change it."""
    if not adapter.changes.intersection(entry.hf):
        return full
    return entry.fuse([adapter.changed(name, part) for name, part in zip(entry.hf, entry.unfuse(full[: entry.shape[0]]), strict=True)])
