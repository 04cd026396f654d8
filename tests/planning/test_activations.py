# SPDX-License-Identifier: Apache-2.0
"""Activation bytes by formula are what real passes on CPU keep for their backward pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.config.parser import Config
from megatron_bagel.planning.activations import ActivationModel, Recompute
from megatron_bagel.planning.rank_tokens import rank_tokens
from tests import magi_stand_in
from tests.distributed import run_ranks
from tests.runs import open_run, resolved, run_config
from tests.training.equal_runs import COMM, CP, EP, ETP, PP, SP_TP2, SPARSE, TP, VPP, cases, world_of

SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full"}


class Kept:
    """One tensor that autograd holds."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=447)


def kept_bytes(config: Config) -> tuple[int, Any, list[int]]:
    """Stage of this rank, the pack of its first microbatch, and the bytes of storages that its forward pass keeps, by chunk."""
    from megatron.core import parallel_state

    from megatron_bagel.model.sparse_mlp import set_global_tokens
    from megatron_bagel.training.step import microbatches

    run = open_run(config)
    for chunk in run.trainable.decoder:
        set_global_tokens(chunk, 1, 1)
    batch = next(run.loader)
    run.loader.close()
    shard = microbatches(batch.packs, run.trainable.image_encoder, run.settings)[0]
    weights = {p.untyped_storage().data_ptr() for chunk in run.trainable.decoder for p in chunk.parameters()}
    held: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        held.add(kept)
        return kept

    outputs, shape = [], (run.settings.slots(run.settings.seq_length), 1, run.arch.llm.hidden_size)
    if config.megatron.sequence_parallel:
        shape = (shape[0] // config.megatron.tensor_model_parallel_size, *shape[1:])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for chunk in run.trainable.decoder:
            if not chunk.module.pre_process:
                chunk.module.set_input_tensor(torch.zeros(shape, dtype=run.trainable.config.params_dtype, requires_grad=True))
            outputs.append(chunk(shard))
    gc.collect()
    tensors = [kept.tensor for kept in held] + list(shared_tensors())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert outputs
    found = sum(size for place, size in storages.items() if place not in weights)
    return parallel_state.get_pipeline_model_parallel_rank(), (parallel_state.get_context_parallel_rank(), batch.packs[0].pack), found


def shared_tensors() -> Iterator[torch.Tensor]:
    """Tensors of the pack's context and attention plan, which a recomputed layer needs again: no node of the graph holds them then."""
    from megatron_bagel.model.attention.sdpa import SdpaPlan
    from megatron_bagel.model.pack_context import PackContext

    for thing in gc.get_objects():
        if isinstance(thing, PackContext):
            yield from (thing.cos, thing.sin)
        elif isinstance(thing, SdpaPlan):
            yield from (*thing.masks, thing.queries, thing.keys, thing.row_of_slot)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (1, {}),
    "selective": (1, SELECTIVE),
    "full": (1, FULL),
    "selective-both": (1, {**SELECTIVE, "recompute_modules": ["core_attn", "mlp"]}),
    "units-of-two": (1, {**FULL, "recompute_num_layers": 2}),
    "block": (1, {**FULL, "recompute_method": "block", "recompute_num_layers": 1}),
    "bf16": (1, {"bf16": True}),
    "moe": (1, {"layer_module": "Qwen2MoEDecoderLayer"}),
    "chunked-cross-entropy": (1, {"ce_chunk_tokens": 16}),
    "no-qk-norm": (1, {"llm_qk_norm": False}),
    "no-qk-norm-selective": (1, {"llm_qk_norm": False, **SELECTIVE}),
    "freeze-und": (1, {"freeze_und": True}),
    "one-sample": (1, {"max_num_tokens": 192, "max_num_tokens_per_sample": 192, "expected_num_tokens": 1}),
    "tp2": (2, {TP: 2}),
    "tp4": (4, {TP: 4}),
    "tp2-sp": (2, SP_TP2),
    "tp2-sp-selective": (2, {**SP_TP2, **SELECTIVE}),
    "tp2-sp-full": (2, {**SP_TP2, **FULL}),
    "cp2": (2, {CP: 2}),
    "cp2-a2a": (2, {CP: 2, COMM: "a2a"}),
    "cp2-selective": (2, {CP: 2, **SELECTIVE}),
    "pp2": (2, {PP: 2}),
    "pp2-full": (2, {PP: 2, **FULL}),
    "pp2-vpp2-bf16": (2, {PP: 2, VPP: 2, "bf16": True}),
    "tp2-sp-pp2-cp2": (8, {**SP_TP2, PP: 2, CP: 2}),
    "experts": (1, SPARSE),
    "experts-bf16": (1, {**SPARSE, "bf16": True, "moe_router_dtype": "fp32"}),
    "experts-no-losses": (1, {**SPARSE, "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0, "moe_router_pre_softmax": True}),
    "experts-mlp-again": (1, {**SPARSE, **SELECTIVE, "recompute_modules": ["mlp"]}),
    "experts-of-one-kind": (1, {**SPARSE, "moe_kinds": ["gen"]}),
    "experts-freeze-und": (1, {**SPARSE, "freeze_und": True}),
    "experts-allgather": (2, {**SPARSE, EP: 2, "moe_token_dispatcher_type": "allgather"}),
    "experts-ep2": (2, {**SPARSE, EP: 2}),
    "experts-tp2-sp-ep2": (2, {**SPARSE, **SP_TP2, EP: 2, ETP: 1}),
    "experts-tp2-sp-etp2": (2, {**SPARSE, **SP_TP2}),
    "shared-expert": (1, {**SPARSE, "moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}),
}


#: With the stand-in for MagiAttention's kernel, which saves what the kernel saves.
MAGI_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (1, {}),
    "bf16": (1, {"bf16": True}),
    "selective": (1, SELECTIVE),
    "no-qk-norm": (1, {"llm_qk_norm": False}),
    "tp2-sp": (2, SP_TP2),
    "cp2": (2, {CP: 2}),
    "cp2-a2a": (2, {CP: 2, COMM: "a2a"}),
}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "flags"), cases(MAGI_LAYOUTS, "none", "cp2"))
def test_the_formula_of_magi(monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    magi_stand_in.install(monkeypatch)
    assert_formula(world, tmp_path, ranks, {**flags, "attention_backend": "magi"})


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "none", "selective", "full", "tp2-sp"))
def test_the_formula_is_what_passes_keep(world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    assert_formula(world, tmp_path, ranks, flags)


def assert_formula(world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    config = run_config(world, tmp_path, ranks, **{"global_batch_size": 4, **flags})
    megatron = config.megatron
    model = ActivationModel(resolved(config, ranks).costs)
    sums: list[tuple[int, int]] = []
    for stage, (place, pack), found in run_ranks(kept_bytes, ranks, config):
        tokens = rank_tokens(
            pack, place, megatron.context_parallel_size,
            config.data.max_num_tokens if megatron.pipeline_model_parallel_size > 1 else None,
            megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1,
            megatron.cp_comm_type == "a2a",
        )  # fmt: skip
        expected = model.microbatch(stage, tokens, Recompute.of(config.megatron))
        sums.append((expected, found))
    if "num_experts" in flags:
        # Which rank has the rows of which expert is not known in advance.
        sums = [(sum(expected for expected, _ in sums), sum(found for _, found in sums))]
    for expected, found in sums:
        assert expected == pytest.approx(found, rel=0.02)
