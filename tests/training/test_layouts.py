"""Every layout gives the result of one process: losses and gradient norms of each step, then weights, averages and moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.checkpoint.checkpoint_weights import CheckpointWeights
from tests.runs import make_world, numbers, run, run_config

pytestmark = pytest.mark.distributed

TP, SP = "tensor_model_parallel_size", "sequence_parallel"
PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
STEPS = 3
#: Clipping is active. A usual epsilon: 1e-15 would make a full update of the last bit of a gradient that should be zero.
SETTINGS = {"global_batch_size": 4, "save_every": STEPS, "max_grad_norm": 0.5, "eps": 1e-6, "warmup_steps": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data and a decoder of 4 layers, 4 heads and 2 key/value heads."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    path = folder / "data/llm/config.json"
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 448}
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    return folder


class Reference:
    """Runs of one process, each made once."""

    def __init__(self, world: Path, folder: Path) -> None:
        self.world, self.folder, self.made = world, folder, {}

    def run(self, flags: dict[str, Any]) -> tuple[list[tuple], CheckpointWeights]:
        key = json.dumps(flags, sort_keys=True)
        if key not in self.made:
            self.made[key] = trained(self.world, self.folder / str(len(self.made)), 1, flags)
        return self.made[key]


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(world, tmp_path_factory.mktemp("reference"))


def trained(world: Path, results: Path, ranks: int, flags: dict[str, Any]) -> tuple[list[tuple], CheckpointWeights]:
    """Numbers of three steps, and the checkpoint after them."""
    history = run(run_config(world, results, ranks, **{**SETTINGS, "total_steps": STEPS, **flags}), ranks)
    return numbers(history), CheckpointWeights(results / f"checkpoints/{STEPS:07d}")


def assert_equal(ours: tuple[list[tuple], CheckpointWeights], theirs: tuple[list[tuple], CheckpointWeights]) -> None:
    assert len(ours[0]) == len(theirs[0]) == STEPS
    for left, right in zip(ours[0], theirs[0], strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    ours, theirs = ours[1], theirs[1]
    assert set(ours.keys()) == set(theirs.keys())
    for name in theirs.keys():  # noqa: SIM118
        torch.testing.assert_close(ours.read(name), theirs.read(name), atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


SP_TP2 = {TP: 2, SP: True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "tp2": (2, {TP: 2}),
    "tp2-sp": (2, SP_TP2),
    "tp4-two-kv-heads": (4, {TP: 4, SP: True}),
    "pp2": (2, {PP: 2}),
    "pp4": (4, {PP: 4}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "uneven": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 1}),
    "tp2-sp-pp2-dp2": (8, {**SP_TP2, PP: 2}),
    "pp2-vpp2-dp2-overlap": (4, {PP: 2, VPP: 2, **OVERLAP}),
    "recompute-uniform": (4, {**SP_TP2, PP: 2, "recompute_granularity": "full", "recompute_num_layers": 2, "recompute_vit": True}),
    "recompute-block": (2, {PP: 2, "recompute_granularity": "full", "recompute_method": "block"}),
    "recompute-attention": (2, {**SP_TP2, "recompute_granularity": "selective"}),
    "recompute-attention-mlp": (2, {PP: 2, "recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"], **OVERLAP}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(world: Path, tmp_path: Path, reference: Reference, layout: str) -> None:
    ranks, flags = LAYOUTS[layout]
    assert_equal(trained(world, tmp_path, ranks, flags), reference.run({}))


TIED = {"tie_word_embeddings": True}
MODELS = {
    "plain-optimizer": (4, {TP: 2, PP: 2, "num_layers_per_virtual_pipeline_stage": 1}, {"use_distributed_optimizer": False}),
    "moe": (4, {**SP_TP2, PP: 2}, {"layer_module": "Qwen2MoEDecoderLayer"}),
    "dense": (4, {**SP_TP2, PP: 2}, {"layer_module": "Qwen2DecoderLayer"}),
    "no-qk-norm": (2, {TP: 2}, {"llm_qk_norm": False}),
    "tied": (4, {PP: 2}, TIED),
    "tied-freeze-und": (4, {PP: 2, **OVERLAP}, {**TIED, "freeze_und": True}),
    "tied-tp2": (2, {TP: 2}, TIED),
    "freeze-llm": (4, {PP: 4}, {"freeze_llm": True}),
    "freeze-vit": (2, {PP: 2}, {"freeze_vit": True}),
    "freeze-und": (4, {**SP_TP2, PP: 2}, {"freeze_und": True}),
    "no-vit": (2, {PP: 2}, {"visual_und": False}),
    "no-images-out": (4, {**SP_TP2, PP: 2}, {"visual_gen": False}),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_on_a_layout(world: Path, tmp_path: Path, reference: Reference, model: str) -> None:
    ranks, layout, flags = MODELS[model]
    assert_equal(trained(world, tmp_path, ranks, {**layout, **flags}), reference.run(flags))


@pytest.mark.parametrize("there", [(4, {**SP_TP2, PP: 2}), (4, {PP: 2, VPP: 2})], ids=["tp2-pp2", "pp2-vpp2-dp2"])
def test_a_checkpoint_continues_on_another_layout(world: Path, tmp_path: Path, reference: Reference, there: tuple) -> None:
    """One step elsewhere, then here, with two other layouts in a row."""
    for steps, (ranks, flags) in ((1, there), (2, (2, {PP: 2, "num_layers_in_last_pipeline_stage": 1}))):
        run(run_config(world, tmp_path, ranks, **SETTINGS, **{**flags, "total_steps": steps}), ranks)
    assert_equal(trained(world, tmp_path, 2, {TP: 2}), reference.run({}))
