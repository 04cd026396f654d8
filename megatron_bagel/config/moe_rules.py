# SPDX-License-Identifier: Apache-2.0
"""The settings of sparse experts that do not fit together, each refused with the reason and what to change."""

from __future__ import annotations

from collections.abc import Set

from megatron_bagel.common.wording import listed
from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments

#: Flags that mean something only with experts, besides those of the model.
_EXPERT_FLAGS = (
    "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq", "moe_first_k_dense", "moe_kinds", "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_dtype", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "moe_expert_capacity_factor", "moe_token_drop_policy", "moe_token_dispatcher_type", "moe_grouped_gemm", "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)  # fmt: skip


def check_expert_flags(given: Set[str], llm: LLMArch) -> None:
    """Refuse flags of experts for a decoder that has none."""
    names = [name for name in _EXPERT_FLAGS if name in given]
    if llm.sparse is None and names:
        raise ValueError(
            f"--{names[0]} needs a decoder with sparse experts: give --num_experts, or an --llm_path whose config.json has them"
        )


def check_expert_sizes(megatron: MegatronArguments, llm: LLMArch, training: bool = True) -> None:
    """Check the sizes of expert parallelism against the decoder.

    Args:
        megatron: Parallel sizes.
        llm: The decoder.
        training: Whether the ranks train; generation has fewer limits.

    Raises:
        ValueError: for the first size or combination that cannot work.
    """
    tensor, expert = megatron.tensor_model_parallel_size, megatron.expert_model_parallel_size
    sparse, expert_tensor = llm.sparse, megatron.expert_tensor_size(tensor)
    if sparse is None:
        if expert > 1 or expert_tensor != tensor:
            raise ValueError(
                "--expert_model_parallel_size and --expert_tensor_parallel_size need a decoder with sparse experts (--num_experts)"
            )
        return
    if sparse.num_experts % expert:
        sizes = [size for size in range(1, sparse.num_experts + 1) if sparse.num_experts % size == 0]
        raise ValueError(
            f"--expert_model_parallel_size {expert} does not divide the {sparse.num_experts} experts; sizes that work: {listed(sizes)}"
        )
    if sparse.moe_intermediate_size % expert_tensor:
        raise ValueError(
            f"--expert_tensor_parallel_size {expert_tensor} does not divide the {sparse.moe_intermediate_size} channels of an expert "
            "(--moe_ffn_hidden_size); use a size that does, such as 1"
        )
    if expert == 1 and expert_tensor != tensor:
        raise ValueError(
            f"--expert_tensor_parallel_size {expert_tensor} with --tensor_model_parallel_size {tensor} needs --expert_model_parallel_size "
            "above 1: Megatron-Core keeps experts that are not divided in the gradient buffers of the other weights, which are split "
            f"{tensor} ways"
        )
    shared = sparse.shared_expert_intermediate_size
    if shared is not None and shared % tensor:
        raise ValueError(
            f"--tensor_model_parallel_size {tensor} does not divide the {shared} channels of the shared expert "
            "(--moe_shared_expert_intermediate_size)"
        )
    if training:
        _check_training(megatron, llm)


def _check_training(megatron: MegatronArguments, llm: LLMArch) -> None:
    tensor = megatron.tensor_model_parallel_size
    if tensor > 1 and not megatron.sequence_parallel:
        raise ValueError(
            f"--tensor_model_parallel_size {tensor} with sparse experts needs --sequence_parallel True: without it every tensor-parallel "
            "rank would route the same tokens"
        )
    if megatron.transformer_impl == "transformer_engine":
        raise ValueError("--transformer_impl transformer_engine has no sparse experts here; use --transformer_impl local")
    if (megatron.num_distributed_optimizer_instances or 1) > 1:
        raise ValueError(
            "--num_distributed_optimizer_instances above 1 is not supported with sparse experts; leave it and num_replicate out"
        )
    if megatron.use_distributed_optimizer and megatron.overlap_param_gather:
        raise ValueError("--overlap_param_gather is not supported with sparse experts; --overlap_grad_reduce alone is")


def check_expert_world(megatron: MegatronArguments, world_size: int) -> None:
    """Check that expert parallelism divides the ranks of a pipeline stage. Raises ValueError with the sizes that work."""
    stage_ranks = world_size // megatron.pipeline_model_parallel_size
    expert, expert_tensor = megatron.expert_model_parallel_size, megatron.expert_tensor_size(megatron.tensor_model_parallel_size)
    if stage_ranks % (expert * expert_tensor):
        sizes = [size for size in range(1, stage_ranks // expert_tensor + 1) if stage_ranks % (size * expert_tensor) == 0]
        raise ValueError(
            f"--expert_model_parallel_size {expert} x --expert_tensor_parallel_size {expert_tensor} does not divide the {stage_ranks} "
            f"ranks of a pipeline stage; values of --expert_model_parallel_size that do: {listed(sizes) if sizes else 'none'}"
        )
