"""Megatron-Core's settings under Megatron's names: how a run is spread over ranks, and in which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bagel.config.arguments import flag


@dataclass
class MegatronArguments:
    """Parallel layout, precision, memory and attention. A microbatch is one pack."""

    tensor_model_parallel_size: int = flag(1, "Ranks that split every matrix.")
    pipeline_model_parallel_size: int = flag(1, "Pipeline stages.")
    virtual_pipeline_model_parallel_size: int | None = flag(None, "Chunks of layers per stage: smaller bubble, more traffic.")
    num_layers_per_virtual_pipeline_stage: int | None = flag(None, "The same, by layers per chunk.")
    num_layers_in_first_pipeline_stage: int | None = flag(None, "Layers of the first stage, which also embeds. Default: as others.")
    num_layers_in_last_pipeline_stage: int | None = flag(None, "Layers of the last stage, which also has the heads. Default: as others.")
    context_parallel_size: int = flag(1, "Ranks that share the tokens of a pack.")
    cp_comm_type: Literal["all_gather", "a2a"] = flag("all_gather", "How context-parallel ranks exchange keys and values.")
    encoder_placement: Literal["all_ranks", "first_stage"] = flag(
        "all_ranks",
        "Ours. Who encodes images: all_ranks deals them to every rank of a replica; first_stage keeps ViT and VAE on the first "
        "(and last) stage, where each rank encodes all images of its replica.",
    )
    sequence_parallel: bool = flag(False, "Split norms and residuals over tensor-parallel ranks too: less activation memory.")
    use_distributed_optimizer: bool = flag(True, "Split optimizer state and fp32 weights over data-parallel ranks.")
    num_distributed_optimizer_instances: int | None = flag(None, "Groups of ranks; each holds the sharded optimizer state once.")
    overlap_grad_reduce: bool = flag(False, "Reduce gradients while the backward pass runs.")
    overlap_param_gather: bool = flag(False, "Gather updated weights while the next forward pass runs; needs overlap_grad_reduce.")
    make_vocab_size_divisible_by: int = flag(
        1, "Pad the vocabulary's rows to a multiple of this times the tensor-parallel size. Padding is never predicted nor exported."
    )
    micro_batch_size: int = flag(1, "Packs per microbatch; always 1. Make packs longer (max_num_tokens) instead.")
    global_batch_size: int | None = flag(None, "Packs per step. Default: data-parallel replicas times gradient_accumulation_steps.")
    rampup_batch_size: list[int] = flag(
        [], "START INCREMENT PACKS: grow the global batch from START to global_batch_size over the first PACKS packs. Default: no ramp."
    )
    bf16: bool | None = flag(None, "Train in bfloat16 with fp32 main weights. Default: True on a GPU, False on CPU.")
    recompute_granularity: Literal["full", "selective"] | None = flag(None, "full: keep only layer inputs, compute the rest again.")
    recompute_method: Literal["uniform", "block"] = flag("uniform", "uniform: all layers, in units; block: only the first ones.")
    recompute_num_layers: int = flag(1, "Layers per recomputed unit (uniform), or recomputed layers per stage (block).")
    recompute_modules: list[str] = flag([], "What granularity selective computes again: core_attn, mlp. Default: core_attn.")
    recompute_vit: bool = flag(False, "Recompute the vision tower's layers in its backward pass.")
    attention_backend: Literal["auto", "sdpa", "flex", "dense"] = flag(
        "auto", "auto: flex on CUDA (unless use_flex False is given), sdpa on CPU. dense is the slow reference, for tests."
    )
    transformer_impl: Literal["local", "transformer_engine"] = flag("local", "Decoder modules: plain torch, or Transformer Engine's.")
    dry_run: bool = flag(
        False, "Ours. Build one rank's share of a run without memory or other ranks, report its memory, packs and collectives, and leave."
    )
    fake_world_size: int | None = flag(None, "Ours. Ranks of a dry run. Default: what the launcher says.")
    fake_rank: int = flag(0, "Ours. The rank that a dry run rehearses.")
    distributed_timeout_minutes: float = flag(10.0, "A collective that waits longer ends the run.")
    manual_gc: bool = flag(
        False,
        "Collect Python's garbage in chosen steps, the same on all ranks: at the start, every manual_gc_interval steps and around "
        "evaluations. Else every rank does so whenever it has made enough objects, and the others wait.",
    )
    manual_gc_interval: int = flag(0, "With manual_gc: steps between collections; 0 collects at the start and around evaluations alone.")
