# SPDX-License-Identifier: Apache-2.0
"""Runs whose packs are shared by several ranks give the numbers and the weights of one process.

One representative of each way runs by default; the whole list is ``pytest -m slow tests/training/test_context_parallel_runs.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_bagel.data.loading.build import open_loader
from megatron_bagel.layout.cp_partition import context_orders
from megatron_bagel.layout.mask import PackMask
from tests.runs import resolved, run, run_config
from tests.training.equal_runs import COMM, CP, OVERLAP, PP, SETTINGS, SP_TP2, VPP, Reference, assert_equal, cases, trained, world_of

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data, and a decoder of 4 layers with heads enough to share between four ranks."""
    folder = world_of(tmp_path_factory.mktemp("world"), num_attention_heads=8, num_key_value_heads=4)
    for name in ("text", "t2i_pretrain", "vlm_sft"):
        groups = yaml.safe_load((folder / "data/dataset.yaml").read_text())
        only = {key: content for key, content in groups.items() if key in (name, "dataset_info")}
        only[name]["weight"] = 1
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(only))
    return folder


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(world, tmp_path_factory.mktemp("reference"))


LAYOUTS = {
    "cp2": (2, {CP: 2}),
    "cp4": (4, {CP: 4}),
    "cp2-a2a": (2, {CP: 2, COMM: "a2a"}),
    "cp4-a2a": (4, {CP: 4, COMM: "a2a"}),
    "cp2-dp2": (4, {CP: 2}),
    "cp2-dp2-a2a-overlap": (4, {CP: 2, COMM: "a2a", **OVERLAP}),
    "cp2-dp4-two-instances": (8, {CP: 2, "num_distributed_optimizer_instances": 2}),
    "tp2-sp-cp2-dp2": (8, {**SP_TP2, CP: 2}),
    "tp2-sp-cp2-a2a": (4, {**SP_TP2, CP: 2, COMM: "a2a"}),
    "pp2-cp2-dp2": (8, {PP: 2, CP: 2}),
    "tp2-sp-pp2-cp2": (8, {**SP_TP2, PP: 2, CP: 2}),
    "pp2-vpp2-cp2-recompute": (4, {PP: 2, VPP: 2, CP: 2, "recompute_granularity": "selective"}),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "tp2-sp-cp2-a2a"))
def test_shared_packs_equal_one_process(world: Path, tmp_path: Path, reference: Reference, ranks: int, flags: dict) -> None:
    assert_equal(trained(world, tmp_path, ranks, flags), reference.run({}))


TEXT, PICTURES = {"dataset_config_file": "text.yaml"}, {"dataset_config_file": "t2i_pretrain.yaml"}
QUESTIONS = {"dataset_config_file": "vlm_sft.yaml"}
KINDS = {
    "text-alone": (4, {CP: 4}, {**TEXT, "visual_gen": False, "visual_und": False}),
    "text-alone-pp2": (4, {PP: 2, CP: 2}, TEXT),
    "pictures-alone-pp2": (4, {PP: 2, CP: 2, COMM: "a2a"}, PICTURES),
    "questions-alone-pp2": (4, {PP: 2, CP: 2}, QUESTIONS),
    "freeze-und-pp2": (4, {PP: 2, CP: 2}, {"freeze_und": True}),
    "freeze-vit-pp2": (4, {PP: 2, CP: 2}, {"freeze_vit": True}),
    "freeze-llm-pp2": (4, {PP: 2, CP: 2}, {"freeze_llm": True, "use_distributed_optimizer": False}),
    "freeze-vit-moe": (2, {CP: 2, "recompute_granularity": "full"}, {"freeze_vit": True, "layer_module": "Qwen2MoEDecoderLayer"}),
}


@pytest.mark.parametrize(("ranks", "layout", "flags"), cases(KINDS))
def test_every_kind_of_training_equals_one_process(
    world: Path, tmp_path: Path, reference: Reference, ranks: int, layout: dict, flags: dict
) -> None:
    assert_equal(trained(world, tmp_path, ranks, {**layout, **flags}), reference.run(flags))


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_number_of_ranks(world: Path, tmp_path: Path, reference: Reference) -> None:
    run(run_config(world, tmp_path, ranks=2, **{**SETTINGS, CP: 2, "total_steps": 1}), ranks=2)
    assert_equal(trained(world, tmp_path, 4, {CP: 4}), reference.run({}))


def test_packs_of_the_sample_data_are_dealt_evenly(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path, max_num_tokens=2048, expected_num_tokens=1900)
    made = resolved(config)
    loader = open_loader(made.data, made.arch, made.tokenizer, 8, 0, 1)
    for loaded in next(loader).packs:
        areas = PackMask.of(loaded.pack).row_areas()
        for ranks in (2, 4, 8, 16):
            orders = context_orders(loaded.pack, ranks)
            counts = [len(order.positions) for order in orders]
            loads = np.array([areas[order.positions].sum() for order in orders])
            assert max(counts) - min(counts) <= 1 and loads.max() / loads.mean() <= 1.05
    loader.close()
