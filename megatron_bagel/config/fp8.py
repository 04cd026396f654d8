# SPDX-License-Identifier: Apache-2.0
"""The rules of FP8: which settings it needs, which GPUs can run a recipe, and which sizes its products take."""

from __future__ import annotations

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments

#: Recipe -> the first compute capability that has it, and the name of its architecture.
CAPABILITIES = {
    "delayed": ((8, 9), "Ada or Hopper"),
    "tensorwise": ((8, 9), "Ada or Hopper"),
    "blockwise": ((9, 0), "Hopper"),
    "mxfp8": ((10, 0), "Blackwell"),
}
#: The sides of a product's matrices are multiples of this number.
SIDE_MULTIPLE = 16


def check_fp8_settings(megatron: MegatronArguments, has_gpu: bool) -> None:
    """Check what FP8 needs besides a GPU that has it. Raises ValueError with the flag and the reason."""
    if megatron.fp8 is None:
        if megatron.first_last_layers_bf16:
            raise ValueError("--first_last_layers_bf16 needs --fp8: without it every layer is in one precision")
        return
    if not has_gpu:
        raise ValueError(f"--fp8 {megatron.fp8} needs a GPU: there are no FP8 products on a CPU; leave it out")
    if megatron.transformer_impl != "transformer_engine":
        raise ValueError(f"--fp8 {megatron.fp8} needs --transformer_impl transformer_engine, whose linears have FP8 products")
    if megatron.bf16 is False:
        raise ValueError(f"--fp8 {megatron.fp8} needs --bf16: the weights and everything but the products stay in bf16")
    if megatron.first_last_layers_bf16 and megatron.fp8_recipe == "delayed":
        raise ValueError(
            "--first_last_layers_bf16 does not work with --fp8_recipe delayed, whose scales come from one history of all layers; "
            "use tensorwise, blockwise or mxfp8"
        )
    if "mlp" in megatron.recompute_modules:
        raise ValueError("--fp8 does not work with --recompute_modules mlp, which would update the scales twice; use full recomputation")


def check_fp8_sizes(megatron: MegatronArguments, llm: LLMArch) -> None:
    """Check that the matrices of the decoder's linears have sides that FP8 products take, divided over tensor-parallel ranks."""
    if megatron.fp8 is None:
        return
    if llm.sparse is not None:
        raise ValueError(f"--fp8 {megatron.fp8} does not cover sparse experts, whose tokens per expert are not padded; leave --fp8 out")
    ranks = megatron.tensor_model_parallel_size
    sides = {
        "hidden size": llm.hidden_size,
        "MLP width": llm.intermediate_size / ranks,
        "queries": llm.num_attention_heads * llm.head_dim / ranks,
    }
    for name, side in sides.items():
        if side % SIDE_MULTIPLE:
            raise ValueError(
                f"--fp8 {megatron.fp8}: the {name} of a rank, {side:g}, is no multiple of {SIDE_MULTIPLE}, which FP8 products need; leave "
                "--fp8 out or change --tensor_model_parallel_size"
            )


def check_fp8_gpu(megatron: MegatronArguments, capability: tuple[int, int] | None, device: str) -> None:
    """Check that a GPU can run the recipe. ``capability`` is None without a GPU, in a dry run."""
    if megatron.fp8 is None or capability is None:
        return
    needed, architecture = CAPABILITIES[megatron.fp8_recipe]
    if capability < needed:
        raise ValueError(
            f"--fp8_recipe {megatron.fp8_recipe} needs a GPU from {architecture} on (compute capability {needed[0]}.{needed[1]}); {device} "
            f"has {capability[0]}.{capability[1]}. Choose another recipe, or leave --fp8 out"
        )
