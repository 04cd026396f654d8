"""Runs whose packs are shared by several ranks give the numbers and the weights of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_bagel.checkpoint.checkpoint_weights import CheckpointWeights
from megatron_bagel.data.training_data import open_loader
from megatron_bagel.layout.dealing import context_orders
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.training.model_setup import run_model
from tests.runs import make_world, numbers, run, run_config

pytestmark = pytest.mark.distributed

CP, COMM = "context_parallel_size", "cp_comm_type"
PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data, and a decoder of 4 layers with heads enough to share between four ranks."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    path = folder / "data/llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SIZES))
    for name in ("text", "t2i_pretrain"):
        groups = yaml.safe_load((folder / "data/dataset.yaml").read_text())
        only = {key: content for key, content in groups.items() if key in (name, "dataset_info")}
        only[name]["weight"] = 1
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(only))
    return folder


class Reference:
    """Runs of one process, each made once."""

    def __init__(self, world: Path, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.made: dict[str, tuple[list[tuple], CheckpointWeights]] = {}

    def run(self, flags: dict[str, Any]) -> tuple[list[tuple], CheckpointWeights]:
        key = json.dumps(flags, sort_keys=True)
        if key not in self.made:
            self.made[key] = trained(self.world, self.folder / str(len(self.made)), 1, flags)
        return self.made[key]


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(world, tmp_path_factory.mktemp("reference"))


def trained(world: Path, results: Path, ranks: int, flags: dict[str, Any]) -> tuple[list[tuple], CheckpointWeights]:
    """Numbers of three steps, and the weights after them.

    A usual epsilon instead of 1e-15, which would make a full update of the last bit of a gradient that should be zero.
    """
    settings = {"global_batch_size": 4, "total_steps": STEPS, "save_every": STEPS, "eps": 1e-6, **flags}
    if "dataset_config_file" in flags:
        settings["dataset_config_file"] = str(world / flags["dataset_config_file"])
    history = run(run_config(world, results, ranks=ranks, **settings), ranks)
    return numbers(history), CheckpointWeights(results / f"checkpoints/{STEPS:07d}")


def assert_equal(ours: tuple[list[tuple], CheckpointWeights], theirs: tuple[list[tuple], CheckpointWeights]) -> None:
    assert len(ours[0]) == len(theirs[0]) == STEPS
    for left, right in zip(ours[0], theirs[0], strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    assert set(ours[1].keys()) == set(theirs[1].keys())
    for name in theirs[1].keys():  # noqa: SIM118
        torch.testing.assert_close(
            ours[1].read(name), theirs[1].read(name), atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


LAYOUTS = {
    "cp2": (2, {CP: 2}),
    "cp4": (4, {CP: 4}),
    "cp2-a2a": (2, {CP: 2, COMM: "a2a"}),
    "cp4-a2a": (4, {CP: 4, COMM: "a2a"}),
    "cp2-dp2": (4, {CP: 2}),
    "cp2-dp2-a2a-overlap": (4, {CP: 2, COMM: "a2a", "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2-sp-cp2-dp2": (8, {**TP2_SP, CP: 2}),
    "tp2-sp-cp2-a2a": (4, {**TP2_SP, CP: 2, COMM: "a2a"}),
    "pp2-cp2-dp2": (8, {PP: 2, CP: 2}),
    "tp2-sp-pp2-cp2": (8, {**TP2_SP, PP: 2, CP: 2}),
    "pp2-vpp2-cp2-recompute": (4, {PP: 2, VPP: 2, CP: 2, "recompute_granularity": "selective"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_packs_equal_one_process(world: Path, tmp_path: Path, reference: Reference, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    assert_equal(trained(world, tmp_path, ranks, flags), reference.run({}))


KINDS = {
    "text-alone": (4, {CP: 4}, {"dataset_config_file": "text.yaml", "visual_gen": False, "visual_und": False}),
    "text-alone-pp2": (4, {PP: 2, CP: 2}, {"dataset_config_file": "text.yaml"}),
    "pictures-alone-pp2": (4, {PP: 2, CP: 2, COMM: "a2a"}, {"dataset_config_file": "t2i_pretrain.yaml"}),
    "freeze-und-pp2": (4, {PP: 2, CP: 2}, {"freeze_und": True}),
    "freeze-llm-pp2": (4, {PP: 2, CP: 2}, {"freeze_llm": True, "use_distributed_optimizer": False}),
    "freeze-vit-moe": (2, {CP: 2, "recompute_granularity": "full"}, {"freeze_vit": True, "layer_module": "Qwen2MoEDecoderLayer"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_equals_one_process(world: Path, tmp_path: Path, reference: Reference, kind: str) -> None:
    ranks, layout, flags = KINDS[kind]
    assert_equal(trained(world, tmp_path, ranks, {**layout, **flags}), reference.run(flags))


def test_a_checkpoint_continues_on_another_number_of_ranks(world: Path, tmp_path: Path, reference: Reference) -> None:
    run(run_config(world, tmp_path, ranks=2, total_steps=1, global_batch_size=4, eps=1e-6, **{CP: 2}), ranks=2)
    assert_equal(trained(world, tmp_path, 4, {CP: 4}), reference.run({}))


def test_packs_of_the_sample_data_are_dealt_evenly(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path, max_num_tokens=2048, expected_num_tokens=1900)
    loader = open_loader(config, *run_model(config), 8, 0, 1)
    for loaded in next(loader).packs:
        areas = PackMask.of(loaded.pack).row_areas()
        for ranks in (2, 4, 8, 16):
            orders = context_orders(loaded.pack, ranks)
            counts = [len(order.positions) for order in orders]
            loads = np.array([areas[order.positions].sum() for order in orders])
            assert max(counts) - min(counts) <= 1 and loads.max() / loads.mean() <= 1.05
    loader.close()
