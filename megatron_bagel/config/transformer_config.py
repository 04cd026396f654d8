# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's TransformerConfig for a decoder: the one place that translates settings of a run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import virtual_stages


def transformer_config(
    arch: LLMArch, megatron: MegatronArguments | None = None, bf16: bool = False, on_cpu: bool = True, **overrides: Any
) -> TransformerConfig:
    """Return Megatron-Core's settings of a decoder.

    ``calculate_per_token_loss`` is on: losses are already divided by exact global token counts, so Megatron must sum gradients,
    not average them.

    Args:
        arch: Shape of the decoder.
        megatron: Parallel sizes and recomputation. The default is one rank.
        bf16: Whether weights are bfloat16; otherwise they are fp32.
        on_cpu: Whether weights are initialised on the host.
        **overrides: Fields of TransformerConfig that win over all of these.
    """
    megatron = megatron or MegatronArguments()
    dtype = torch.bfloat16 if bf16 else torch.float32
    settings: dict[str, Any] = {
        **_shape(arch),
        **_parallel(megatron, arch.num_hidden_layers),
        **_pipeline_traffic(megatron, arch.num_hidden_layers),
        **_recompute(megatron),
        **_experts(arch, megatron),
        **_fp8(megatron),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": bf16,
        "calculate_per_token_loss": True,
        "use_cpu_initialization": on_cpu,
        "init_method_std": arch.initializer_range,
        # Fusions are CUDA extensions, or reorder arithmetic that is compared between parallel sizes.
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**{**settings, **overrides})


def _shape(arch: LLMArch) -> dict[str, Any]:
    return {
        "num_layers": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.attention_bias,
        # Only Megatron's gradient sums read this: QK-norm weights see only a tensor-parallel rank's own heads.
        "qk_layernorm": arch.qk_norm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.rms_norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _parallel(megatron: MegatronArguments, layers: int) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": megatron.tensor_model_parallel_size,
        "pipeline_model_parallel_size": megatron.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_stages(megatron, layers),
        "num_layers_in_first_pipeline_stage": megatron.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": megatron.num_layers_in_last_pipeline_stage,
        "context_parallel_size": megatron.context_parallel_size,
        "sequence_parallel": megatron.sequence_parallel,
    }


def _pipeline_traffic(megatron: MegatronArguments, layers: int) -> dict[str, Any]:
    """Return the settings of communication between stages.

    Sent activations are never freed early: Megatron-Core 0.16 does so before gloo has sent them. Interleaved stages always overlap
    their traffic: without overlap Megatron-Core trains two stages wrong, silently. The host never waits for the device after a batch of
    sends and receives: Megatron-Core does so by default because of an error of torch versions before those supported here.
    """
    interleaved = virtual_stages(megatron, layers) is not None
    return {
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": False,
    }


def _recompute(megatron: MegatronArguments) -> dict[str, Any]:
    if megatron.recompute_granularity is None:
        return {}
    if megatron.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": megatron.recompute_modules or ["core_attn"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": megatron.recompute_method,
        "recompute_num_layers": megatron.recompute_num_layers,
    }


def _experts(arch: LLMArch, megatron: MegatronArguments) -> dict[str, Any]:
    """Return the settings of sparse experts. The spec decides which layers have them, so Megatron's frequency of layers stays 1."""
    sparse = arch.sparse
    if sparse is None:
        return {}
    balanced = megatron.moe_aux_loss_coeff > 0
    return {
        "num_moe_experts": sparse.num_experts,
        "moe_router_topk": sparse.num_experts_per_tok,
        "moe_ffn_hidden_size": sparse.moe_intermediate_size,
        "moe_router_pre_softmax": not sparse.norm_topk_prob,
        "moe_shared_expert_intermediate_size": sparse.shared_expert_intermediate_size,
        "moe_shared_expert_gate": sparse.shared_expert_gate,
        "moe_router_dtype": megatron.moe_router_dtype,
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        "moe_aux_loss_coeff": megatron.moe_aux_loss_coeff,
        "moe_z_loss_coeff": megatron.moe_z_loss_coeff or None,
        "moe_expert_capacity_factor": megatron.moe_expert_capacity_factor,
        "moe_token_drop_policy": megatron.moe_token_drop_policy,
        "moe_token_dispatcher_type": megatron.moe_token_dispatcher_type,
        "moe_grouped_gemm": megatron.moe_grouped_gemm,
        "expert_model_parallel_size": megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": megatron.expert_tensor_size(megatron.tensor_model_parallel_size),
    }


def _fp8(megatron: MegatronArguments) -> dict[str, Any]:
    if megatron.fp8 is None:
        return {}
    return {
        "fp8": megatron.fp8,
        "fp8_recipe": megatron.fp8_recipe,
        "first_last_layers_bf16": megatron.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": megatron.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": megatron.num_layers_at_end_in_bf16,
    }
