# SPDX-License-Identifier: Apache-2.0
"""BAGEL-7B-MoT with adapters, built at its real size without memory: Megatron-Core's buffers and optimizer are what the plan predicts.

``tests/training/test_lora_runs.py`` holds, on small models, that what a dry run builds is what a running rank has, and compares plans with
running ranks, activations too.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.cli.resolve_plan import resolve_plan
from megatron_bagel.config.parser import Config
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.planning.command import problem_of
from megatron_bagel.planning.models import MODELS
from megatron_bagel.planning.parallel_plan import make_plan
from tests.planning.test_dry_run import dry_runs
from tests.runs import run_config
from tests.training.equal_runs import SP_TP2, world_of

MODEL = "bagel-7b-mot"
#: SigLIP has 27 layers, of which BAGEL leaves out the last.
VIT = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 980}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"lora_rank": 64}),
    "tp2-sp": (2, {"lora_rank": 64, **SP_TP2}),
    "gen": (1, {"lora_rank": 16, "lora_experts": "gen", "lora_targets": ["qkv", "fc2", "vae2llm"], "lora_full": ["llm2vae"]}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data for a model of the real size. Its weights and those of the autoencoder are not read, so they are not there."""
    folder = world_of(tmp_path_factory.mktemp("world"), **MODELS[MODEL].llm.to_hf())
    vit = folder / "data/vit/config.json"
    vit.write_text(json.dumps(json.loads(vit.read_text()) | VIT))
    (folder / "base").mkdir()
    (folder / "base/ae.safetensors").touch()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), [pytest.param(*row, id=name) for name, row in RUNS.items()])
def test_the_plan_has_the_bytes_that_are_built(world: Path, tmp_path: Path, ranks: int, flags: dict[str, Any]) -> None:
    """What ``plan --model bagel-7b-mot --gpus 1 --lora_rank 64`` says of weights, gradients, optimizer and average, to 1 %."""
    model = {"layer_module": "Qwen2MoTDecoderLayer", "max_latent_size": 64, "vit_max_num_patch_per_side": 70}
    start = {"init_random": False, "resume_from": str(world / "base"), "resume_model_only": True, "bf16": True,
             "vae_path": str(world / "base/ae.safetensors")}  # fmt: skip
    (built, *_) = (run[3] for run in dry_runs(run_config(world, tmp_path, ranks, **model, **start, **flags), ranks, tmp_path))
    wanted = PlanArguments(model=MODEL, gpus=ranks)
    planned = resolve_plan(Config.from_values({"max_num_tokens": 11520, **flags}), wanted)
    static = asdict(make_plan(planned.inputs_of({}), problem_of(planned, wanted)).memory[0].static)
    print(f"bytes built and planned: {[(name, size, static[name]) for name, size in built.items()]}")
    assert built == pytest.approx({name: static[name] for name in built}, rel=0.01)
    assert built["weight_bytes"] * ranks > 29e9 and built["optimizer_bytes"] < 5e9
