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
from megatron_bagel.checkpoint.dist.unpickle_guard import read_contents
from megatron_bagel.checkpoint.dist.write_errors import write_reasons
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck, refuse_not_finite
from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from megatron_bagel.config.architecture import BagelArch

# Keys of an fp32 weight, best first: Megatron's main weights (distributed optimizer, plain bf16 optimizer), then the model's weights.
_MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")


class _Reader(torch_checkpoint.FileSystemReader):
    """Reads the table of contents once, as data. torch would read it again for every tensor, and run the code it names."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_contents(Path(self.path))
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def whole(self, key: str, stored: TensorStorageMetadata) -> torch.Tensor | None:
        """Return a tensor that was stored in one piece, or None.

        ``torch_checkpoint.load`` holds such a tensor twice: as read, and in place.
        """
        places = self.read_metadata().storage_data or {}
        if len(stored.chunks) != 1 or stored.chunks[0].sizes != stored.size:
            return None
        place = places.get(MetadataIndex(key, stored.chunks[0].offsets))
        if place is None or place.transform_descriptors:
            return None
        with self.fs.create_stream(self.fs.concat_path(self.path, place.relative_path), "rb") as stream:
            tensor = torch.load(self._slice_file(stream, place), map_location="cpu", weights_only=True).detach()
        return tensor if tensor.shape == stored.size and tensor.dtype == stored.properties.dtype else None


class CheckpointWeights:
    """Reads weights of one training checkpoint by the weight map's names.

    ``step``, ``arch`` and ``state`` (the JSON state) describe the checkpoint. Raises ValueError for a folder that is no complete one.
    """

    def __init__(self, folder: str | Path, check_weights: WeightCheck = "none") -> None:
        """Read the state; ``check_weights`` says how many values of each tensor that is read are checked to be finite."""
        self.folder, self.check_weights = Path(folder), check_weights
        self.state: dict[str, Any] = step_folders.read_state(self.folder)
        self.step = int(self.state["step"])
        self.arch = BagelArch.from_dict(self.state["arch"])
        self._reader = _Reader(str(self.folder))
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

    def read(self, key: str) -> torch.Tensor:
        """Return one stored tensor, assembled from its shards. Raises ValueError if it cannot be read, or is checked and not finite."""
        stored = self._stored[key]
        try:
            tensor = self._reader.whole(key, stored)
            if tensor is None:
                tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
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
