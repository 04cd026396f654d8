"""A training checkpoint written tensor by tensor in one process, without process group or model: what importing weights needs.

The files are those of a torch_dist save of one rank: torch's own writer makes them, but gets each tensor only when it writes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from tqdm import tqdm

from megatron_bagel.checkpoint.dist import checksums, step_folders
from megatron_bagel.checkpoint.hf.read_ahead import read_ahead
from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from megatron_bagel.checkpoint.dist.state import provenance
from megatron_bagel.config.architecture import BagelArch

_WORTH_A_THREAD = 1 << 18  # bytes


class _OnDemand(torch_checkpoint.DefaultSavePlanner):
    """Plans with tensors that have no data and asks for the data of one when the writer comes to it."""

    def __init__(self, get: Callable[[str], torch.Tensor], specs: Mapping[str, TensorSpec]) -> None:
        super().__init__(flatten_state_dict=False)
        self._get, self._specs = get, specs
        self._written: torch.Tensor | None = None
        self._progress = tqdm(total=len(specs), unit="tensor", desc="writing", mininterval=1.0, disable=None)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The full tensor named by `index`. Raises ValueError when it is not what was planned."""
        if self._written is not None:
            # Some releases of torch's writer keep every tensor until the file is closed; its memory must not stay with it.
            self._written.untyped_storage().resize_(0)
        shape, dtype = self._specs[index.fqn]
        tensor = self._get(index.fqn).to(dtype).contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"tensor {index.fqn} has shape {tuple(tensor.shape)}; announced was {tuple(shape)}")
        if tensor.untyped_storage().size() != tensor.nbytes:
            tensor = tensor.clone()
        self._progress.update()
        self._written = tensor
        return tensor


class _SummedFile:
    """A file being written whose checksum is taken on the way, at the same time: both leave Python's lock to the other."""

    def __init__(self, file: IO[bytes], pool: ThreadPoolExecutor) -> None:
        self._file, self._pool = file, pool
        self._sum, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        if len(data) < _WORTH_A_THREAD:
            self._sum.update(data)
            written = self._file.write(data)
        else:
            summed = self._pool.submit(self._sum.update, data)
            written = self._file.write(data)
            summed.result()
        self._bytes += written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def entry(self) -> dict[str, Any]:
        """As `checksums.digest` of the file."""
        return {"bytes": self._bytes, "sha256": self._sum.hexdigest()}


class _SummedFiles(FileSystem):
    """torch's file system, keeping the checksum of every file it writes in `sums` by name."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.sums: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            if mode != "wb":
                yield file
                return
            summed = _SummedFile(file, self._pool)
            yield summed
            self.sums[Path(path).name] = summed.entry()


def write_checkpoint(
    directory: str | Path,
    step: int,
    arch: BagelArch,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], torch.Tensor],
    head: Mapping[str, Any],
) -> Path:
    """Write `get(key)` of every key in `specs` as the checkpoint of `step` under `directory`; returns its folder.

    The tensors are given away: their memory is freed once they are written, so that the peak is a few tensors. `head` is added to the
    JSON state and holds at least "run". Raises ValueError when the folder cannot be written; it is then no checkpoint.
    """
    text = step_folders.state_text({**provenance(step, arch, world_size=1), **head})
    try:
        saving = step_folders.begin(directory, step)
        planned = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in specs.items()}
        writer = torch_checkpoint.FileSystemWriter(str(saving), single_file_per_rank=True, sync_files=True, thread_count=1)
        with ThreadPoolExecutor(max_workers=1) as pool, read_ahead(get, list(specs)) as ahead:
            writer.fs = _SummedFiles(pool)
            torch_checkpoint.save(planned, storage_writer=writer, planner=_OnDemand(ahead, specs), no_dist=True)
        tensors = {name: entry for name, entry in writer.fs.sums.items() if name.endswith(".distcp")}
        checksums.write_part(saving, 0, tensors)
        # What Megatron-Core adds: its format's name, and the part that is not sharded (here nothing).
        save_config(CheckpointingConfig("torch_dist", 1), str(saving))
        torch.save({}, saving / "common.pt")
        (saving / step_folders.STATE_FILE).write_text(text, encoding="utf-8")
        return step_folders.publish(saving)
    except (OSError, torch_checkpoint.CheckpointException) as error:
        raise ValueError(f"cannot write a checkpoint into {directory}: {error}") from error
