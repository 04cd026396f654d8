# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's settings under Megatron's names: parallel sizes, precision and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bagel.config.flag import FREE, MUST_MATCH, SAID, flag, megatron_flag
from megatron_bagel.config.moe_arguments import MoEArguments


@dataclass
class MegatronArguments(MoEArguments):
    """Flags of parallel sizes, precision, memory, attention and experts. A microbatch is one pack."""

    tensor_model_parallel_size: int = megatron_flag(1, "Ranks that split every weight matrix.", minimum=1, on_resume=FREE)
    pipeline_model_parallel_size: int = megatron_flag(1, "Pipeline stages.", minimum=1, on_resume=FREE)
    virtual_pipeline_model_parallel_size: int | None = megatron_flag(
        None, "Chunks of layers per pipeline stage. More chunks give a smaller bubble and more traffic.", minimum=1, on_resume=FREE
    )
    num_layers_per_virtual_pipeline_stage: int | None = megatron_flag(
        None, "Layers per chunk. An alternative to virtual_pipeline_model_parallel_size.", minimum=1, on_resume=FREE
    )
    num_layers_in_first_pipeline_stage: int | None = megatron_flag(
        None, "Layers of the first stage, which also embeds. Default: as many as the other stages.", minimum=1, on_resume=FREE
    )
    num_layers_in_last_pipeline_stage: int | None = megatron_flag(
        None, "Layers of the last stage, which also has the heads. Default: as many as the other stages.", minimum=1, on_resume=FREE
    )
    context_parallel_size: int = megatron_flag(1, "Ranks that share the tokens of a pack.", minimum=1, on_resume=FREE)
    cp_comm_type: Literal["all_gather", "a2a"] = megatron_flag(
        "all_gather", "How context-parallel ranks exchange keys and values.", on_resume=FREE
    )
    encoder_placement: Literal["all_ranks", "first_stage"] = flag(
        "all_ranks",
        "Which ranks encode images. all_ranks shares them among all ranks of a replica. first_stage keeps ViT and VAE on the first "
        "(and last) stage, where each rank encodes all images of its replica.",
        on_resume=FREE,
    )
    sequence_parallel: bool = megatron_flag(
        False, "Split norms and residuals over tensor-parallel ranks too. This saves activation memory.", on_resume=FREE
    )
    use_distributed_optimizer: bool = megatron_flag(
        True, "Split optimizer state and fp32 weights over data-parallel ranks.", on_resume=MUST_MATCH
    )
    one_pass_optimizer: bool = flag(
        False,
        "Update moments, weights and their average in one pass over the weights of a rank. With fp32 moments on a CPU the numbers stay the "
        "same, bit for bit. Needs use_distributed_optimizer.",
        on_resume=SAID,
    )
    optimizer_state_dtype: Literal["fp32", "bf16"] = flag(
        "fp32",
        "Type of AdamW's moments in memory. bf16 halves them; checkpoints keep fp32. Needs one_pass_optimizer, and beta2 of 0.99 or less.",
        on_resume=SAID,
    )
    num_distributed_optimizer_instances: int | None = megatron_flag(
        None,
        "Groups of data-parallel ranks. Each group holds one sharded copy of the optimizer state. Default: num_replicate.",
        minimum=1,
        on_resume=FREE,
    )
    optimizer_cpu_offload: bool = megatron_flag(
        False,
        "Keep the optimizer's fp32 weights and moments, and the average, in host memory, and update them there. For full training on few "
        "GPUs; steps take longer. Needs a GPU, bf16 and use_distributed_optimizer.",
        on_resume=FREE,
    )
    optimizer_offload_fraction: float = megatron_flag(
        1.0, "Share of the parameters whose optimizer state optimizer_cpu_offload moves to host memory.", above=0, maximum=1, on_resume=FREE
    )
    overlap_cpu_optimizer_d2h_h2d: bool = megatron_flag(
        False, "Copy gradients to host memory and weights back on streams of their own while other parameters are updated.", on_resume=FREE
    )
    overlap_grad_reduce: bool = megatron_flag(False, "Reduce gradients while the backward pass runs.", on_resume=FREE)
    overlap_param_gather: bool = megatron_flag(
        False, "Gather updated weights while the next forward pass runs. Needs overlap_grad_reduce.", on_resume=FREE
    )
    make_vocab_size_divisible_by: int = megatron_flag(
        1,
        "Pad the vocabulary to a multiple of this number times the tensor-parallel size. Padding is never predicted or exported.",
        minimum=1,
        on_resume=FREE,
    )
    micro_batch_size: int = megatron_flag(
        1, "Packs per microbatch. Only 1 is supported: raise max_num_tokens for longer packs.", on_resume=FREE
    )
    global_batch_size: int | None = megatron_flag(
        None, "Packs per step. Default: data-parallel replicas times gradient_accumulation_steps.", minimum=1, on_resume=SAID
    )
    rampup_batch_size: list[int] = megatron_flag(
        [],
        "START INCREMENT PACKS: grow the global batch from START to global_batch_size over the first PACKS packs. Default: no ramp.",
        on_resume=SAID,
    )
    bf16: bool | None = megatron_flag(
        None, "Train in bfloat16 with fp32 main weights. Default: True on a GPU, False on CPU.", on_resume=SAID
    )
    recompute_granularity: Literal["full", "selective"] | None = megatron_flag(
        None, "What the backward pass recomputes. full keeps only layer inputs; selective recomputes recompute_modules.", on_resume=FREE
    )
    recompute_method: Literal["uniform", "block"] = megatron_flag(
        "uniform",
        "Layers that full recomputation covers. uniform takes all layers, in units; block takes only the first ones.",
        on_resume=FREE,
    )
    recompute_num_layers: int = megatron_flag(
        1, "Layers per recomputed unit (uniform), or recomputed layers per stage (block).", minimum=1, on_resume=FREE
    )
    recompute_modules: list[str] = megatron_flag(
        [], "Modules that selective recomputation covers. Default: core_attn.", choices=("core_attn", "mlp"), on_resume=FREE
    )
    recompute_vit: bool = flag(False, "Recompute the vision tower's layers in the backward pass.", on_resume=FREE)
    encoder_memory: Literal["auto", "step", "constant"] = flag(
        "auto",
        "Activations of the vision tower between its two passes. step keeps those of all images of a step, so memory grows with the packs "
        "per replica. constant keeps those of encoder_chunk_tokens tokens, for one more forward pass. auto is constant where a GPU, by the "
        "formulas of the plan, has no room for step, and step elsewhere.",
        on_resume=FREE,
    )
    encoder_chunk_tokens: int = flag(
        16384,
        "ViT tokens that run through the tower together with encoder_memory constant. An image is never divided.",
        minimum=1,
        on_resume=FREE,
    )
    overlap_vae_encode: bool = flag(
        False,
        "Encode the VAE images of the next step on a second CUDA stream while the decoder works on this step. Losses stay the same. Costs "
        "the latents of one more step, the autoencoder's activations beside the decoder's, and host memory for one more step of pixels. "
        "On a CPU images are only encoded earlier.",
        on_resume=FREE,
    )
    ce_chunk_tokens: int = flag(
        0,
        "Loss tokens whose logits exist at one time. The backward pass computes them again, which saves the memory of the logits of "
        "large vocabularies and costs one more pass of the output layer. 0 keeps the logits of all loss tokens.",
        minimum=0,
        on_resume=FREE,
    )
    attention_backend: Literal["auto", "sdpa", "flex", "flex_flash", "magi", "dense"] = megatron_flag(
        "auto",
        "auto uses flex on CUDA (unless use_flex is False) and sdpa on CPU. flex_flash is flex on the kernel of FlashAttention-4 "
        "(the package flash-attn-4, Hopper or Blackwell, bf16). magi is MagiAttention's kernel (the package magi_attention, installed "
        "from its source; Hopper, bf16, heads of 64 or 128 channels). dense is a slow reference for tests.",
        on_resume=SAID,
    )
    transformer_impl: Literal["local", "transformer_engine"] = megatron_flag(
        "local", "Implementation of the decoder's modules: plain PyTorch or Transformer Engine.", on_resume=SAID
    )
    fused_kernels: Literal["eager", "compiled"] = flag(
        "eager",
        "RMSNorm, the residual addition with the norm behind it, QK-norm with rotary positions, and SwiGLU: several operations of torch "
        "each, or compiled by torch.compile to a few kernels in the first steps. Results differ by rounding. Norms of the layers stay "
        "Transformer Engine's under transformer_impl transformer_engine. compiled needs Triton on a GPU, a C++ compiler on a CPU.",
        on_resume=SAID,
    )
    fp8: Literal["hybrid", "e4m3"] | None = megatron_flag(
        None,
        "Run the linears of the decoder's layers in FP8 by Transformer Engine. hybrid has gradients in e5m2, e4m3 has none. Needs "
        "transformer_impl transformer_engine, bf16 and a GPU from Ada or Hopper on.",
        on_resume=SAID,
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = megatron_flag(
        "delayed",
        "How FP8 values are scaled: by the largest values of earlier steps, of the tensor, or of blocks (Hopper), or as MXFP8 (Blackwell).",
        on_resume=SAID,
    )
    first_last_layers_bf16: bool = megatron_flag(
        False, "Keep the first and last layers of the decoder in bf16 with fp8. Not with the recipe delayed.", on_resume=SAID
    )
    num_layers_at_start_in_bf16: int = megatron_flag(
        1, "First layers that stay in bf16 with first_last_layers_bf16.", minimum=0, on_resume=SAID
    )
    num_layers_at_end_in_bf16: int = megatron_flag(
        1, "Last layers that stay in bf16 with first_last_layers_bf16.", minimum=0, on_resume=SAID
    )
    dry_run: bool = flag(
        False,
        "Build one rank's share of a run without memory or other ranks. Report its memory, packs and collectives, then exit.",
        on_resume=FREE,
    )
    fake_world_size: int | None = flag(None, "Number of ranks in a dry run. Default: the launcher's number.", minimum=1, on_resume=FREE)
    fake_rank: int = flag(0, "Rank that a dry run builds.", minimum=0, on_resume=FREE)
    distributed_timeout_minutes: float = megatron_flag(
        10.0, "End the run when a collective takes longer than this.", above=0, on_resume=FREE
    )
    manual_gc: bool = megatron_flag(
        False,
        "Collect Python's garbage in chosen steps, the same on all ranks: at the start, every manual_gc_interval steps and around "
        "evaluations. Without it each rank collects whenever it has made enough objects, while the others wait.",
        on_resume=FREE,
    )
    manual_gc_interval: int = megatron_flag(
        0, "Steps between collections with manual_gc. 0 collects only at the start and around evaluations.", minimum=0, on_resume=FREE
    )
