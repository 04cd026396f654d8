"""Which parallel sizes a model can be cut into: one check per axis, each naming the flag, the reason and the sizes that work."""

from __future__ import annotations

import math

from megatron_bagel.common.wording import listed
from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments


def check_parallel_sizes(megatron: MegatronArguments, llm: LLMArch) -> None:
    """Raises ValueError for the first axis whose size the decoder cannot be cut into."""
    check_tensor_parallel(megatron.tensor_model_parallel_size, llm)
    check_pipeline(megatron, llm.num_hidden_layers)
    check_context_parallel(megatron, llm)


def encoders_on_all_ranks(megatron: MegatronArguments) -> bool:
    """Whether the ranks of a replica share the encoding of its images (one rank has nobody to share with)."""
    ranks = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
    return megatron.encoder_placement == "all_ranks" and ranks > 1


def check_tensor_parallel(size: int, llm: LLMArch) -> None:
    """Every cut matrix is cut evenly; key/value heads may be fewer than ranks, which then share them."""
    if _tensor_obstacle(size, llm) is None:
        return
    fitting = [other for other in range(1, llm.num_attention_heads + 1) if _tensor_obstacle(other, llm) is None]
    raise ValueError(f"--tensor_model_parallel_size {size}: {_tensor_obstacle(size, llm)}; sizes that work: {listed(fitting)}")


def _tensor_obstacle(size: int, llm: LLMArch) -> str | None:
    groups = llm.num_key_value_heads
    for what, amount in (
        ("attention heads", llm.num_attention_heads),
        ("channels of the MLP (intermediate_size)", llm.intermediate_size),
    ):
        if amount % size:
            return f"the model's {amount} {what} cannot be divided by {size}"
    if groups % size and size % groups:
        return f"{size} is neither a divisor nor a multiple of the model's {groups} key/value heads"
    if 2 * groups * llm.head_dim % size:
        return f"the {2 * groups * llm.head_dim} key and value channels cannot be divided by {size}"
    return None


def padded_vocabulary(tokens: int, tensor_parallel: int, divisor: int = 1) -> int:
    """Rows of embedding and output layer: ``tokens``, and padding up to a multiple of ``divisor`` on every tensor-parallel rank.

    Megatron's rule (``--make_vocab_size_divisible_by``). Rows of padding stand for no token and stay zero.
    """
    multiple = tensor_parallel * divisor
    return -(-tokens // multiple) * multiple


def virtual_stages(megatron: MegatronArguments, layers: int) -> int | None:
    """Chunks per pipeline stage, from either of the two flags; None without interleaving.

    Raises ValueError when ``num_layers_per_virtual_pipeline_stage`` does not divide a stage, or the two flags disagree.
    """
    chunks, per_chunk = megatron.virtual_pipeline_model_parallel_size, megatron.num_layers_per_virtual_pipeline_stage
    if per_chunk is not None:
        stage = layers // megatron.pipeline_model_parallel_size
        if per_chunk < 1 or layers % megatron.pipeline_model_parallel_size or stage % per_chunk:
            raise ValueError(
                f"--num_layers_per_virtual_pipeline_stage {per_chunk} does not divide the {layers} layers over "
                f"{megatron.pipeline_model_parallel_size} stages; sizes that work: {listed(_divisors(max(stage, 1)))}"
            )
        if chunks is not None and chunks != stage // per_chunk:
            raise ValueError(
                f"--virtual_pipeline_model_parallel_size {chunks} and --num_layers_per_virtual_pipeline_stage {per_chunk} "
                f"({stage // per_chunk} chunks) contradict each other; give one of them"
            )
        chunks = stage // per_chunk
    return None if chunks == 1 else chunks


def check_pipeline(megatron: MegatronArguments, layers: int) -> None:
    """Every stage, and every chunk of an interleaved one, gets a whole number of layers, at least one."""
    stages, chunks = megatron.pipeline_model_parallel_size, virtual_stages(megatron, layers) or 1
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    if first is None and last is None:
        if layers % (stages * chunks):
            fitting = [size for size in _divisors(layers) if layers % (size * chunks) == 0]
            raise ValueError(
                f"--pipeline_model_parallel_size {stages}: {layers} layers cannot be dealt evenly to {stages} stages of {chunks} "
                f"chunk(s); sizes that work: {listed(fitting)}, or give --num_layers_in_first_pipeline_stage and "
                "--num_layers_in_last_pipeline_stage"
            )
        return
    given = [size for size in (first, last) if size is not None]
    between, rest = stages - len(given), layers - sum(given)
    if between < 0 or min(given) < 1 or rest < between or (between == 0 and rest) or (between and rest % between):
        raise ValueError(
            f"--num_layers_in_first_pipeline_stage {first} and --num_layers_in_last_pipeline_stage {last} leave {rest} of {layers} layers "
            f"for {between} other stages: that must be a multiple of {max(between, 1)}, at least one layer each"
        )
    sizes = [*given, *([rest // between] if between else [])]
    if any(size % chunks for size in sizes):
        raise ValueError(
            f"{chunks} chunks per stage do not divide stages of {listed(sizes, 'and')} layers; change "
            "--virtual_pipeline_model_parallel_size or the layers of the first and the last stage"
        )


def check_context_parallel(megatron: MegatronArguments, llm: LLMArch) -> None:
    """All-gather takes any size. All-to-all shares the heads of a tensor-parallel rank, so those must divide."""
    size, tensor = megatron.context_parallel_size, megatron.tensor_model_parallel_size
    if megatron.cp_comm_type != "a2a":
        return
    # Tensor-parallel ranks beyond the key/value heads hold one each.
    heads, groups = llm.num_attention_heads // tensor, max(1, llm.num_key_value_heads // tensor)
    if heads % size or groups % size:
        raise ValueError(
            f"--cp_comm_type a2a gives each of --context_parallel_size {size} ranks a share of the heads, but the {heads} heads and "
            f"{groups} key/value heads of a tensor-parallel rank cannot be divided by {size}; sizes that work: "
            f"{listed(_divisors(math.gcd(heads, groups)))}, or use --cp_comm_type all_gather, which takes any size"
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
