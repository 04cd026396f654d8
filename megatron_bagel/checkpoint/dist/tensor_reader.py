# SPDX-License-Identifier: Apache-2.0
"""Single tensors of a training checkpoint, without process group, model or Megatron, for exporting and inspecting.

For any parallel sizes, a checkpoint's tensors are in model space under the weight map's names (state.py), so a full tensor is assembled
from its shards by name. Peak memory is one tensor.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.checkpoint.dist.stored_record import read_stored
from megatron_bagel.checkpoint.dist.unpickle_guard import read_contents
from megatron_bagel.checkpoint.dist.write_errors import write_reasons
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck, refuse_not_finite
from megatron_bagel.checkpoint.hf.reused_memory import ReusedMemory
from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from megatron_bagel.common.page_cache import large_together
from megatron_bagel.config.architecture import BagelArch

# Keys of an fp32 weight, best first: Megatron's main weights (distributed optimizer, plain bf16 optimizer), then the model's weights.
_MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")


class _Reader(torch_checkpoint.FileSystemReader):
    """Reads the table of contents once, as data. torch would read it again for every tensor, and run the code it names."""

    _metadata: Metadata | None = None
    forgets = False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_contents(Path(self.path))
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_into(self, key: str, stored: TensorStorageMetadata, full: torch.Tensor, memory: ReusedMemory) -> bool:
        """Read every piece of a tensor straight into its place in ``full``; ``torch_checkpoint.load`` holds each twice.

        Returns:
            Whether it was read. Where it was not, torch can say what is wrong, or read it otherwise.
        """
        places = self.read_metadata().storage_data or {}
        if sum(chunk.sizes.numel() for chunk in stored.chunks) != full.numel():
            return False
        for chunk in stored.chunks:
            place = places.get(MetadataIndex(key, chunk.offsets))
            if place is None or getattr(place, "transform_descriptors", None):
                return False
            part = full
            for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(dim, start, size)
            read = part if part.is_contiguous() else memory.tensor(tuple(part.shape), part.dtype)
            if not read_stored(Path(self.path) / place.relative_path, place.offset, place.length, read, self.forgets):
                return False
            if read is not part:
                part.copy_(read)
                memory.give_back(read)
        return True


class CheckpointWeights:
    """Reads weights of one training checkpoint by the weight map's names.

    ``step``, ``arch`` and ``state`` (the JSON state) describe the checkpoint. Raises ValueError for a folder that is no complete one.
    """

    def __init__(self, folder: str | Path, check_weights: WeightCheck = "none", read_once: bool = False) -> None:
        """Read the state.

        Args:
            folder: The checkpoint.
            check_weights: How many values of each tensor that is read are checked to be finite.
            read_once: Whether every tensor is read once, so that the system need not keep large files in memory.
        """
        self.folder, self.check_weights = Path(folder), check_weights
        self.state: dict[str, Any] = step_folders.read_state(self.folder)
        self.step = int(self.state["step"])
        self.arch = BagelArch.from_dict(self.state["arch"])
        self._reader = _Reader(str(self.folder))
        self._reader.forgets = read_once and large_together(self.folder.glob("*.distcp"))
        stored = self._reader.read_metadata().state_dict_metadata
        self._stored = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}

    def keys(self) -> list[str]:
        """Return the keys of all stored tensors."""
        return list(self._stored)

    def kinds(self) -> list[str]:
        """Return which weights can be exported: "model", and "ema" if the run stored an average."""
        averaged = step_folders.is_average(self.state) or any(key.startswith("ema.") for key in self._stored)
        return ["model", *(["ema"] if averaged else [])]

    def model(self, name: str) -> torch.Tensor:
        """Return the full trained weight ``name`` (a name of weight_map.py), in fp32 if the run stored fp32 main weights."""
        return self.read(self.key(name, "model"))

    def ema(self, name: str) -> torch.Tensor:
        """Return the average of ``name``; for a frozen weight it is the weight itself."""
        return self.read(self.key(name, "ema"))

    def key(self, name: str, kind: str) -> str:
        """Return the key of the weight ``name``, or of its average if ``kind`` is "ema". Raises ValueError if neither is stored."""
        prefixes = ("ema.", *_MAIN_WEIGHTS) if kind == "ema" else _MAIN_WEIGHTS
        return self._stored_key(f"{prefix}{name}" for prefix in prefixes)

    def spec(self, key: str) -> TensorSpec:
        """Return the full shape and the dtype of one stored tensor."""
        stored = self._stored[key]
        return tuple(stored.size), stored.properties.dtype

    def read(self, key: str, memory: ReusedMemory | None = None) -> torch.Tensor:
        """Return one stored tensor, assembled from its shards, in ``memory`` if given.

        Raises ValueError if it cannot be read, or is checked and not finite.
        """
        stored, memory = self._stored[key], memory or ReusedMemory()
        tensor = memory.tensor(tuple(stored.size), stored.properties.dtype)
        try:
            if not self._reader.read_into(key, stored, tensor, memory):
                torch_checkpoint.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, torch_checkpoint.CheckpointException) as error:
            raise ValueError(
                f"{self.folder}: tensor {key} cannot be read ({write_reasons(error)}); copy the checkpoint again, or use another step"
            ) from error
        refuse_not_finite(tensor, key, self.folder, self.check_weights)
        return tensor

    def _stored_key(self, keys: Any) -> str:
        candidates = list(keys)
        for key in candidates:
            if key in self._stored:
                return key
        raise ValueError(f"{self.folder} holds no weight under any of {', '.join(candidates)}: it is a checkpoint of another model")
