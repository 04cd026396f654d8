# SPDX-License-Identifier: Apache-2.0
"""The parallel sizes that fit a model: one check per axis, each naming the flag, the reason and the sizes that work."""

from __future__ import annotations

import math

from megatron_bagel.common.wording import listed
from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments


def check_parallel_sizes(megatron: MegatronArguments, llm: LLMArch) -> None:
    """Check the size of every axis. Raises ValueError for the first one that does not fit the decoder."""
    check_tensor_parallel(megatron.tensor_model_parallel_size, llm)
    check_pipeline(megatron, llm.num_hidden_layers)
    check_context_parallel(megatron, llm)


def encoders_on_all_ranks(megatron: MegatronArguments) -> bool:
    """Return whether the ranks of a replica share the encoding of its images. A replica of one rank does not."""
    ranks = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
    return megatron.encoder_placement == "all_ranks" and ranks > 1


def check_tensor_parallel(size: int, llm: LLMArch) -> None:
    """Check that tensor parallelism cuts every matrix evenly. Ranks may outnumber key/value heads, and then share them."""
    obstacle = _tensor_obstacle(size, llm)
    if obstacle is None:
        return
    working_sizes = [candidate for candidate in range(1, llm.num_attention_heads + 1) if _tensor_obstacle(candidate, llm) is None]
    raise ValueError(f"--tensor_model_parallel_size {size}: {obstacle}; sizes that work: {listed(working_sizes)}")


def _tensor_obstacle(size: int, llm: LLMArch) -> str | None:
    groups = llm.num_key_value_heads
    for dimension, width in (
        ("attention heads", llm.num_attention_heads),
        ("channels of the MLP (intermediate_size)", llm.intermediate_size),
    ):
        if width % size:
            return f"the model's {width} {dimension} cannot be divided by {size}"
    if groups % size and size % groups:
        return f"{size} is neither a divisor nor a multiple of the model's {groups} key/value heads"
    if 2 * groups * llm.head_dim % size:
        return f"the {2 * groups * llm.head_dim} key and value channels cannot be divided by {size}"
    return None


def padded_vocabulary(tokens: int, tensor_parallel: int, divisor: int = 1) -> int:
    """Return the rows of embedding and output layer: ``tokens``, padded to a multiple of ``divisor`` on every tensor-parallel rank.

    The rule is Megatron's (``--make_vocab_size_divisible_by``). Rows of padding stand for no token and stay zero.
    """
    multiple = tensor_parallel * divisor
    return -(-tokens // multiple) * multiple


def virtual_stages(megatron: MegatronArguments, layers: int) -> int | None:
    """Return the chunks per pipeline stage, from either of the two flags, or None without interleaving.

    Raises:
        ValueError: if ``num_layers_per_virtual_pipeline_stage`` does not divide a stage, or the two flags disagree.
    """
    chunks, chunk_layers = megatron.virtual_pipeline_model_parallel_size, megatron.num_layers_per_virtual_pipeline_stage
    if chunk_layers is not None:
        stage_layers = layers // megatron.pipeline_model_parallel_size
        if chunk_layers < 1 or layers % megatron.pipeline_model_parallel_size or stage_layers % chunk_layers:
            raise ValueError(
                f"--num_layers_per_virtual_pipeline_stage {chunk_layers} does not divide the {layers} layers over "
                f"{megatron.pipeline_model_parallel_size} stages; sizes that work: {listed(divisors(max(stage_layers, 1)))}"
            )
        if chunks is not None and chunks != stage_layers // chunk_layers:
            raise ValueError(
                f"--virtual_pipeline_model_parallel_size {chunks} and --num_layers_per_virtual_pipeline_stage {chunk_layers} "
                f"({stage_layers // chunk_layers} chunks) contradict each other; give one of them"
            )
        chunks = stage_layers // chunk_layers
    return None if chunks == 1 else chunks


def check_pipeline(megatron: MegatronArguments, layers: int) -> None:
    """Check that every stage, and every chunk of an interleaved stage, gets a whole number of layers and at least one."""
    stages, chunks = megatron.pipeline_model_parallel_size, virtual_stages(megatron, layers) or 1
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    if first is None and last is None:
        if layers % (stages * chunks):
            working_sizes = [size for size in divisors(layers) if layers % (size * chunks) == 0]
            raise ValueError(
                f"--pipeline_model_parallel_size {stages}: {layers} layers cannot be divided evenly among {stages} stages of {chunks} "
                f"chunk(s); sizes that work: {listed(working_sizes)}, or give --num_layers_in_first_pipeline_stage and "
                "--num_layers_in_last_pipeline_stage"
            )
        return
    end_sizes = [size for size in (first, last) if size is not None]
    inner_stages, inner_layers = stages - len(end_sizes), layers - sum(end_sizes)
    too_few = inner_stages < 0 or min(end_sizes) < 1 or inner_layers < inner_stages
    if too_few or (inner_layers % inner_stages if inner_stages else inner_layers):
        raise ValueError(
            f"--num_layers_in_first_pipeline_stage {first} and --num_layers_in_last_pipeline_stage {last} leave {inner_layers} of {layers} "
            f"layers for {inner_stages} other stages: that must be a multiple of {max(inner_stages, 1)}, at least one layer each"
        )
    sizes = [*end_sizes, *([inner_layers // inner_stages] if inner_stages else [])]
    if any(size % chunks for size in sizes):
        raise ValueError(
            f"{chunks} chunks per stage do not divide stages of {listed(sizes, 'and')} layers; change "
            "--virtual_pipeline_model_parallel_size or the layers of the first and the last stage"
        )


def check_context_parallel(megatron: MegatronArguments, llm: LLMArch) -> None:
    """Check that all-to-all divides the heads of a tensor-parallel rank evenly. All-gather works with any size."""
    size, tensor = megatron.context_parallel_size, megatron.tensor_model_parallel_size
    if megatron.cp_comm_type != "a2a":
        return
    # Tensor-parallel ranks beyond the key/value heads hold one each.
    heads, groups = llm.num_attention_heads // tensor, max(1, llm.num_key_value_heads // tensor)
    if heads % size or groups % size:
        raise ValueError(
            f"--cp_comm_type a2a gives each of --context_parallel_size {size} ranks a share of the heads, but the {heads} heads and "
            f"{groups} key/value heads of a tensor-parallel rank cannot be divided by {size}; sizes that work: "
            f"{listed(divisors(math.gcd(heads, groups)))}, or use --cp_comm_type all_gather, which takes any size"
        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]
