"""How many bytes one rank holds between steps, from sizes alone: weights, gradients, optimizer state, average, autoencoder.

The formula is that of docs/parallelism.md; tests hold it against the buffers of real runs. Activations are not part of it. The shapes
come from the weight map, so that no module is built and any layout of any model is answered in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from math import lcm, prod

import torch

from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, padded_vocabulary, virtual_stages
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import ResolvedRun
from megatron_bagel.costs.freezing import TOWER_PARTS, is_frozen
from megatron_bagel.encoders.autoencoder import AutoEncoder

FP32 = 4
#: Megatron-Core begins every tensor of a sharded gradient buffer at a multiple of so many elements.
ALIGNMENT = 64
#: A sharded buffer (or bucket) ends at a multiple of this and of the ranks that share it.
BUFFER_ALIGNMENT = 128
_CUT_BY_TENSOR_PARALLEL = ("linear_qkv.", "linear_proj.", "linear_fc1.", "linear_fc2.", "word_embeddings.", "output_layer.")
_FIRST_STAGE = ("embedding.", "vae2llm.", "time_embedder.")
_LAST_STAGE = ("final_layernorm.", "output_layer.", "llm2vae.")


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, and its numbers of parameters (``trained`` of which have gradients)."""

    parameters: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    autoencoder_bytes: int

    def __add__(self, other: RankMemory) -> RankMemory:
        return RankMemory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total_bytes(self) -> int:
        """Everything but activations."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes + self.autoencoder_bytes


@dataclass(frozen=True)
class _Tensor:
    """One parameter as a tensor-parallel rank holds it: ``numel`` elements, ``layer`` of the decoder (None outside of it)."""

    name: str
    numel: int
    layer: int | None
    frozen: bool

    @property
    def is_tower(self) -> bool:
        """Of the vision tower, which is never cut."""
        return self.name.startswith(TOWER_PARTS)


def stage_layers(megatron: MegatronArguments, layers: int) -> list[int]:
    """Decoder layers of each pipeline stage, all its chunks together. The sizes must have passed ``check_pipeline``."""
    stages = megatron.pipeline_model_parallel_size
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    between = stages - (first is not None) - (last is not None)
    each = (layers - (first or 0) - (last or 0)) // between if between else 0
    counts = [each] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


class MemoryModel:
    """Tensors of a model cut for the tensor-parallel size of ``config``, asked for by pipeline stage."""

    def __init__(self, config: Config, arch: BagelArch, layout: ResolvedRun) -> None:
        """``layout`` is what ``resolve`` made of ``config``; the sizes must have passed ``validate_architecture``."""
        self.megatron, self.arch, self.layout = config.megatron, arch, layout
        training = config.training
        tp, divisor = config.megatron.tensor_model_parallel_size, config.megatron.make_vocab_size_divisible_by
        rows = padded_vocabulary(arch.llm.vocab_size, tp, divisor)
        # Rows that pad the vocabulary are held like any other.
        entries = WeightMap(replace(arch, llm=replace(arch.llm, vocab_size=rows))).entries
        self._tensors = [
            _Tensor(
                name,
                prod(entry.shape) // (tp if _is_cut(name) else 1),
                int(name.split(".")[2]) if name.startswith("decoder.layers.") else None,
                is_frozen(name, entries, arch.llm.tie_word_embeddings, training.freeze_llm, training.freeze_vit, training.freeze_und),
            )
            for name, entry in entries.items()
        ]
        self._autoencoder_bytes = _autoencoder_bytes(arch.autoencoder) if arch.autoencoder is not None else 0

    def rank(self, stage: int) -> RankMemory:
        """Memory of a rank of pipeline stage ``stage``; all tensor-, context- and data-parallel ranks of a stage are alike."""
        held = RankMemory(0, 0, 0, 0, 0, 0, 0)
        for _, buffer in self.buffers(stage):
            held += buffer
        encodes = encoders_on_all_ranks(self.megatron) or stage in (0, self.megatron.pipeline_model_parallel_size - 1)
        return replace(held, autoencoder_bytes=self._autoencoder_bytes if encodes else 0)

    def buffers(self, stage: int) -> list[tuple[bool, RankMemory]]:
        """The same by gradient buffer, and whether it is the vision tower's; weights without gradients are in the buffer of their part."""
        layout, everywhere = self.layout, encoders_on_all_ranks(self.megatron)
        replicas = layout.data_parallel_size * self.megatron.context_parallel_size
        shards = replicas // layout.distributed_optimizer_instances
        tower = [tensor for tensor in self._tensors if tensor.is_tower and (everywhere or stage == 0)]
        # A tower on every rank is data-parallel over the world, its state sharded once.
        found = [(True, self._bytes(tower, *(layout.world_size, layout.world_size) if everywhere else (replicas, shards)))]
        return found + [(False, self._bytes(buffer, replicas, shards)) for buffer in self._buffers(stage)]

    def norm_gradients(self, stage: int) -> int:
        """Elements of the gradients that tensor-parallel ranks sum besides: norms, each of which saw some of the tokens or heads."""
        names = ("q_layernorm.", "k_layernorm.")
        if self.megatron.sequence_parallel:
            names += ("input_layernorm.", "pre_mlp_layernorm.", "final_layernorm.")
        held = (tensor for tensor in self._tensors if not tensor.is_tower and not tensor.frozen and self._holds(stage, tensor))
        return sum(tensor.numel for tensor in held if any(name in tensor.name for name in names))

    def embedding_gradients(self) -> int:
        """Elements of the token embedding's gradient on a rank, 0 when it is frozen."""
        return sum(tensor.numel for tensor in self._tensors if tensor.name.startswith("embedding.") and not tensor.frozen)

    def stages(self) -> list[RankMemory]:
        """Memory of a rank of every stage."""
        return [self.rank(stage) for stage in range(self.megatron.pipeline_model_parallel_size)]

    def _buffers(self, stage: int) -> list[list[_Tensor]]:
        """Tensors of the decoder on a stage by gradient buffer: one per chunk, and a tied embedding apart."""
        held = [tensor for tensor in self._tensors if not tensor.is_tower and self._holds(stage, tensor)]
        chunks, layers = virtual_stages(self.megatron, self.arch.llm.num_hidden_layers) or 1, sorted({t.layer for t in held} - {None})
        chunk_of = {layer: number * chunks // len(layers) for number, layer in enumerate(layers)}
        buffers: list[list[_Tensor]] = [[] for _ in range(chunks + 1)]
        shared = self.arch.llm.tie_word_embeddings and self.megatron.pipeline_model_parallel_size > 1
        for tensor in held:
            if shared and tensor.name.startswith("embedding."):
                buffers[-1].append(tensor)
            elif tensor.layer is not None:
                buffers[chunk_of[tensor.layer]].append(tensor)
            else:
                buffers[0 if tensor.name.startswith(_FIRST_STAGE) else chunks - 1].append(tensor)
        return buffers

    def _holds(self, stage: int, tensor: _Tensor) -> bool:
        last = self.megatron.pipeline_model_parallel_size - 1
        if tensor.layer is not None:
            before = stage_layers(self.megatron, self.arch.llm.num_hidden_layers)
            # Which of the equal layers a stage has makes no difference, how many does.
            return sum(before[:stage]) <= tensor.layer < sum(before[: stage + 1])
        if tensor.name.startswith(_LAST_STAGE):
            return stage == last
        tied = self.arch.llm.tie_word_embeddings and tensor.name.startswith("embedding.")
        return stage == 0 or (tied and stage == last)

    def _bytes(self, held: Sequence[_Tensor], replicas: int, shards: int) -> RankMemory:
        """Of tensors that ``replicas`` ranks hold alike, with optimizer state sharded over ``shards`` of them."""
        bf16, sharded = self.layout.bf16, self.layout.use_distributed_optimizer
        trained = [tensor.numel for tensor in held if not tensor.frozen]
        total, training = sum(tensor.numel for tensor in held), sum(trained)
        padded = training
        if sharded:
            end = lcm(shards, BUFFER_ALIGNMENT)
            padded = -(-sum(-(-numel // ALIGNMENT) * ALIGNMENT for numel in trained) // end) * end
        # Two moments, and a main weight where the model's own is not fp32.
        state = (3 if bf16 else 2) * FP32
        return RankMemory(
            parameters=total,
            trained=training,
            weight_bytes=(total - training + padded) * (2 if bf16 else FP32),
            gradient_bytes=padded * FP32,
            # A rank's share of what is real; padding has no state.
            optimizer_bytes=training * state // shards if sharded else training * state,
            average_bytes=training * FP32 // (shards if sharded else replicas),
            autoencoder_bytes=0,
        )


def _is_cut(name: str) -> bool:
    return not name.startswith(TOWER_PARTS) and any(part in name for part in _CUT_BY_TENSOR_PARALLEL)


def _autoencoder_bytes(arch: AutoencoderArch) -> int:
    """Encoder and decoder, which are fp32 whatever the run's precision."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoEncoder(arch).parameters()) * FP32
