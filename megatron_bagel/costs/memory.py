# SPDX-License-Identifier: Apache-2.0
"""How many bytes one rank holds between steps, from sizes alone: weights, gradients, optimizer state, average, autoencoder.

docs/parallelism.md gives the formula, and tests compare it with the buffers of real runs. It does not include activations. The
shapes come from the weight map, so it needs no module and answers within milliseconds for any model and any parallel sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from math import lcm, prod

import torch

from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.config.lora import is_factor
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, padded_vocabulary, virtual_stages
from megatron_bagel.costs.freezing import TOWER_PARTS, is_frozen
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.encoders.autoencoder import AutoEncoder

FP32 = 4
#: Megatron-Core starts every tensor of a sharded gradient buffer at a multiple of this number of elements.
ALIGNMENT = 64
#: A sharded buffer (or bucket) ends at a multiple of this number and of the number of ranks that share it.
BUFFER_ALIGNMENT = 128
_TENSOR_PARALLEL_PARTS = ("linear_qkv.", "linear_proj.", "linear_fc1.", "linear_fc2.", "word_embeddings.", "output_layer.")
_CUT_FACTORS = (("linear_qkv.", "lora_B"), ("linear_fc1.", "lora_B"), ("linear_proj.", "lora_A"), ("linear_fc2.", "lora_A"))
_FIRST_STAGE = ("embedding.", "vae2llm.", "time_embedder.")
_LAST_STAGE = ("final_layernorm.", "output_layer.", "llm2vae.")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, and its numbers of parameters (``trained`` of them have gradients)."""

    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    autoencoder_bytes: int

    def __add__(self, other: RankMemory) -> RankMemory:
        return RankMemory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class _Tensor:
    """One parameter as a tensor-parallel rank holds it: ``numel`` elements, and its decoder layer (None outside the decoder)."""

    name: str
    numel: int
    layer: int | None
    frozen: bool

    @property
    def is_tower(self) -> bool:
        """Return whether it belongs to the vision tower, which tensor parallelism never shards."""
        return self.name.startswith(TOWER_PARTS)


def stage_layers(megatron: MegatronArguments, layers: int) -> list[int]:
    """Return the decoder layers of each pipeline stage over all its chunks. The sizes must have passed ``check_pipeline``."""
    stages = megatron.pipeline_model_parallel_size
    first_stage_layers, last_stage_layers = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    other_stages = stages - (first_stage_layers is not None) - (last_stage_layers is not None)
    layers_per_stage = (layers - (first_stage_layers or 0) - (last_stage_layers or 0)) // other_stages if other_stages else 0
    counts = [layers_per_stage] * stages
    if first_stage_layers is not None:
        counts[0] = first_stage_layers
    if last_stage_layers is not None:
        counts[-1] = last_stage_layers
    return counts


class MemoryModel:
    """The tensors of a model, sharded for its tensor-parallel size, by pipeline stage."""

    def __init__(self, inputs: CostInputs) -> None:
        self.megatron, self.arch, self.sizes = inputs.megatron, inputs.arch, inputs.sizes
        arch, tp, divisor = inputs.arch, inputs.megatron.tensor_model_parallel_size, inputs.megatron.make_vocab_size_divisible_by
        rows = padded_vocabulary(arch.llm.vocab_size, tp, divisor)
        # Rows that pad the vocabulary take memory like any other.
        entries = WeightMap(replace(arch, llm=replace(arch.llm, vocab_size=rows))).entries
        if inputs.frozen.lora is not None:
            entries |= AdapterMap(arch, inputs.frozen.lora).entries
        self._tensors = [
            _Tensor(
                name,
                prod(entry.shape) // (tp if _is_sharded(name) else 1),
                int(name.split(".")[2]) if name.startswith("decoder.layers.") else None,
                is_frozen(name, entries, arch.llm.tie_word_embeddings, inputs.frozen),
            )
            for name, entry in entries.items()
        ]
        self._autoencoder_bytes = _autoencoder_bytes(arch.autoencoder) if arch.autoencoder is not None else 0

    def rank(self, stage: int) -> RankMemory:
        """Return the memory of any rank of pipeline stage ``stage``; all its tensor-, context- and data-parallel ranks are alike."""
        memory = RankMemory(0, 0, 0, 0, 0, 0, 0)
        for _, buffer in self.buffers(stage):
            memory += buffer
        encodes = encoders_on_all_ranks(self.megatron) or stage in (0, self.megatron.pipeline_model_parallel_size - 1)
        return replace(memory, autoencoder_bytes=self._autoencoder_bytes if encodes else 0)

    def buffers(self, stage: int) -> list[tuple[bool, RankMemory]]:
        """Return a stage's memory by gradient buffer, each with whether it is the vision tower's.

        Weights without gradients count with the buffer of their part.
        """
        sizes, everywhere = self.sizes, encoders_on_all_ranks(self.megatron)
        replicas = sizes.data_parallel_size * self.megatron.context_parallel_size
        shards = replicas // sizes.distributed_optimizer_instances
        tower = [tensor for tensor in self._tensors if tensor.is_tower and (everywhere or stage == 0)]
        # A tower on every rank is data-parallel over the world, and its state is sharded over all ranks.
        tower_memory = [(True, self._bytes(tower, *(sizes.world_size, sizes.world_size) if everywhere else (replicas, shards)))]
        return tower_memory + [(False, self._bytes(buffer, replicas, shards)) for buffer in self._buffers(stage)]

    def norm_gradients(self, stage: int) -> int:
        """Return the elements of norm gradients that tensor-parallel ranks sum, because each saw only some tokens or heads."""
        names: tuple[str, ...] = ("q_layernorm.", "k_layernorm.")
        if self.megatron.sequence_parallel:
            names += ("input_layernorm.", "pre_mlp_layernorm.", "final_layernorm.")
        stage_tensors = (
            tensor for tensor in self._tensors if not tensor.is_tower and not tensor.frozen and self._is_on_stage(stage, tensor)
        )
        return sum(tensor.numel for tensor in stage_tensors if any(name in tensor.name for name in names))

    def embedding_gradients(self) -> int:
        """Return the elements of the token embedding's gradient on a rank, 0 if it is frozen."""
        return sum(tensor.numel for tensor in self._tensors if tensor.name.startswith("embedding.") and not tensor.frozen)

    def stages(self) -> list[RankMemory]:
        """Return the memory of a rank of every stage."""
        return [self.rank(stage) for stage in range(self.megatron.pipeline_model_parallel_size)]

    def _buffers(self, stage: int) -> list[list[_Tensor]]:
        """Return a stage's decoder tensors by gradient buffer: one per chunk, and a separate one for a tied embedding."""
        stage_tensors = [tensor for tensor in self._tensors if not tensor.is_tower and self._is_on_stage(stage, tensor)]
        chunks = virtual_stages(self.megatron, self.arch.llm.num_hidden_layers) or 1
        layers = sorted({tensor.layer for tensor in stage_tensors if tensor.layer is not None})
        chunk_of = {layer: number * chunks // len(layers) for number, layer in enumerate(layers)}
        buffers: list[list[_Tensor]] = [[] for _ in range(chunks + 1)]
        shared = self.arch.llm.tie_word_embeddings and self.megatron.pipeline_model_parallel_size > 1
        for tensor in stage_tensors:
            if shared and tensor.name.startswith("embedding."):
                buffers[-1].append(tensor)
            elif tensor.layer is not None:
                buffers[chunk_of[tensor.layer]].append(tensor)
            else:
                buffers[0 if tensor.name.startswith(_FIRST_STAGE) else chunks - 1].append(tensor)
        return buffers

    def _is_on_stage(self, stage: int, tensor: _Tensor) -> bool:
        last_stage = self.megatron.pipeline_model_parallel_size - 1
        if tensor.layer is not None:
            layer_counts = stage_layers(self.megatron, self.arch.llm.num_hidden_layers)
            # The layers are equal, so only their number per stage matters.
            return sum(layer_counts[:stage]) <= tensor.layer < sum(layer_counts[: stage + 1])
        if tensor.name.startswith(_LAST_STAGE):
            return stage == last_stage
        tied = self.arch.llm.tie_word_embeddings and tensor.name.startswith("embedding.")
        return stage == 0 or (tied and stage == last_stage)

    def _bytes(self, tensors: Sequence[_Tensor], replicas: int, shards: int) -> RankMemory:
        """Return the memory of tensors that ``replicas`` ranks hold alike, with optimizer state sharded over ``shards`` of them."""
        bf16, sharded = self.sizes.bf16, self.sizes.use_distributed_optimizer
        trained_sizes = [tensor.numel for tensor in tensors if not tensor.frozen]
        total, trained_count = sum(tensor.numel for tensor in tensors), sum(trained_sizes)
        padded = trained_count
        if sharded:
            alignment = lcm(shards, BUFFER_ALIGNMENT)
            padded = -(-sum(-(-numel // ALIGNMENT) * ALIGNMENT for numel in trained_sizes) // alignment) * alignment
        # Two moments, and a main weight if the model's weight is not fp32.
        state = (3 if bf16 else 2) * FP32
        return RankMemory(
            parameters=total,
            trained=trained_count,
            weight_bytes=(total - trained_count + padded) * (2 if bf16 else FP32),
            gradient_bytes=padded * FP32,
            # The optimizer has no state for padding.
            optimizer_bytes=trained_count * state // shards if sharded else trained_count * state,
            average_bytes=trained_count * FP32 // (shards if sharded else replicas),
            autoencoder_bytes=0,
        )


def _is_sharded(name: str) -> bool:
    if is_factor(name):
        # A column linear cuts B, a row linear cuts A.
        return any(f"{linear}{factor}" in name for linear, factor in _CUT_FACTORS)
    return not name.startswith(TOWER_PARTS) and any(part in name for part in _TENSOR_PARALLEL_PARTS)


def _autoencoder_bytes(arch: AutoencoderArch) -> int:
    """Return the bytes of the autoencoder, which is fp32 in every run."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoEncoder(arch).parameters()) * FP32
