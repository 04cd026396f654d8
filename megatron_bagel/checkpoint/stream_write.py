"""A training checkpoint written tensor by tensor in one process, without process group or model: what importing weights needs.

The files are those of a torch_dist save of one rank: torch's own writer makes them, but gets each tensor only when it writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.metadata import MetadataIndex
from tqdm import tqdm

from megatron_bagel.checkpoint import publish
from megatron_bagel.checkpoint.safetensors_io import TensorSpec
from megatron_bagel.checkpoint.training_state import provenance
from megatron_bagel.config.architecture import BagelArch


class _OnDemand(torch_checkpoint.DefaultSavePlanner):
    """Plans with tensors that have no data and asks for the data of one when the writer comes to it."""

    def __init__(self, get: Callable[[str], torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(flatten_state_dict=False)
        self._get, self._specs = get, specs
        self._progress = tqdm(total=len(specs), unit="tensor", desc="writing", mininterval=1.0, disable=None)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The full tensor named by `index`. Raises ValueError when it is not what was planned."""
        shape, dtype = self._specs[index.fqn]
        tensor = self._get(index.fqn).to(dtype).contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"tensor {index.fqn} has shape {tuple(tensor.shape)}; announced was {tuple(shape)}")
        self._progress.update()
        return tensor


def write_checkpoint(
    directory: str | Path,
    step: int,
    arch: BagelArch,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], torch.Tensor],
    head: Mapping[str, Any],
) -> Path:
    """Write `get(key)` of every key in `specs` as the checkpoint of `step` under `directory`; returns its folder.

    `head` is added to the JSON state and holds at least "run". Peak memory is about two tensors. Raises ValueError when the folder
    cannot be written; nothing is left of it then.
    """
    text = publish.state_text({**provenance(step, arch, world_size=1), **head})
    try:
        saving = publish.begin(directory, step)
        planned = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in specs.items()}
        writer = torch_checkpoint.FileSystemWriter(str(saving), single_file_per_rank=True, sync_files=True, thread_count=1)
        torch_checkpoint.save(planned, storage_writer=writer, planner=_OnDemand(get, specs), no_dist=True)
        # What Megatron-Core adds: its format's name, and the part that is not sharded (here nothing).
        save_config(CheckpointingConfig("torch_dist", 1), str(saving))
        torch.save({}, saving / "common.pt")
        (saving / publish.STATE_FILE).write_text(text, encoding="utf-8")
        return publish.publish(saving)
    except (OSError, torch_checkpoint.CheckpointException) as error:
        raise ValueError(f"cannot write a checkpoint into {directory}: {error}") from error
