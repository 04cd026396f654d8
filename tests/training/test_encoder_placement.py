# SPDX-License-Identifier: Apache-2.0
"""Who encodes an image changes no number: shared by all ranks of a replica or done by its first stage, as one process does it.

Every other test of layouts shares the encoding; here are the other placement, and runs that go from one to the other. The whole
list is ``pytest -m slow tests/training/test_encoder_placement.py``.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import run, run_config
from tests.training.equal_runs import CP, OVERLAP, PP, SETTINGS, SP_TP2, TP, VPP, Reference, assert_equal, cases, trained, world_of

pytestmark = pytest.mark.distributed

FIRST = {"encoder_placement": "first_stage"}
#: Few images at a time.
CONSTANT = {"encoder_memory": "constant", "encoder_chunk_tokens": 30}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(world, tmp_path_factory.mktemp("reference"))


LAYOUTS = {
    "tp2-sp-pp2-workers": (4, {**SP_TP2, PP: 2, "num_workers": 2}),
    "first-stage-pp2": (2, {PP: 2, **FIRST}),
    "first-stage-tp2-pp2-dp2": (8, {**SP_TP2, PP: 2, **FIRST}),
    "first-stage-cp2": (2, {CP: 2, **FIRST}),
    "cp2-pp2-overlap": (4, {CP: 2, PP: 2, **OVERLAP}),
    "tp2-sp-dp2-two-instances-overlap": (4, {**SP_TP2, **OVERLAP, "num_distributed_optimizer_instances": 2}),
    "pp2-vpp2-dp2-whole-optimizer": (4, {PP: 2, VPP: 2, "use_distributed_optimizer": False}),
    "recompute": (4, {TP: 2, PP: 2, "recompute_vit": True}),
    "constant-memory-pp2-overlap": (2, {PP: 2, **OVERLAP, **CONSTANT}),
    "constant-memory-first-stage-tp2": (2, {TP: 2, **FIRST, **CONSTANT}),
    "constant-memory-recompute-dp2-overlap": (2, {**OVERLAP, **CONSTANT, "recompute_vit": True}),
    "constant-memory-one-process": (1, CONSTANT),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "constant-memory-pp2-overlap"))
def test_placements_equal_one_process(world: Path, tmp_path: Path, reference: Reference, ranks: int, flags: dict) -> None:
    """Whatever the process-wide generators hold, which the ranks inherit: nothing of a run may be drawn from them."""
    # What a checkpoint stores of the optimizer depends on its kind.
    expected = reference.run({name: value for name, value in flags.items() if name == "use_distributed_optimizer"})
    for number, seed in enumerate((random.seed, np.random.seed, torch.manual_seed)):
        seed(7 * ranks + number)
    assert_equal(trained(world, tmp_path, ranks, flags), expected)


FLAGS = {
    "freeze-vit": (2, {PP: 2}, {"freeze_vit": True}),
    "freeze-und": (4, {TP: 2, PP: 2}, {"freeze_und": True}),
    "freeze-llm-whole-optimizer": (4, {PP: 2}, {"freeze_llm": True, "use_distributed_optimizer": False}),
    "no-vit": (2, {TP: 2}, {"visual_und": False}),
    "no-images-out": (4, {PP: 2, CP: 2}, {"visual_gen": False}),
    "only-the-tower": (4, {PP: 4}, {"freeze_llm": True, "visual_gen": False}),
    "padded-as-the-original": (4, {TP: 2, PP: 2}, {"vae_encode_padded": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout", "flags"), cases(FLAGS))
def test_every_kind_of_training_shares_the_encoding(
    world: Path, tmp_path: Path, reference: Reference, ranks: int, layout: dict, flags: dict
) -> None:
    assert_equal(trained(world, tmp_path, ranks, {**layout, **flags}), reference.run(flags))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["sharded-optimizer", "whole-optimizer"])
def test_a_checkpoint_continues_on_another_placement(world: Path, tmp_path: Path, reference: Reference, whole: bool) -> None:
    """One step shared, one on the first stage alone, one shared by other ranks; then one process goes on from there."""
    flags = {"use_distributed_optimizer": not whole}
    for steps, ranks, layout in ((1, 4, {TP: 2, PP: 2}), (2, 2, {PP: 2, **FIRST})):
        run(run_config(world, tmp_path, ranks, **{**SETTINGS, **flags, **layout, "total_steps": steps}), ranks)
    assert_equal(trained(world, tmp_path, 2, {CP: 2, **flags}), reference.run(flags))


@pytest.mark.slow
def test_one_process_continues_what_four_ranks_shared(world: Path, tmp_path: Path, reference: Reference) -> None:
    run(run_config(world, tmp_path, 4, **{**SETTINGS, TP: 2, PP: 2, "total_steps": 2}), 4)
    assert_equal(trained(world, tmp_path, 1, {}), reference.run({}))
