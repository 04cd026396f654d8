# SPDX-License-Identifier: Apache-2.0
"""Settings of sparse experts that cannot work are refused, each with the flag and the reason."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bagel.config.architecture import LLMArch, SparseArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.moe_rules import check_expert_flags, check_expert_sizes, check_expert_world

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"expert_model_parallel_size": 4}, "does not divide the 6 experts; sizes that work: 1, 2, 3 or 6"),
        ({"tensor_model_parallel_size": 2}, "needs --sequence_parallel"),
        ({"expert_tensor_parallel_size": 2}, "above 1"),
        ({"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 5}, "24 channels of an expert"),
        ({"transformer_impl": "transformer_engine"}, "use --transformer_impl local"),
        ({"num_distributed_optimizer_instances": 2}, "num_distributed_optimizer_instances"),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, "overlap_param_gather"),
    ],
)
def test_sizes_that_cannot_work(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_expert_sizes(MegatronArguments(**flags), LLMArch.from_hf(CONFIG))


def test_tensor_parallel_ranks_divide_a_shared_expert() -> None:
    llm = LLMArch.from_hf({**CONFIG, "shared_expert_intermediate_size": 9})
    with pytest.raises(ValueError, match="9 channels of the shared expert"):
        check_expert_sizes(MegatronArguments(tensor_model_parallel_size=2, sequence_parallel=True), llm)


def test_expert_flags_and_sizes_need_experts() -> None:
    dense = LLMArch.from_hf({name: value for name, value in CONFIG.items() if name != "num_experts"})
    with pytest.raises(ValueError, match="--moe_aux_loss_coeff needs"):
        check_expert_flags({"moe_aux_loss_coeff"}, dense)
    with pytest.raises(ValueError, match="need a decoder with sparse experts"):
        check_expert_sizes(MegatronArguments(expert_model_parallel_size=2), dense)


def test_expert_parallelism_divides_the_ranks_of_a_stage() -> None:
    check_expert_world(MegatronArguments(expert_model_parallel_size=2, pipeline_model_parallel_size=2), 4)
    with pytest.raises(ValueError, match="2 ranks of a pipeline stage; values of --expert_model_parallel_size that do: 1 or 2"):
        check_expert_world(MegatronArguments(expert_model_parallel_size=4, pipeline_model_parallel_size=2), 4)


@pytest.mark.parametrize(
    ("flags", "dense"),
    [
        ({"moe_layer_freq": [2]}, (1, 3)),
        ({"moe_layer_freq": [0, 1, 1, 0]}, (0, 3)),
        ({"moe_first_k_dense": 2}, (0, 1)),
        ({"moe_layer_freq": [1], "moe_first_k_dense": 1}, (0,)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"mlp_only_layers": [2]}, (2,)),
    ],
)
def test_dense_layers(flags: dict[str, Any], dense: tuple[int, ...]) -> None:
    llm = LLMArch.from_hf({**CONFIG, **flags})
    assert llm.sparse is not None and llm.sparse.mlp_only_layers == dense
    assert LLMArch.from_hf(llm.to_hf()) == llm


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"moe_layer_freq": [1, 0]}, "for each of the 4 layers"),
        ({"moe_layer_freq": [0, 0, 0, 0]}, "all 4 layers are dense"),
        ({"num_experts_per_tok": 7}, "more than the 6 experts"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "moe_router_pre_softmax"),
        ({"num_experts_per_tok": None}, "moe_router_topk"),
        ({"shared_expert_gate": True}, "moe_shared_expert_intermediate_size"),
    ],
)
def test_models_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LLMArch.from_hf({**CONFIG, **settings})


def test_flags_become_settings_of_the_model() -> None:
    megatron = MegatronArguments(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=16, moe_kinds=["gen"])
    llm = LLMArch.from_hf({**CONFIG, **megatron.llm_settings()})
    assert llm.sparse == SparseArch(8, 2, 16, sparse_kinds=("gen",))
