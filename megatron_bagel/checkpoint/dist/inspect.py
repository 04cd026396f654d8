"""Reading a training checkpoint for people: one page, a comparison tensor by tensor, a check of its files."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_bagel.checkpoint.dist import unpickle_guard
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.dist.checksums import digest, missing_or_cut, read_checksums

_LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size",
    "sequence_parallel", "use_distributed_optimizer",
)  # fmt: skip


def summary(folder: Path, tensors: bool = False) -> dict[str, Any]:
    """Everything a page about a checkpoint says, as JSON values; `tensors` adds key -> [shape, type] of every tensor."""
    checkpoint = CheckpointWeights(folder)
    state, run = checkpoint.state, checkpoint.state["run"]
    config = run.get("config", {})
    specs = {key: checkpoint.spec(key) for key in checkpoint.keys()}  # noqa: SIM118
    parts: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "elements": 0, "bytes": 0})
    for key, (shape, dtype) in specs.items():
        part = parts[_part(key)]
        part["tensors"] += 1
        part["elements"] += prod(shape)
        part["bytes"] += prod(shape) * dtype.itemsize
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = {
        "folder": str(folder),
        "step": checkpoint.step,
        "versions": state["versions"],
        "world_size": state["world_size"],
        "layout": {name: config["megatron"][name] for name in _LAYOUT if name in config.get("megatron", {})},
        "weights": checkpoint.kinds(),
        "model": state["arch"],
        "parts": dict(sorted(parts.items())),
        "files": {"count": len(files), "bytes": sum(path.stat().st_size for path in files)},
        "checksums": read_checksums(folder) is not None,
        "data": run.get("data"),
        "schedule": run.get("schedule"),
        "consumed": {name: run[name] for name in ("consumed_samples", "consumed_tokens") if name in run},
        "config": config,
    }
    if tensors:
        found["tensors"] = {key: [list(shape), str(dtype).removeprefix("torch.")] for key, (shape, dtype) in sorted(specs.items())}
    return found


def page(found: dict[str, Any]) -> str:
    """`summary` as text."""
    llm = found["model"]["llm_config"]
    lines = [
        f"{found['folder']}: step {found['step']}, {found['files']['count']} files of {found['files']['bytes'] / 1e9:.3f} GB"
        + ("" if found["checksums"] else ", without checksums"),
        f"written by {', '.join(f'{name} {version}' for name, version in found['versions'].items())} on {found['world_size']} ranks",
        f"model: {llm['layer_module']}, {llm['num_hidden_layers']} layers of {llm['hidden_size']}, vocabulary {llm['vocab_size']}; "
        f"understands images: {found['model']['visual_und']}, makes them: {found['model']['visual_gen']}; weights: "
        + ", ".join(found["weights"]),
    ]
    if found["layout"]:
        lines.append("layout: " + ", ".join(f"{name} {value}" for name, value in found["layout"].items() if value not in (None, 1, False)))
    lines += [f"{name}: {value}" for name, value in found["consumed"].items()]
    lines += [f"data position: {_short(found['data'])}", f"schedule: {_short(found['schedule'])}"]
    lines += [
        f"  {name:<28} {part['tensors']:>6} tensors {part['elements'] / 1e6:>12.3f} M values {part['bytes'] / 1e9:>9.3f} GB"
        for name, part in found["parts"].items()
    ]
    lines += [f"  {key} {shape} {dtype}" for key, (shape, dtype) in found.get("tensors", {}).items()]
    return "\n".join(lines)


def compare(folder: Path, other: Path, only: str = "") -> list[str]:
    """One line for every tensor (whose key begins with `only`) that is not bit for bit the same in both."""
    here, there = CheckpointWeights(folder), CheckpointWeights(other)
    keys = {key for checkpoint in (here, there) for key in checkpoint.keys() if key.startswith(only)}  # noqa: SIM118
    lines = []
    for key in tqdm(sorted(keys), unit="tensor", desc="comparing", mininterval=1.0, disable=None):
        lacking = [str(checkpoint.folder) for checkpoint in (here, there) if key not in checkpoint.keys()]  # noqa: SIM118
        if lacking:
            lines.append(f"{key}: not in {lacking[0]}")
        elif here.spec(key) != there.spec(key):
            lines.append(f"{key}: {_told(here, key)} and {_told(there, key)}")
        else:
            left, right = here.read(key), there.read(key)
            if not torch.equal(left, right):
                gap = (left.double() - right.double()).abs()
                lines.append(f"{key}: {int((gap != 0).sum())} of {gap.numel()} values differ, by {gap.max().item():.3g} at most")
    return lines


def verify(folder: Path) -> None:
    """Read every file of a checkpoint. Raises ValueError naming the damaged ones, or saying that there is nothing to compare with."""
    unpickle_guard.refuse_code(folder)
    sums = read_checksums(folder)
    if sums is None:
        raise ValueError(f"{folder} has no checksums: an earlier version of megatron_bagel wrote it")
    wrong = missing_or_cut(folder)
    if not wrong:
        progress = tqdm(sorted(sums), unit="file", desc="verifying", mininterval=1.0, disable=None)
        wrong = [f"{name} does not have the checksum it was written with" for name in progress if digest(folder / name) != sums[name]]
    if wrong:
        raise ValueError(f"{folder} is damaged: {'; '.join(wrong)}")
    print(f"{folder}: {len(sums)} files, {sum(entry['bytes'] for entry in sums.values()) / 1e9:.3f} GB, as they were written")


def _part(key: str) -> str:
    """What a tensor belongs to: optimizer state by kind, the average, or a part of the model."""
    if key.startswith("optimizer.state."):
        return ".".join(key.split(".")[:3])
    return "ema" if key.startswith("ema.") else f"model: {key.split('.')[0]}"


def _told(checkpoint: CheckpointWeights, key: str) -> str:
    shape, dtype = checkpoint.spec(key)
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _short(value: Any, most: int = 300) -> str:
    text = str(value)
    return text if len(text) <= most else text[:most] + " ..."
