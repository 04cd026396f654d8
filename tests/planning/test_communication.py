# SPDX-License-Identifier: Apache-2.0
"""The collectives of a step by formula are those that a real step issues: kinds, group sizes, bytes and counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.config.parser import Config
from megatron_bagel.planning.communication import CommunicationModel
from megatron_bagel.planning.rank_tokens import rank_tokens
from tests.distributed import run_ranks
from tests.planning.recorded import Recorder
from tests.runs import open_run, resolved, run_config
from tests.training.equal_runs import COMM, CP, EP, ETP, OVERLAP, PP, SP_TP2, SPARSE, TP, VPP, cases, world_of

#: Sums of a few numbers are left out.
FEW = 1024


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=447)


def issued(config: Config) -> tuple[int, int, list[Any], Counter]:
    """Stage and context-parallel place of this rank, its packs, and the calls of its second step."""
    from megatron.core import parallel_state

    from megatron_bagel.training.step import train_step

    run = open_run(config)
    train_step(run.trainable, next(run.loader), run.settings)
    batch = next(run.loader)
    with Recorder() as recorder:
        train_step(run.trainable, batch, run.settings)
    run.loader.close()
    place = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return *place, [loaded.pack for loaded in batch.packs], recorder.calls


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2-overlap-bf16": (2, {**OVERLAP, "bf16": True}),
    "dp2-whole-optimizer": (2, {"use_distributed_optimizer": False}),
    "dp4-two-instances": (4, {"num_distributed_optimizer_instances": 2}),
    "tp2": (2, {TP: 2}),
    "tp4": (4, {TP: 4}),
    "tp2-sp": (2, SP_TP2),
    "tp2-sp-full": (2, {**SP_TP2, "recompute_granularity": "full"}),
    "pp2": (2, {PP: 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "pp2-tied": (2, {PP: 2, "tie_word_embeddings": True}),
    "cp2": (2, {CP: 2}),
    "cp2-selective": (2, {CP: 2, "recompute_granularity": "selective"}),
    "cp2-a2a": (2, {CP: 2, COMM: "a2a"}),
    "first-stage": (4, {TP: 2, PP: 2, "encoder_placement": "first_stage"}),
    "tp2-chunked-cross-entropy": (2, {TP: 2, "ce_chunk_tokens": 16}),
    "tp2-sp-pp2-cp2": (8, {**SP_TP2, PP: 2, CP: 2}),
    "experts-ep2": (2, {**SPARSE, EP: 2}),
    "experts-ep2-full": (2, {**SPARSE, EP: 2, "recompute_granularity": "full"}),
    "experts-ep2-mlp-again": (2, {**SPARSE, EP: 2, "recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    "experts-ep2-dp4": (4, {**SPARSE, EP: 2}),
    "experts-tp2-sp-ep2": (2, {**SPARSE, **SP_TP2, EP: 2, ETP: 1}),
    "experts-of-one-kind-tp2-sp-ep2": (2, {**SPARSE, "moe_kinds": ["gen"], **SP_TP2, EP: 2, ETP: 1}),
    "experts-pp2-vpp2-ep2": (4, {**SPARSE, PP: 2, VPP: 2, EP: 2}),
}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "dp2", "tp2-sp"))
def test_the_formula_is_what_a_step_issues(world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    config = run_config(world, tmp_path, ranks, **{"global_batch_size": 4, **flags})
    megatron = config.megatron
    model = CommunicationModel(resolved(config, ranks).costs)
    exchanged: list[Counter] = [Counter(), Counter()]
    for stage, place, packs, calls in run_ranks(issued, ranks, config):
        tokens = [
            rank_tokens(
                pack, place, megatron.context_parallel_size,
                config.data.max_num_tokens if megatron.pipeline_model_parallel_size > 1 else None,
                megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1,
                megatron.cp_comm_type == "a2a",
            )
            for pack in packs
        ]  # fmt: skip
        expected: Counter = Counter()
        for call in model.rank(stage, tokens):
            if call.axis == "encoders":
                # Which rank encodes which image is another matter: only what a replica's ranks send together is known.
                exchanged[0][call.ranks] += call.size
            elif call.axis == "expert" and call.kind == "all_to_all":
                # So it is with tokens, which go to the experts that routers choose.
                exchanged[0][call.ranks] += call.size * call.count
            elif call.size >= FEW:
                expected[call.kind, 2 if call.kind == "send" else call.ranks, call.size] += call.count
        found = Counter({key: count for key, count in calls.items() if key[2] >= FEW})
        replica = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
        exchanges = {key for key in found if key[0] == "all_to_all" and (megatron.cp_comm_type != "a2a" or found[key] < 4)}
        for key in exchanges:
            exchanged[1][replica] += key[2] * found.pop(key)
        assert found and found == expected
    assert exchanged[0].total() == pytest.approx(exchanged[1].total(), rel=0.05)
