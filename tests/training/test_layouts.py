# SPDX-License-Identifier: Apache-2.0
"""Every layout gives the result of one process: losses and gradient norms of each step, then weights, averages and moments.

One representative of each axis runs by default; the whole list is ``pytest -m slow tests/training/test_layouts.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_bagel.cli.convert import megatron_to_hf
from tests.runs import run, run_config
from tests.training.equal_runs import (
    OVERLAP,
    PP,
    SETTINGS,
    SP,
    SP_TP2,
    STEPS,
    TP,
    VPP,
    Reference,
    assert_clipped,
    assert_equal,
    cases,
    stored_tensors,
    trained,
    world_of,
)

pytestmark = pytest.mark.distributed

RECOMPUTE_MLP = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
INSTANCES = "num_distributed_optimizer_instances"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data and a decoder of 4 layers, 4 heads, 2 key/value heads and a vocabulary that tensor parallelism must pad."""
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=447)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(world, tmp_path_factory.mktemp("reference"))


LAYOUTS = {
    "tp2": (2, {TP: 2}),
    "tp2-sp": (2, SP_TP2),
    "padded-vocabulary": (2, {TP: 2, "make_vocab_size_divisible_by": 128}),
    "tp4-two-kv-heads": (4, {TP: 4, SP: True}),
    "pp2": (2, {PP: 2}),
    "pp4": (4, {PP: 4}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "uneven": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 1}),
    "dp2": (2, {}),
    "dp2-two-instances": (2, {INSTANCES: 2}),
    "dp4-two-instances": (4, {INSTANCES: 2}),
    "pp2-dp2-two-instances": (4, {PP: 2, INSTANCES: 2}),
    "dp4-two-instances-overlap": (4, {INSTANCES: 2, **OVERLAP}),
    "tp2-sp-pp2-dp2": (8, {**SP_TP2, PP: 2}),
    "pp2-vpp2-dp2-overlap": (4, {PP: 2, VPP: 2, **OVERLAP}),
    "recompute-uniform": (4, {**SP_TP2, PP: 2, "recompute_granularity": "full", "recompute_num_layers": 2, "recompute_vit": True}),
    "recompute-block": (2, {PP: 2, "recompute_granularity": "full", "recompute_method": "block"}),
    "chunked-cross-entropy": (2, {**SP_TP2, "ce_chunk_tokens": 16}),
    "chunked-cross-entropy-dp2-overlap": (2, {"ce_chunk_tokens": 16, **OVERLAP}),
    "compiled-kernels": (2, {**SP_TP2, "fused_kernels": "compiled", **RECOMPUTE_MLP}),
    "compiled-kernels-dp2-overlap": (2, {"fused_kernels": "compiled", **OVERLAP}),
    "recompute-attention": (2, {**SP_TP2, "recompute_granularity": "selective"}),
    "recompute-attention-mlp": (2, {PP: 2, **RECOMPUTE_MLP, **OVERLAP}),
}


@pytest.mark.parametrize(
    ("ranks", "flags"),
    cases(LAYOUTS, "dp4-two-instances", "pp2-vpp2-dp2-overlap"),
)
def test_layouts_equal_one_process(world: Path, tmp_path: Path, reference: Reference, ranks: int, flags: dict) -> None:
    assert_equal(trained(world, tmp_path, ranks, flags), reference.run({}))


@pytest.mark.slow
def test_layouts_are_equal_with_the_epsilon_of_the_original(world: Path, tmp_path: Path, reference: Reference) -> None:
    """At 1e-15 a weight with a true gradient of zero takes full steps on rounding noise; no other weight may differ."""
    assert_equal(trained(world, tmp_path, 4, {TP: 2, PP: 2, "eps": 1e-15}), reference.run({"eps": 1e-15}))


def test_clipping_is_active(reference: Reference) -> None:
    assert_clipped(reference.run({}))


@pytest.mark.slow
def test_padding_of_the_vocabulary_is_not_exported(world: Path, tmp_path: Path) -> None:
    trained(world, tmp_path, 2, {TP: 2, "make_vocab_size_divisible_by": 128})
    checkpoint, folder = tmp_path / f"checkpoints/{STEPS:07d}", tmp_path / "hf"
    assert stored_tensors(checkpoint)["output_layer.weight"].shape[0] == 512
    assert megatron_to_hf.main(["--checkpoint", str(checkpoint), "--output", str(folder), "--weights", "model"]) == 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in ("embed_tokens", "lm_head"):
            key = next(key for key in file.keys() if name in key)  # noqa: SIM118
            assert file.get_slice(key).get_shape()[0] == 447


TIED = {"tie_word_embeddings": True}
MODELS = {
    "plain-optimizer": (4, {TP: 2, PP: 2, "num_layers_per_virtual_pipeline_stage": 1}, {"use_distributed_optimizer": False}),
    "moe": (4, {**SP_TP2, PP: 2}, {"layer_module": "Qwen2MoEDecoderLayer"}),
    "dense": (4, {**SP_TP2, PP: 2}, {"layer_module": "Qwen2DecoderLayer"}),
    "no-qk-norm": (2, {TP: 2}, {"llm_qk_norm": False}),
    "tied": (4, {PP: 2}, TIED),
    "tied-chunked-cross-entropy": (2, {PP: 2, "ce_chunk_tokens": 16}, TIED),
    "tied-freeze-und": (4, {PP: 2, **OVERLAP}, {**TIED, "freeze_und": True}),
    "tied-tp2": (2, {TP: 2}, TIED),
    "freeze-llm": (4, {PP: 4}, {"freeze_llm": True}),
    "freeze-vit": (2, {PP: 2}, {"freeze_vit": True}),
    "freeze-und": (4, {**SP_TP2, PP: 2}, {"freeze_und": True}),
    "no-vit": (2, {PP: 2}, {"visual_und": False}),
    "no-images-out": (4, {**SP_TP2, PP: 2}, {"visual_gen": False}),
}


@pytest.mark.parametrize(("ranks", "layout", "flags"), cases(MODELS, "tied-freeze-und"))
def test_every_model_on_a_layout(world: Path, tmp_path: Path, reference: Reference, ranks: int, layout: dict, flags: dict) -> None:
    assert_equal(trained(world, tmp_path, ranks, {**layout, **flags}), reference.run(flags))


THERE = {
    "tp2-sp-pp2": (4, {**SP_TP2, PP: 2}),
    "dp4-two-instances": (4, {INSTANCES: 2}),
    "pp2-vpp2-dp2-overlap": (4, {PP: 2, VPP: 2, **OVERLAP}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("here", "there"),
    [("tp2-sp-pp2", "pp2-vpp2-dp2-overlap"), ("dp4-two-instances", "tp2-sp-pp2"), ("pp2-vpp2-dp2-overlap", "dp4-two-instances")],
)
def test_three_steps_here_and_three_there_are_six_here(world: Path, tmp_path: Path, here: str, there: str) -> None:
    """Losses, and after them weights, averages and the optimizer's moments."""
    six = {"total_steps": 2 * STEPS}
    (ranks, flags), (others, other_flags) = THERE[here], THERE[there]
    trained(world, tmp_path / "apart", ranks, flags)
    assert_equal(
        trained(world, tmp_path / "apart", others, {**other_flags, **six}), trained(world, tmp_path / "whole", ranks, {**flags, **six}), 6
    )


ELSEWHERE = {"tp2-pp2": (4, {**SP_TP2, PP: 2}), "pp2-vpp2-dp2": (4, {PP: 2, VPP: 2})}


@pytest.mark.parametrize(("ranks", "flags"), cases(ELSEWHERE, "tp2-pp2"))
def test_a_checkpoint_continues_on_another_layout(world: Path, tmp_path: Path, reference: Reference, ranks: int, flags: dict) -> None:
    """One step elsewhere, then here, with two other layouts in a row."""
    for steps, (there, layout) in ((1, (ranks, flags)), (2, (2, {PP: 2, "num_layers_in_last_pipeline_stage": 1}))):
        run(run_config(world, tmp_path, there, **{**SETTINGS, **layout, "total_steps": steps}), there)
    assert_equal(trained(world, tmp_path, 2, {TP: 2}), reference.run({}))
