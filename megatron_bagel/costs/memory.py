# SPDX-License-Identifier: Apache-2.0
"""How many bytes one rank holds between steps, from sizes alone: weights, gradients, optimizer state, average, autoencoder.

docs/parallelism.md gives the formula, and tests compare it with the buffers of real runs. It does not include activations. The
shapes come from the weight map, so it needs no module and answers within milliseconds for any model and any parallel sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from math import lcm

import torch

from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.rank_tensors import ROUTER, RankTensor, rank_tensors
from megatron_bagel.encoders.autoencoder import AutoEncoder

FP32 = 4
#: Megatron-Core starts every tensor of a sharded gradient buffer at a multiple of this number of elements.
ALIGNMENT = 64
#: A sharded buffer (or bucket) ends at a multiple of this number and of the number of ranks that share it.
BUFFER_ALIGNMENT = 128
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
    #: What the hybrid optimizer keeps in host memory: fp32 weights, moments, gradients and average.
    host_bytes: int = 0

    def __add__(self, other: RankMemory) -> RankMemory:
        return RankMemory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class GradientBuffer:
    """The memory of the parameters that Megatron keeps in one gradient buffer, with the frozen ones of the same part.

    Attributes:
        part: ``tower``, ``decoder``, or ``experts`` for sparse experts that ranks divide.
        memory: The memory on a rank.
        shards: The ranks that share the optimizer state, or the ranks with the same weights if it is not sharded.
    """

    part: str
    memory: RankMemory
    shards: int


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


def chunk_layers(megatron: MegatronArguments, layers: int, stage: int) -> list[list[int]]:
    """Return the numbers of the decoder layers of each chunk of a pipeline stage, counted from 0."""
    counts, chunks = stage_layers(megatron, layers), virtual_stages(megatron, layers) or 1
    if chunks == 1:
        first = sum(counts[:stage])
        return [list(range(first, first + counts[stage]))]
    size, stride = counts[stage] // chunks, layers // chunks
    return [[chunk * stride + stage * size + number for number in range(size)] for chunk in range(chunks)]


class MemoryModel:
    """The tensors of a model, sharded for its tensor-parallel size, by pipeline stage."""

    def __init__(self, inputs: CostInputs) -> None:
        self.megatron, self.arch, self.sizes = inputs.megatron, inputs.arch, inputs.sizes
        self._tensors = rank_tensors(inputs)
        self._stage_layers: dict[int, frozenset[int]] = {}
        self._autoencoder_bytes = _autoencoder_bytes(self.arch.autoencoder) if self.arch.autoencoder is not None else 0

    def rank(self, stage: int) -> RankMemory:
        """Return the memory of any rank of pipeline stage ``stage``; all its tensor-, context- and data-parallel ranks are alike."""
        memory = RankMemory(0, 0, 0, 0, 0, 0, 0)
        for buffer in self.buffers(stage):
            memory += buffer.memory
        encodes = encoders_on_all_ranks(self.megatron) or stage in (0, self.megatron.pipeline_model_parallel_size - 1)
        return replace(memory, autoencoder_bytes=self._autoencoder_bytes if encodes else 0)

    def buffers(self, stage: int) -> list[GradientBuffer]:
        """Return a stage's memory by gradient buffer. Weights without gradients count with the buffer of their part."""
        sizes, everywhere = self.sizes, encoders_on_all_ranks(self.megatron)
        replicas = sizes.data_parallel_size * self.megatron.context_parallel_size
        shards = replicas // sizes.distributed_optimizer_instances
        tower = [tensor for tensor in self._tensors if tensor.is_tower and (everywhere or stage == 0)]
        # A tower on every rank is data-parallel over the world, and its state is sharded over all ranks.
        buffers = [self._buffer("tower", tower, *(sizes.world_size, sizes.world_size) if everywhere else (replicas, shards))]
        divided = self.megatron.expert_model_parallel_size > 1
        for tensors in self._buffers(stage):
            experts = [tensor for tensor in tensors if divided and tensor.is_expert]
            others = [tensor for tensor in tensors if not (divided and tensor.is_expert)]
            buffers.append(self._buffer("decoder", others, replicas, shards))
            if experts:
                buffers.append(self._buffer("experts", experts, *[self.expert_replicas()] * 2))
        return buffers

    def expert_replicas(self) -> int:
        """Return how many ranks hold the same experts, where expert parallelism divides them."""
        megatron = self.megatron
        cut = megatron.expert_model_parallel_size * megatron.expert_tensor_size(megatron.tensor_model_parallel_size)
        return self.sizes.world_size // (megatron.pipeline_model_parallel_size * cut)

    def norm_gradients(self, stage: int) -> int:
        """Return the elements of gradients of norms and routers that tensor-parallel ranks sum: each saw only some tokens or heads."""
        names: tuple[str, ...] = ("q_layernorm.", "k_layernorm.")
        if self.megatron.sequence_parallel:
            names += ("input_layernorm.", "pre_mlp_layernorm.", "final_layernorm.", ROUTER, "shared_experts.gate_weight")
        stage_tensors = (
            tensor for tensor in self._tensors if not tensor.is_tower and not tensor.frozen and self._is_on_stage(stage, tensor)
        )
        return sum(tensor.total for tensor in stage_tensors if any(name in tensor.name for name in names))

    def embedding_gradients(self) -> int:
        """Return the elements of the token embedding's gradient on a rank, 0 if it is frozen."""
        return sum(tensor.numel for tensor in self._tensors if tensor.name.startswith("embedding.") and not tensor.frozen)

    def stages(self) -> list[RankMemory]:
        """Return the memory of a rank of every stage."""
        return [self.rank(stage) for stage in range(self.megatron.pipeline_model_parallel_size)]

    def _buffers(self, stage: int) -> list[list[RankTensor]]:
        """Return a stage's decoder tensors by gradient buffer: one per chunk, and a separate one for a tied embedding."""
        stage_tensors = [tensor for tensor in self._tensors if not tensor.is_tower and self._is_on_stage(stage, tensor)]
        layers_by_chunk = chunk_layers(self.megatron, self.arch.llm.num_hidden_layers, stage)
        chunk_of, chunks = {layer: chunk for chunk, layers in enumerate(layers_by_chunk) for layer in layers}, len(layers_by_chunk)
        buffers: list[list[RankTensor]] = [[] for _ in range(chunks + 1)]
        shared = self.arch.llm.tie_word_embeddings and self.megatron.pipeline_model_parallel_size > 1
        for tensor in stage_tensors:
            if shared and tensor.name.startswith("embedding."):
                buffers[-1].append(tensor)
            elif tensor.layer is not None:
                buffers[chunk_of[tensor.layer]].append(tensor)
            else:
                buffers[0 if tensor.name.startswith(_FIRST_STAGE) else chunks - 1].append(tensor)
        return buffers

    def _layers_of(self, stage: int) -> frozenset[int]:
        if stage not in self._stage_layers:
            chunks = chunk_layers(self.megatron, self.arch.llm.num_hidden_layers, stage)
            self._stage_layers[stage] = frozenset(layer for layers in chunks for layer in layers)
        return self._stage_layers[stage]

    def _is_on_stage(self, stage: int, tensor: RankTensor) -> bool:
        last_stage = self.megatron.pipeline_model_parallel_size - 1
        if tensor.layer is not None:
            return tensor.layer in self._layers_of(stage)
        if tensor.name.startswith(_LAST_STAGE):
            return stage == last_stage
        tied = self.arch.llm.tie_word_embeddings and tensor.name.startswith("embedding.")
        return stage == 0 or (tied and stage == last_stage)

    def _buffer(self, part: str, tensors: Sequence[RankTensor], replicas: int, shards: int) -> GradientBuffer:
        return GradientBuffer(part, self._bytes(tensors, replicas, shards), shards)

    def _bytes(self, tensors: Sequence[RankTensor], replicas: int, shards: int) -> RankMemory:
        """Return the memory of tensors that ``replicas`` ranks hold alike, with optimizer state sharded over ``shards`` of them."""
        bf16, sharded = self.sizes.bf16, self.sizes.use_distributed_optimizer
        trained = [tensor for tensor in tensors if not tensor.frozen]
        total, trained_count = sum(tensor.total for tensor in tensors), sum(tensor.total for tensor in trained)
        padded = trained_count
        if sharded:
            alignment = lcm(shards, BUFFER_ALIGNMENT)
            padded = -(-sum(-(-tensor.numel // ALIGNMENT) * ALIGNMENT * tensor.copies for tensor in trained) // alignment) * alignment
        # Two moments, and a main weight if the model's weight is not fp32.
        state = 2 * (2 if self.megatron.optimizer_state_dtype == "bf16" else FP32) + (FP32 if bf16 else 0)
        memory = RankMemory(
            parameters=total,
            trained=trained_count,
            weight_bytes=(total - trained_count + padded) * (2 if bf16 else FP32),
            gradient_bytes=padded * FP32,
            # The optimizer has no state for padding.
            optimizer_bytes=trained_count * state // shards if sharded else trained_count * state,
            average_bytes=trained_count * FP32 // (shards if sharded else replicas),
            autoencoder_bytes=0,
        )
        return self._offloaded(memory, trained_count // shards) if self.megatron.optimizer_cpu_offload else memory

    def _offloaded(self, memory: RankMemory, own_elements: int) -> RankMemory:
        """Return the memory with the offloaded share of optimizer and average on the host, and the host's copy of these gradients."""
        share = self.megatron.optimizer_offload_fraction
        optimizer, average = round(memory.optimizer_bytes * share), round(memory.average_bytes * share)
        return replace(
            memory,
            optimizer_bytes=memory.optimizer_bytes - optimizer,
            average_bytes=memory.average_bytes - average,
            host_bytes=optimizer + average + round(own_elements * share) * FP32,
        )


def _autoencoder_bytes(arch: AutoencoderArch) -> int:
    """Return the bytes of the autoencoder, which is fp32 in every run."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoEncoder(arch).parameters()) * FP32
