# SPDX-License-Identifier: Apache-2.0
"""Records what the original's data sets yield and how it packs: samples, shares of ranks, packs, long runs, a resume."""

from __future__ import annotations

import copy
import random
from itertools import islice
from typing import Any

import numpy as np
import torch

from tools.record_goldens.data import DATA_SEED, GROUPS, LIMITS, Batch, DataSource, packed_json, write_batch
from tools.record_goldens.files import GoldenFolder, jsonable
from tools.record_goldens.interleaved import interleaved_batch

#: Limits under which the packer skips, buffers and flushes differently.
_RUNS = {
    "tight": {
        "expected_num_tokens": 150, "max_num_tokens_per_sample": 80, "max_num_tokens": 160, "prefer_buffer_before": 100,
        "max_buffer_size": 2,
    },
    "nobuf": {
        "expected_num_tokens": 150, "max_num_tokens_per_sample": 100, "max_num_tokens": 170, "prefer_buffer_before": 0,
        "max_buffer_size": 0,
    },
    "never_expected": {
        "expected_num_tokens": 10000, "max_num_tokens_per_sample": 200, "max_num_tokens": 400, "prefer_buffer_before": 100,
        "max_buffer_size": 3,
    },
}  # fmt: skip
_LIMITS_OF_ONE_KIND = {**LIMITS, "expected_num_tokens": 60, "max_num_tokens": 128}


def record_data(data: DataSource, folder: GoldenFolder) -> None:
    """Write ``data/`` and ``batches/``."""
    folder.json("data/dataset_yields.json", data.relative(_yields(data)))
    folder.json("data/sharding.json", data.relative({
        "data_seed": DATA_SEED, "note": "files per rank = len // world; the rest is dropped", "units": _shares(data),
    }))  # fmt: skip
    packs = iter(data.dataset())
    first, second = next(packs), next(packs)
    nested = next(iter(data.dataset(use_flex=False)))
    whole = {"flex_0": first, "flex_1": second, "nested_0": nested, "dropall": next(iter(data.dataset(dropout=1.0)))}
    interleaved = interleaved_batch(data)
    for name, batch in {**whole, "interleave": interleaved}.items():
        folder.json(f"data/packed_{name}.json", packed_json(batch))
    with data.packing_draws() as drawn:
        half = next(iter(data.dataset(dropout=0.5, seed=3)))
    folder.json("data/packed_drop_half_seeded.json", {**packed_json(half), "_random_random_draws_in_order": drawn})
    for name, batch in {"flex_0": first, "flex_1": second, "interleave": interleaved}.items():
        write_batch(folder, name, batch)
    for name, group in (("t2i_only", "t2i_pretrain"), ("vlm_only", "vlm_sft")):
        write_batch(folder, name, next(iter(data.dataset(groups={group: GROUPS[group]}, limits=_LIMITS_OF_ONE_KIND))))
    masks = {f"mask_{number}": (mask == 0).to(torch.uint8) for number, mask in enumerate(nested["nested_attention_masks"])}
    folder.tensors("batches/nested_0_masks.safetensors", masks)
    folder.json("data/packing_runs.json", jsonable({name: _long_run(data, limits) for name, limits in _RUNS.items()}))
    folder.json("data/resume.json", _resume(data, first, second))


def _units(group: Any) -> list[Any]:
    """Return the files, row groups or lines of a rank, in their shuffled order."""
    return [list(unit) if isinstance(unit, tuple) else unit for unit in group.data_paths_per_rank]


def _yields(data: DataSource) -> dict[str, Any]:
    """Return the first samples of each group, drawn from a generator of its own."""
    content = {}
    for group in data.dataset().grouped_datasets:
        random.seed(11)
        np.random.seed(11)
        content[group.dataset_name] = {"samples": jsonable(list(islice(iter(group), 9))), "shuffled_units": _units(group)}
    return content


def _shares(data: DataSource) -> dict[str, Any]:
    """Return what each rank of one, two and three gets."""
    return {
        f"rank{rank}_of{world}": {group.dataset_name: _units(group) for group in data.dataset(rank=rank, world=world).grouped_datasets}
        for world in (1, 2, 3)
        for rank in range(world)
    }


def _samples(batch: Batch) -> list[list[Any]]:
    return [[sample["dataset_name"], sample["data_indexes"]] for sample in batch["batch_data_indexes"]]


def _long_run(data: DataSource, limits: dict[str, int]) -> dict[str, Any]:
    """Return twelve packs in a row, with two groups drawn by weight."""
    groups = copy.deepcopy(GROUPS)
    groups["unified_edit"]["is_mandatory"], groups["t2i_pretrain"]["weight"] = False, 2.0
    with data.packing_draws() as drawn:
        batches = list(islice(iter(data.dataset(groups=groups, limits=limits, seed=5)), 12))
    return {
        "pack_args": limits,
        "weights": {name: group["weight"] for name, group in groups.items()},
        "mandatory": {name: group["is_mandatory"] for name, group in groups.items()},
        "batches": [
            {"sequence_length": batch["sequence_length"], "sample_lens": batch["sample_lens"], "samples": _samples(batch)}
            for batch in batches
        ],
        "draws": drawn,
    }


def _resume(data: DataSource, first: Batch, second: Batch) -> dict[str, Any]:
    """Return the pack that follows the first one after a resume, and the one that follows it without."""
    status: dict[str, Any] = {}
    for sample in first["batch_data_indexes"]:
        status.setdefault(sample["dataset_name"], {})[sample["worker_id"]] = sample["data_indexes"]
    resumed = next(iter(data.dataset(status=status)))
    return {
        "data_status": status, "first_batch_after_resume": _samples(resumed), "uninterrupted_second_batch": _samples(second),
    }  # fmt: skip
