"""Single tensors out of a training checkpoint, without process group, model or Megatron: what exporting and inspecting need.

Whatever layout wrote the checkpoint, its tensors lie in model space under the weight map's names (state.py), so a full tensor is
put together from its shards by name. Peak memory is one tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.checkpoint.dist.unpickle_guard import read_contents
from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from megatron_bagel.config.architecture import BagelArch

# Where an fp32 weight is kept, best first: Megatron's main weights (distributed optimizer, plain bf16 optimizer), then the model's own.
_MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")


class _Reader(torch_checkpoint.FileSystemReader):
    """Reads the table of contents once and as data; torch would read it again for every tensor, and run what it names."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_contents(self.path)
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class CheckpointWeights:
    """Reads weights of one training checkpoint by our names.

    Attributes: `step`, `arch`, `state` (the JSON state). Raises ValueError for a folder that is no complete checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.state: dict[str, Any] = step_folders.read_state(self.folder)
        self.step = int(self.state["step"])
        self.arch = BagelArch.from_dict(self.state["arch"])
        self._reader = _Reader(str(self.folder))
        stored = self._reader.read_metadata().state_dict_metadata
        self._stored = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}

    def keys(self) -> list[str]:
        """Keys of all stored tensors."""
        return list(self._stored)

    def kinds(self) -> list[str]:
        """Which weights can be exported: "model", and "ema" if one was kept."""
        averaged = step_folders.is_average(self.state) or any(key.startswith("ema.") for key in self._stored)
        return ["model", *(["ema"] if averaged else [])]

    def model(self, name: str) -> torch.Tensor:
        """The trained weight `name` (a name of weight_map.py), full, in fp32 where fp32 main weights were kept."""
        return self.read(self.key(name, "model"))

    def ema(self, name: str) -> torch.Tensor:
        """The average of `name`; of a weight that was frozen, the weight itself."""
        return self.read(self.key(name, "ema"))

    def key(self, name: str, kind: str) -> str:
        """Under which key the weight `name`, or (`kind` "ema") its average, is stored. Raises ValueError when it is not."""
        prefixes = ("ema.", *_MAIN_WEIGHTS) if kind == "ema" else _MAIN_WEIGHTS
        return self._first(f"{prefix}{name}" for prefix in prefixes)

    def spec(self, key: str) -> TensorSpec:
        """Full shape and dtype of one stored tensor."""
        stored = self._stored[key]
        return tuple(stored.size), stored.properties.dtype

    def read(self, key: str) -> torch.Tensor:
        """One stored tensor, put together from its shards."""
        stored = self._stored[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        torch_checkpoint.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def _first(self, keys: Any) -> str:
        tried = list(keys)
        for key in tried:
            if key in self._stored:
                return key
        raise ValueError(f"{self.folder} holds no weight under any of {', '.join(tried)}: it is a checkpoint of another model")
