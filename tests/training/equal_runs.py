# SPDX-License-Identifier: Apache-2.0
"""What every test of layouts shares: a run here and a run of one process there, compared number by number and weight by weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.runs import NUMBERS, make_world, numbers, run, run_config
from tools.compare_tensors import is_rounding_alone

TP, SP = "tensor_model_parallel_size", "sequence_parallel"
PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, COMM = "context_parallel_size", "cp_comm_type"
SP_TP2 = {TP: 2, SP: True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
#: Four experts of which two serve a token; layer 1 is dense. Both auxiliary losses are on, and dropped capacity is off.
SPARSE: dict[str, Any] = {
    "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_layer_freq": [1, 0, 1, 1], "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 0.01,
}  # fmt: skip
STEPS = 3
#: Clipping is active. A usual epsilon: 1e-15 would make a full update of the last bit of a gradient that should be zero.
SETTINGS = {
    "global_batch_size": 4, "total_steps": STEPS, "save_every": STEPS, "max_grad_norm": 0.5, "eps": 1e-6, "warmup_steps": 0,
}  # fmt: skip

#: Numbers of the steps, and every tensor of the checkpoint after them by its name there.
Result = tuple[list[tuple], dict[str, torch.Tensor]]


def world_of(folder: Path, **llm: int) -> Path:
    """Sample data, and a decoder of 4 layers whose ``config.json`` holds ``llm`` besides."""
    make_world(folder)
    path = folder / "data/llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 4, **llm}))
    return folder


def write_mix(world: Path, name: str, weights: Mapping[str, float]) -> None:
    """Write ``name``.yaml into the world: a mix of only these groups of its data, none of which every pack must have."""
    content = yaml.safe_load((world / "data/dataset.yaml").read_text())
    groups = {group: {**content[group], "is_mandatory": False, "weight": weight} for group, weight in weights.items()}
    (world / f"{name}.yaml").write_text(yaml.safe_dump({**groups, "dataset_info": content["dataset_info"]}))


def trained(world: Path, results: Path, ranks: int, flags: Mapping[str, Any]) -> Result:
    """A short run on ``ranks`` processes. A ``dataset_config_file`` among the flags is a name inside the world."""
    settings = {**SETTINGS, **flags}
    if "dataset_config_file" in flags:
        settings["dataset_config_file"] = str(world / flags["dataset_config_file"])
    history = run(run_config(world, results, ranks, **settings), ranks)
    return numbers(history), stored_tensors(results / f"checkpoints/{settings['total_steps']:07d}")


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole. In one call: one for each of the hundreds would take longer than the run."""
    reader = torch_checkpoint.FileSystemReader(str(checkpoint))
    stored = reader.read_metadata().state_dict_metadata.items()
    kept = {name: held for name, held in stored if isinstance(held, TensorStorageMetadata)}
    tensors = {name: torch.empty(held.size, dtype=held.properties.dtype) for name, held in kept.items()}
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class Reference:
    """Runs of one process, each made once."""

    def __init__(self, world: Path, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.made: dict[str, Result] = {}

    def run(self, flags: Mapping[str, Any]) -> Result:
        """The run of one process with these flags."""
        key = json.dumps(flags, sort_keys=True)
        if key not in self.made:
            self.made[key] = trained(self.world, self.folder / str(len(self.made)), 1, flags)
        return self.made[key]


def assert_equal(ours: Result, theirs: Result, steps: int = STEPS) -> None:
    """Losses and gradient norms to 1e-5; weights, averages and optimizer moments within fp32's rounding of another order.

    Rows that pad the vocabulary for one of the layouts are zero in all of them. Tensors that only rounding moves are not compared.
    """
    assert len(ours[0]) == len(theirs[0]) == steps
    for left, right in zip(ours[0], theirs[0], strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name in theirs[1]:
        if is_rounding_alone(name):
            continue
        here, there = ours[1][name], theirs[1][name]
        if len(here) != len(there) and name.endswith(("word_embeddings.weight", "output_layer.weight")):
            rows = min(len(here), len(there))
            assert not here[rows:].any() and not there[rows:].any()
            here, there = here[:rows], there[:rows]
        torch.testing.assert_close(here, there, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def assert_clipped(result: Result) -> None:
    """Gradients were longer than the settings allow, in every step: what is compared went through clipping."""
    norms = [step[1 + NUMBERS.index("grad_norm")] for step in result[0]]
    assert min(norms) > SETTINGS["max_grad_norm"], norms


def cases(table: Mapping[str, Any], *representatives: str) -> list[Any]:
    """Parameters of a test by name; all but the ``representatives`` are slow."""
    if unknown := set(representatives) - set(table):
        raise ValueError(f"no such cases: {', '.join(sorted(unknown))}")
    return [pytest.param(*_tuple(row), id=name, marks=() if name in representatives else pytest.mark.slow) for name, row in table.items()]


def _tuple(row: Any) -> tuple:
    return row if isinstance(row, tuple) else (row,)
