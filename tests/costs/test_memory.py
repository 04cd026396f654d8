# SPDX-License-Identifier: Apache-2.0
"""The formula of the memory model is what ranks of real runs hold, to 1 %."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.config.parser import Config
from megatron_bagel.costs.memory import MemoryModel, stage_layers
from tests.distributed import run_ranks
from tests.runs import open_run, resolved, run_config
from tests.training.equal_runs import CP, EP, ETP, OVERLAP, PP, SP_TP2, SPARSE, TP, VPP, cases, world_of

BF16 = {"bf16": True, "lr": 1e-4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=447)


def held(config: Config) -> tuple[int, dict[str, int]]:
    """Pipeline stage of this rank, and what it holds after a step, in the memory model's terms."""
    from megatron.core import parallel_state

    from megatron_bagel.training.optim.optimizer import gradient_buffers, leaf_optimizers
    from megatron_bagel.training.step import train_step

    run = open_run(config)
    train_step(run.trainable, next(run.loader), run.settings)
    parameters = [parameter for part in run.trained.modules.values() for parameter in part.parameters()]
    # Sharded weights are views of one buffer, padding included.
    weights = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in parameters}
    inner = [leaf.optimizer for leaf in leaf_optimizers(run.trainable.optimizer) if not getattr(leaf, "is_stub_optimizer", False)]
    mains = [main for optimizer in inner for group in optimizer.param_groups for main in group["params"]]
    state = [tensor for optimizer in inner for entry in optimizer.state.values() for tensor in entry.values() if torch.is_tensor(tensor)]
    state += [main for main in mains if main.untyped_storage().data_ptr() not in weights]
    autoencoder = run.trainable.image_encoder.autoencoder
    run.loader.close()
    return parallel_state.get_pipeline_model_parallel_rank(), {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "weight_bytes": sum(weights.values()),
        "gradient_bytes": sum(buffer.grad_data.nbytes for part in run.trainable.wrapped for buffer in gradient_buffers(part)),
        "optimizer_bytes": sum(tensor.nbytes for tensor in state),
        "average_bytes": run.trainable.ema.local_bytes(),
        "autoencoder_bytes": sum(weight.nbytes for weight in autoencoder.parameters()) if autoencoder is not None else 0,
        "host_bytes": 0,
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp4": (4, {TP: 4}),
    "pp2": (2, {PP: 2}),
    "pp4": (4, {PP: 4}),
    "uneven": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 1}),
    "pp2-vpp2-bf16": (2, {PP: 2, VPP: 2, **BF16}),
    "dp2": (2, {}),
    "dp2-whole-optimizer": (2, {"use_distributed_optimizer": False}),
    "dp2-whole-optimizer-bf16": (2, {"use_distributed_optimizer": False, **BF16}),
    "dp4-two-instances": (4, {"num_distributed_optimizer_instances": 2}),
    "cp2-dp2-bf16": (4, {CP: 2, **BF16, **OVERLAP}),
    "tp2-sp-pp2-dp2": (8, {**SP_TP2, PP: 2}),
    "tp2-dp2-freeze-und-bf16": (4, {TP: 2, "freeze_und": True, **BF16}),
    "tp2-pp2-encoders-first": (4, {TP: 2, PP: 2, "encoder_placement": "first_stage"}),
    "pp2-dp2-tied-bf16": (4, {PP: 2, "tie_word_embeddings": True, **BF16}),
    "freeze-llm-dp2": (2, {"freeze_llm": True}),
    "moe-freeze-vit": (1, {"freeze_vit": True, "layer_module": "Qwen2MoEDecoderLayer"}),
    "no-pictures-out": (1, {"visual_gen": False}),
    "experts": (1, SPARSE),
    "experts-ep2-bf16": (2, {**SPARSE, EP: 2, **BF16}),
    "experts-ep2-whole-optimizer": (2, {**SPARSE, EP: 2, "use_distributed_optimizer": False}),
    "experts-tp2-sp": (2, {**SPARSE, **SP_TP2}),
    "experts-tp2-sp-ep2-etp2-bf16": (4, {**SPARSE, **SP_TP2, EP: 2, **BF16}),
    "experts-tp2-sp-pp2-vpp2-ep2": (4, {**SPARSE, **SP_TP2, PP: 2, VPP: 2, EP: 2, ETP: 1}),
    "experts-ep2-dp4-freeze-und": (4, {**SPARSE, EP: 2, "freeze_und": True}),
    "shared-expert-tp2-sp-ep2": (2, {**SPARSE, **SP_TP2, EP: 2, ETP: 1, "moe_shared_expert_intermediate_size": 16}),
    "shared-expert-ep2": (2, {**SPARSE, EP: 2, "moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}),
}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "tp2-dp2-freeze-und-bf16", "pp2-dp2-tied-bf16"))
def test_the_formula_is_what_ranks_hold(world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    config = run_config(world, tmp_path, ranks, **{"global_batch_size": 4, **flags})
    model = MemoryModel(resolved(config, ranks).costs)
    for stage, found in run_ranks(held, ranks, config):
        expected = asdict(model.rank(stage))
        exact = {"parameters", "trained", "autoencoder_bytes"}
        assert {name: found[name] for name in exact} == {name: expected[name] for name in exact}
        assert found == pytest.approx(expected, rel=0.01)


def test_every_layer_is_on_one_stage() -> None:
    config = Config.from_values({PP: 4, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3})
    assert stage_layers(config.megatron, 12) == [1, 4, 4, 3]
    config = Config.from_values({PP: 3, "num_layers_in_last_pipeline_stage": 2})
    assert stage_layers(config.megatron, 12) == [5, 5, 2]
