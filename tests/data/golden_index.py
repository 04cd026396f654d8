# SPDX-License-Identifier: Apache-2.0
"""The goldens' raw data as an index, with the transforms they were recorded with."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, GroupConfig, parse_groups

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


def find_row(reader: DatasetReader, file: str, row: int) -> int:
    """Number of a sample by the end of its file's name and its row there."""
    return next(i for i in range(len(reader)) if reader.source(i)[0].endswith(file) and reader.source(i)[1] == row)


def golden_row(group: str, data_indexes: list[int] | int, units: list) -> tuple[str, int]:
    """(file, row in the file) of a golden sample; every parquet file of the goldens has row groups of 2 rows (T2I) or 2 and 1."""
    if group == T2I:
        file, row_group, row = data_indexes
        return units[file], 2 * row_group + row
    if group == EDIT:
        unit, row = data_indexes
        return units[unit][0], 2 * units[unit][1] + row
    return "llava_ov_si.jsonl", json.loads(units[data_indexes][0])["id"]  # ids are line numbers there
