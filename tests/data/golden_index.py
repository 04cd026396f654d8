"""The goldens' raw data as an index, with the transforms they were recorded with."""

from __future__ import annotations

from pathlib import Path

from megatron_bagel.data.groups import GroupConfig, parse_groups
from megatron_bagel.data.index_build import BuildOptions, build_index
from megatron_bagel.data.index_reader import IndexedSamples

_VAE = {"image_stride": 16, "max_image_size": 48, "min_image_size": 32}
CONFIG = {
    "t2i_pretrain": {"dataset_names": ["t2i"], "image_transform_args": _VAE, "weight": 1, "is_mandatory": True},
    "unified_edit": {
        "dataset_names": ["seedxedit_multi"],
        "image_transform_args": _VAE,
        "vit_image_transform_args": {"image_stride": 14, "max_image_size": 56, "min_image_size": 28},
        "weight": 1,
    },
    "vlm_sft": {
        "dataset_names": ["llava_ov"],
        "image_transform_args": {"image_stride": 14, "max_image_size": 70, "min_image_size": 28, "max_pixels": 2352},
        "weight": 1,
    },
}


def golden_groups(goldens: Path) -> list[GroupConfig]:
    """The three groups of the goldens."""
    return parse_groups(CONFIG, "goldens", goldens / "raw_data", goldens / "raw_data")


def build_golden_index(goldens: Path, output: Path) -> IndexedSamples:
    """Index of the goldens' raw data at ``output``."""
    build_index(golden_groups(goldens), goldens / "hf", output, BuildOptions(progress=False))
    return IndexedSamples.open(output)
