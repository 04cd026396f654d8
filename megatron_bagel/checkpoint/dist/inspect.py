# SPDX-License-Identifier: Apache-2.0
"""Describes a training checkpoint for people: a page, a comparison tensor by tensor, a check of its files."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_bagel.checkpoint.dist import unpickle_guard
from megatron_bagel.checkpoint.dist.checksums import file_problems, read_checksums
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.common.files import digest

_PARALLEL_SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size",
    "sequence_parallel", "use_distributed_optimizer",
)  # fmt: skip


def summary(folder: Path, tensors: bool = False) -> dict[str, Any]:
    """Return the contents of a checkpoint's page as JSON values; ``tensors`` adds key -> [shape, type] of every tensor."""
    checkpoint = CheckpointWeights(folder)
    state, run_state = checkpoint.state, checkpoint.state["run"]
    config = run_state.get("config", {})
    specs = {key: checkpoint.spec(key) for key in checkpoint.keys()}  # noqa: SIM118
    parts: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "elements": 0, "bytes": 0})
    for key, (shape, dtype) in specs.items():
        part = parts[_part(key)]
        part["tensors"] += 1
        part["elements"] += prod(shape)
        part["bytes"] += prod(shape) * dtype.itemsize
    files = sorted(path for path in folder.iterdir() if path.is_file())
    values = {
        "folder": str(folder),
        "step": checkpoint.step,
        "versions": state["versions"],
        "world_size": state["world_size"],
        "layout": {name: config["megatron"][name] for name in _PARALLEL_SIZES if name in config.get("megatron", {})},
        "weights": checkpoint.kinds(),
        "model": state["arch"],
        "parts": dict(sorted(parts.items())),
        "files": {"count": len(files), "bytes": sum(path.stat().st_size for path in files)},
        "checksums": read_checksums(folder) is not None,
        "data": run_state.get("data"),
        "schedule": run_state.get("schedule"),
        "consumed": {name: run_state[name] for name in ("consumed_samples", "consumed_tokens") if name in run_state},
        "config": config,
    }
    if tensors:
        values["tensors"] = {key: [list(shape), str(dtype).removeprefix("torch.")] for key, (shape, dtype) in sorted(specs.items())}
    return values


def page(values: dict[str, Any]) -> str:
    """Format the result of ``summary`` as text."""
    llm = values["model"]["llm_config"]
    lines = [
        f"{values['folder']}: step {values['step']}, {values['files']['count']} files of {values['files']['bytes'] / 1e9:.3f} GB"
        + ("" if values["checksums"] else ", without checksums"),
        f"written by {', '.join(f'{name} {version}' for name, version in values['versions'].items())} on {values['world_size']} ranks",
        f"model: {llm['layer_module']}, {llm['num_hidden_layers']} layers of {llm['hidden_size']}, vocabulary {llm['vocab_size']}; "
        f"understands images: {values['model']['visual_und']}, makes them: {values['model']['visual_gen']}; weights: "
        + ", ".join(values["weights"]),
    ]
    if values["layout"]:
        sizes = (f"{name} {value}" for name, value in values["layout"].items() if value not in (None, 1, False))
        lines.append("parallel sizes: " + ", ".join(sizes))
    lines += [f"{name}: {value}" for name, value in values["consumed"].items()]
    lines += [f"data position: {_shortened(values['data'])}", f"schedule: {_shortened(values['schedule'])}"]
    lines += [
        f"  {name:<28} {part['tensors']:>6} tensors {part['elements'] / 1e6:>12.3f} M values {part['bytes'] / 1e9:>9.3f} GB"
        for name, part in values["parts"].items()
    ]
    lines += [f"  {key} {shape} {dtype}" for key, (shape, dtype) in values.get("tensors", {}).items()]
    return "\n".join(lines)


def compare(folder: Path, other_folder: Path, prefix: str = "") -> list[str]:
    """Return one line for every tensor that differs in any bit between two checkpoints.

    ``prefix`` restricts the comparison to keys that begin with it.
    """
    first, second = CheckpointWeights(folder), CheckpointWeights(other_folder)
    keys = {key for checkpoint in (first, second) for key in checkpoint.keys() if key.startswith(prefix)}  # noqa: SIM118
    lines = []
    for key in tqdm(sorted(keys), unit="tensor", desc="comparing", mininterval=1.0, disable=None):
        folders_without_it = [str(checkpoint.folder) for checkpoint in (first, second) if key not in checkpoint.keys()]  # noqa: SIM118
        if folders_without_it:
            lines.append(f"{key}: not in {folders_without_it[0]}")
        elif first.spec(key) != second.spec(key):
            lines.append(f"{key}: {_shape_and_type(first, key)} and {_shape_and_type(second, key)}")
        else:
            first_value, second_value = first.read(key), second.read(key)
            if not torch.equal(first_value, second_value):
                gap = (first_value.double() - second_value.double()).abs()
                lines.append(f"{key}: {int((gap != 0).sum())} of {gap.numel()} values differ, by {gap.max().item():.3g} at most")
    return lines


def damage(folder: Path) -> list[str]:
    """Read every file of a checkpoint and return what differs from its checksums. Raises ValueError if it has none, or holds code."""
    if problems := file_problems(folder):
        return problems
    sums = read_checksums(folder)
    if sums is None:
        raise ValueError(f"{folder} has no checksums: an earlier version of megatron_bagel wrote it")
    progress = tqdm(sorted(sums), unit="file", desc="verifying", mininterval=1.0, disable=None)
    problems = [
        f"{name} does not have the checksum it was written with"
        for name in progress
        if digest(folder / name).sha256 != sums[name]["sha256"]
    ]
    if not problems:
        unpickle_guard.refuse_code(folder)
        print(f"{folder}: {len(sums)} files, {sum(entry['bytes'] for entry in sums.values()) / 1e9:.3f} GB, as they were written")
    return problems


def _part(key: str) -> str:
    """Return what a tensor belongs to: optimizer state by kind, the average, or a part of the model."""
    if key.startswith("optimizer.state."):
        return ".".join(key.split(".")[:3])
    return "ema" if key.startswith("ema.") else f"model: {key.split('.')[0]}"


def _shape_and_type(checkpoint: CheckpointWeights, key: str) -> str:
    shape, dtype = checkpoint.spec(key)
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _shortened(value: Any, limit: int = 300) -> str:
    text = str(value)
    return text if len(text) <= limit else text[:limit] + " ..."
