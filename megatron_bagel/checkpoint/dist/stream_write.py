# SPDX-License-Identifier: Apache-2.0
"""Writes a training checkpoint tensor by tensor in one process, without process group or model, as importing weights needs it.

The files hold what a torch_dist save of one rank writes, without CRC-32 sums. torch's writer makes them, but receives each tensor only
when it writes it.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from megatron_bagel.checkpoint.dist.state import provenance
from megatron_bagel.checkpoint.dist.write_errors import is_space_short, source_error, write_reasons
from megatron_bagel.checkpoint.hf.read_ahead import read_ahead
from megatron_bagel.checkpoint.hf.reused_memory import ReusedMemory
from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from megatron_bagel.common.direct_file import open_to_write
from megatron_bagel.common.writable import nearest_folder
from megatron_bagel.config.architecture import BagelArch

_MIN_THREADED_BYTES = 1 << 18  # bytes


class _OnDemandPlanner(torch_checkpoint.DefaultSavePlanner):
    """Plans with tensors without data, and requests the data of a tensor when the writer reaches it."""

    def __init__(self, get: Callable[[str], torch.Tensor], specs: Mapping[str, TensorSpec], memory: ReusedMemory) -> None:
        super().__init__(flatten_state_dict=False)
        self._get, self._specs, self._memory = get, specs, memory
        self._last_tensors: list[torch.Tensor] = []
        self._progress = tqdm(total=len(specs), unit="tensor", desc="writing", mininterval=1.0, disable=None)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the full tensor of ``index``. Raises ValueError if its shape is not the planned one."""
        if len(self._last_tensors) == 2:  # the last one's checksum may still be computed
            self._release(self._last_tensors.pop(0))
        shape, dtype = self._specs[index.fqn]
        read = self._get(index.fqn)
        tensor = read.to(dtype).contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"tensor {index.fqn} has shape {tuple(tensor.shape)}; the plan says {tuple(shape)}")
        if tensor.untyped_storage().size() != tensor.nbytes:
            tensor = tensor.clone()
        if tensor is not read:
            self._memory.give_back(read)
        self._progress.update()
        self._last_tensors.append(tensor)
        return tensor

    def _release(self, tensor: torch.Tensor) -> None:
        """Give a tensor's memory to the next ones. Some releases of torch's writer keep every tensor until the file is closed."""
        if not self._memory.give_back(tensor):
            tensor.untyped_storage().resize_(0)


class _SummedFile:
    """A file whose checksum is computed in the one thread of ``pool``, at most one large write behind the file.

    The memory of a large write must stay as it is until the next large one has begun.
    """

    def __init__(self, file: IO[bytes], pool: ThreadPoolExecutor) -> None:
        self._file, self._pool = file, pool
        self._sum, self._bytes = hashlib.sha256(), 0
        self._last_large: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        if len(data) < _MIN_THREADED_BYTES:
            self._pool.submit(self._sum.update, bytes(data))
        else:
            if self._last_large is not None:
                self._last_large.result()
            self._last_large = self._pool.submit(self._sum.update, data)
        num_bytes = self._file.write(data)
        self._bytes += num_bytes
        return num_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def entry(self) -> dict[str, Any]:
        """Return the file's entry in ``checksums.json``, once the checksum has caught up."""
        self._pool.submit(lambda: None).result()
        return {"bytes": self._bytes, "sha256": self._sum.hexdigest()}


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Store tensors without the CRC-32 of each, which nothing compares: torch does not, and the files have SHA-256 sums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _SummedFiles(FileSystem):
    """torch's file system, which also keeps the checksum of every written file in ``sums`` by name; ``size`` is that of all together."""

    def __init__(self, pool: ThreadPoolExecutor, size: int) -> None:
        self._pool, self._size = pool, size
        self.sums: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as file:
                yield file
            return
        with open_to_write(path, self._size) as written:
            summed_file = _SummedFile(written, self._pool)
            yield summed_file
        self.sums[Path(path).name] = summed_file.entry()


def write_checkpoint(
    directory: str | Path,
    step: int,
    arch: BagelArch,
    specs: Mapping[str, TensorSpec],
    get: Callable[[str], torch.Tensor],
    head: Mapping[str, Any],
    memory: ReusedMemory | None = None,
) -> Path:
    """Write a checkpoint under ``directory``.

    The memory of each tensor is freed or reused once it is written, so that the peak is a few tensors.

    Args:
        directory: The folder of checkpoints.
        step: The number of optimizer steps.
        arch: The model.
        specs: Shape and dtype of every tensor by key.
        get: Returns the tensor of a key and gives it away.
        head: Entries of the JSON state, at least "run".
        memory: Where ``get`` takes the memory of tensors from, if it does.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: If the folder cannot be written, or a tensor cannot be read; it then is no checkpoint.
    """
    text = step_folders.state_text({**provenance(step, arch, world_size=1), **head})
    try:
        temporary_folder = step_folders.begin(directory, step)
        _write_tensors(temporary_folder, specs, get, memory or ReusedMemory())
        # Megatron-Core's additions: the name of its format, and the part that is not sharded (empty here).
        save_config(CheckpointingConfig("torch_dist", 1), str(temporary_folder))
        # Not straight into the file: on a full disk torch would end with an internal error instead of an OSError.
        common = io.BytesIO()
        torch.save({}, common)
        (temporary_folder / "common.pt").write_bytes(common.getvalue())
        (temporary_folder / step_folders.STATE_FILE).write_text(text, encoding="utf-8")
        return step_folders.publish(temporary_folder)
    except (OSError, torch_checkpoint.CheckpointException) as error:
        raise source_error(error) or _write_error(Path(directory), error) from error


def _write_error(directory: Path, error: BaseException) -> ValueError:
    is_full = is_space_short(shutil.disk_usage(nearest_folder(directory)).free, None, directory, error)
    remedy = "make room" if is_full else "find out what changed the folder"
    return ValueError(f"cannot write a checkpoint into {directory} ({write_reasons(error)}); {remedy}, or choose another folder")


def _write_tensors(folder: Path, specs: Mapping[str, TensorSpec], get: Callable[[str], torch.Tensor], memory: ReusedMemory) -> None:
    """Write the tensors and their checksums."""
    planned = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in specs.items()}
    writer = torch_checkpoint.FileSystemWriter(str(folder), single_file_per_rank=True, sync_files=True, thread_count=1)
    with ThreadPoolExecutor(max_workers=1) as pool, read_ahead(get, list(specs)) as get_ahead, _without_crc32():
        writer.fs = _SummedFiles(pool, sum(tensor.nbytes for tensor in planned.values()))
        torch_checkpoint.save(planned, storage_writer=writer, planner=_OnDemandPlanner(get_ahead, specs, memory), no_dist=True)
    checksums.write_part(folder, 0, {name: entry for name, entry in writer.fs.sums.items() if name.endswith(".distcp")})
