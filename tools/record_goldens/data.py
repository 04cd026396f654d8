# SPDX-License-Identifier: Apache-2.0
"""The original's data sets and its packing over a set's raw data: settings, and what is kept of a packed batch."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.record_goldens.files import GoldenFolder, jsonable, summary
from tools.record_goldens.model import ModelSource
from tools.record_goldens.original import Original

_SMALL = {"image_stride": 16, "max_image_size": 48, "min_image_size": 32}
_SMALL_VIT = {"image_stride": 14, "max_image_size": 56, "min_image_size": 28}
#: The dataset YAML of every set.
GROUPS: dict[str, dict[str, Any]] = {
    "t2i_pretrain": {
        "dataset_names": ["t2i"], "image_transform_args": _SMALL, "is_mandatory": True, "num_used_data": [2], "weight": 1.0,
    },
    "unified_edit": {
        "dataset_names": ["seedxedit_multi"], "image_transform_args": _SMALL, "vit_image_transform_args": _SMALL_VIT,
        "is_mandatory": True, "num_used_data": [2], "weight": 1.0,
    },
    "vlm_sft": {
        "dataset_names": ["llava_ov"],
        "image_transform_args": {"image_stride": 14, "max_image_size": 70, "min_image_size": 28, "max_pixels": 2352},
        "frame_sampler_args": {"max_num_frames": 4, "min_num_frames": 2},
        "is_mandatory": True, "shuffle_lines": True, "shuffle_seed": 0, "num_used_data": [6], "weight": 1.0,
    },
}  # fmt: skip
#: The limits of a pack.
LIMITS = {
    "expected_num_tokens": 300, "max_num_tokens_per_sample": 200, "max_num_tokens": 400, "prefer_buffer_before": 200, "max_buffer_size": 3,
}  # fmt: skip
#: Tensors that a set stores in half precision. The goldens are computed from the stored values.
HALVED = ("padded_images", "packed_vit_tokens")
DATA_SEED = 42
Batch = dict[str, Any]


class DataSource:
    """Makes data sets of the original over the raw data of a set."""

    def __init__(self, original: Original, models: ModelSource, folder: GoldenFolder) -> None:
        self.original, self.models, self.folder = original, models, folder
        self.raw = folder.root / "raw_data"
        self.text_tokenizer, self.special, _ = models.tokenizer()

    def dataset(
        self,
        use_flex: bool = True,
        dropout: float = 0.0,
        seed: int = 7,
        rank: int = 0,
        world: int = 1,
        groups: dict[str, Any] | None = None,
        limits: dict[str, int] | None = None,
        status: dict[str, Any] | None = None,
    ) -> Any:
        """Return the original's packed data set of one loader worker. Python's and numpy's generators are set to ``seed``."""
        self._name_sources()
        settings, downsample = self.models.settings, self.models.settings.ae["downsample"]
        config = self.original.datasets.DataConfig(
            grouped_datasets=copy.deepcopy(groups or GROUPS), text_cond_dropout_prob=dropout, vit_cond_dropout_prob=dropout,
            vae_cond_dropout_prob=dropout, vae_image_downsample=downsample * settings.top["latent_patch_size"],
            max_latent_size=settings.top["max_latent_size"], vit_patch_size=settings.vit["patch_size"],
            max_num_patch_per_side=settings.top["vit_max_num_patch_per_side"],
        )  # fmt: skip
        packed = self.original.datasets.PackedDataset(
            config, tokenizer=self.text_tokenizer, special_tokens=self.special, local_rank=rank, world_size=world, num_workers=1,
            interpolate_pos=False, use_flex=use_flex, data_status=status, **(limits or LIMITS),
        )  # fmt: skip
        packed.set_epoch(DATA_SEED)
        random.seed(seed)
        np.random.seed(seed)
        return packed

    def _name_sources(self) -> None:
        """Tell the original where the raw data lie. Its keys of parquet files are whole paths."""
        names = json.loads((self.raw / "editing/parquet_info/seedxedit_multi.json").read_text(encoding="utf-8"))
        absolute = self.folder.root / ".parquet_info.json"
        absolute.write_text(json.dumps({str(self.raw / name): value for name, value in names.items()}), encoding="utf-8")
        sources = self.original.dataset_info.DATASET_INFO
        sources.clear()
        edit = {"data_dir": f"{self.raw}/editing/seedxedit_multi", "parquet_info_path": str(absolute)}
        sources["t2i_pretrain"] = {"t2i": {"data_dir": f"{self.raw}/t2i"}}
        sources["unified_edit"] = {"seedxedit_multi": edit}
        sources["vlm_sft"] = {"llava_ov": {"data_dir": f"{self.raw}/vlm/images", "jsonl_path": f"{self.raw}/vlm/llava_ov_si.jsonl"}}

    def relative(self, content: Any) -> Any:
        """Return JSON content with paths of raw data relative to their folder."""
        return json.loads(json.dumps(jsonable(content)).replace(f"{self.raw}/", ""))

    def close(self) -> None:
        """Remove what the original was told in a file."""
        (self.folder.root / ".parquet_info.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def packing_draws(self) -> Iterator[list[float]]:
        """Keep what the packing, and nothing else, draws by ``random.random`` within the block."""
        drawn: list[float] = []
        module = self.original.datasets

        class _Random:
            def __getattr__(self, name: str) -> Any:
                return getattr(random, name)

            @staticmethod
            def random() -> float:
                drawn.append(random.random())
                return drawn[-1]

        module.random = _Random()
        try:
            yield drawn
        finally:
            module.random = random


def packed_json(batch: Batch) -> dict[str, Any]:
    """Return every integer of a packed batch in full, and the summary of everything larger."""
    content: dict[str, Any] = {}
    for name, value in batch.items():
        if name == "nested_attention_masks":
            content[name] = [
                {"shape": list(mask.shape), "allowed": int((mask == 0).sum()), "rows_allowed": (mask == 0).sum(1).tolist()}
                for mask in value
            ]
        elif isinstance(value, Tensor) and value.ndim == 1:
            content[name] = ["-inf" if entry == float("-inf") else entry for entry in value.tolist()]
        else:
            content[name] = summary(value) if isinstance(value, Tensor) else value
    return content


def write_batch(folder: GoldenFolder, name: str, batch: Batch) -> None:
    """Write a batch in full."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    folder.tensors(f"batches/{name}.safetensors", {key: value.half() if key in HALVED else value for key, value in tensors.items()})
    folder.json(f"batches/{name}.json", {key: value for key, value in batch.items() if key not in tensors})


def read_batch(folder: GoldenFolder, name: str) -> Batch:
    """Return a written batch as the model takes it."""
    batch: Batch = folder.read_json(f"batches/{name}.json")
    tensors = folder.read_tensors(f"batches/{name}.safetensors")
    batch.update({key: value.to(torch.float32) if key in HALVED else value for key, value in tensors.items()})
    if "padded_images" in batch:
        batch["patchified_vae_latent_shapes"] = [tuple(shape) for shape in batch["patchified_vae_latent_shapes"]]
    return batch
