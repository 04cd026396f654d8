"""Between training checkpoints and Hugging Face folders: the work behind tools/checkpoint_convert and the export at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_bagel.checkpoint import publish
from megatron_bagel.checkpoint.checkpoint_weights import CheckpointWeights
from megatron_bagel.checkpoint.hf_folder import DTYPES, HFFolder, PositionTable, write_folder
from megatron_bagel.checkpoint.training_state import provenance
from megatron_bagel.checkpoint.weight_map import Entry, WeightMap
from megatron_bagel.checkpoint.weights import TensorSource, check_against
from megatron_bagel.platform import megatron_compat
from megatron_bagel.platform.distributed import init_distributed, shutdown_distributed

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
) -> Path:
    """Write the training checkpoint `folder` as a folder in the released layout; returns `out`.

    `weights`: any of "ema" and "model"; `companions`: by default those the run used. No process group and no model is needed; memory is a
    few tensors. Raises ValueError when the checkpoint, the weights asked for, or a companion's file is not there.
    """
    checkpoint = CheckpointWeights(folder)
    absent = [kind for kind in weights if kind not in checkpoint.kinds()]
    if absent or not weights:
        raise ValueError(f"{folder} holds {' and '.join(checkpoint.kinds())} weights; asked for: {', '.join(weights) or 'none'}")
    if companions is None:
        companions = companions_of(checkpoint.state["run"].get("config", {}))
    getters = {"ema": checkpoint.ema, "model": checkpoint.model}
    size = sum(torch.Size(shape).numel() for shape in WeightMap(checkpoint.arch).hf_shapes().values()) * DTYPES[dtype].itemsize
    logger.info("step %d: writing %s of about %.2f GB each to %s", checkpoint.step, " and ".join(weights), size / 1e9, out)
    return write_folder(
        out,
        checkpoint.arch,
        {kind: getters[kind] for kind in weights},
        table,
        tokenizer=companions.tokenizer,
        autoencoder=companions.autoencoder,
        dtype=dtype,
    )


def import_folder(folder: str | Path, directory: str | Path, weights: Sequence[str] = ("ema",), **overrides: Any) -> Path:
    """Write a folder in the released layout as a checkpoint of 0 steps under `directory`; returns the checkpoint's folder.

    Model weights come from "model" if given, else from "ema"; "ema" is kept as EMA, too. There is no optimizer state: train from the result
    with `--resume_model_only True`. `overrides` are settings of `BagelArch` that win over the folder's.
    Raises ValueError when tensors are missing, left over or of another shape.
    """
    source = HFFolder(folder, **overrides)
    weight_map = WeightMap(source.arch)
    readers = {kind: source.weights(kind) for kind in weights}
    if not readers:
        raise ValueError(f"nothing to import from {folder}: choose ema, model or both")
    for reader in readers.values():
        check_against(reader, weight_map)
    plan = {"": readers.get("model", readers.get("ema")), **({"ema.": readers["ema"]} if "ema" in readers else {})}
    with _own_process_group():
        tensors = {
            prefix + name: _whole(prefix + name, entry, reader)
            for prefix, reader in plan.items()
            for name, entry in weight_map.entries.items()
        }
        saving = publish.begin(directory, 0)
        megatron_compat.collect_save_results_in_process()
        dist_checkpointing.save(tensors, str(saving), sharded_strategy=megatron_compat.torch_dist_save_strategy())
        run = {"config": {"finetune_from_hf": True, "model_path": str(Path(folder).resolve())}}
        text = publish.state_text({**provenance(0, source.arch), "run": run})
        (saving / publish.STATE_FILE).write_text(text, encoding="utf-8")
        return publish.publish(saving)


def _whole(key: str, entry: Entry, reader: TensorSource) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, entry.fuse([reader.get(name) for name in entry.hf]).float())


@contextmanager
def _own_process_group() -> Iterator[None]:
    """Megatron-Core writes checkpoints within a process group; a converter is a world of one."""
    if dist.is_initialized():
        yield
        return
    init_distributed()
    try:
        yield
    finally:
        shutdown_distributed()
