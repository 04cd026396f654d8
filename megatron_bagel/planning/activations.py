# SPDX-License-Identifier: Apache-2.0
"""Activation memory by formula: the tensors that autograd saves on a rank for one microbatch between its two passes.

The terms follow the ``local`` modules (``model/layer.py``, ``model/fused.py``, ``model/attention/sdpa.py``) line by line. A test counts
the tensors that real passes save. Views of one storage count once. Letters: n tokens, S slots (n and padding), h hidden size, f MLP
width, t tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import padded_vocabulary
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.memory import chunk_layers
from megatron_bagel.planning.rank_tokens import RankTokens
from megatron_bagel.planning.routed_rows import dense_kinds, routed_rows
from megatron_bagel.planning.sparse_activations import sparse_mlp_bytes

FP32, INT64 = 4, 8
TIMESTEP_FREQUENCIES = 256


@dataclass(frozen=True)
class Recompute:
    """The recomputation of a run. ``layers`` is the size of a unit of ``uniform``, or the number of first layers of ``block``."""

    granularity: str | None = None
    method: str = "uniform"
    layers: int = 1
    modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, megatron: MegatronArguments) -> Recompute:
        """Return the recomputation of the settings."""
        modules = tuple(megatron.recompute_modules or ["core_attn"]) if megatron.recompute_granularity == "selective" else ()
        return cls(megatron.recompute_granularity, megatron.recompute_method, megatron.recompute_num_layers, modules)

    def saved_inputs(self, layers: int) -> int:
        """Return how many layer inputs a chunk of ``layers`` layers saves in place of everything else."""
        if self.granularity != "full":
            return 0
        return -(-layers // self.layers) if self.method == "uniform" else min(self.layers, layers)

    def saving_layers(self, layers: int) -> int:
        """Return how many layers of a chunk save everything (or everything except selected modules)."""
        if self.granularity != "full":
            return layers
        return 0 if self.method == "uniform" else max(0, layers - self.layers)

    def recomputed_layers(self, layers: int) -> int:
        """Return how many layers of a chunk have recomputed activations at the same time in the backward pass."""
        if self.granularity != "full":
            return 0
        if self.method == "uniform":
            return min(self.layers, layers)
        # The first layers are recomputed last, when the activations of later layers are free again.
        return 0 if self.saving_layers(layers) else 1


def modes(layers: int) -> dict[str, Recompute]:
    """Return the modes that a plan compares on chunks of ``layers`` layers, by name. "block" recomputes half of them."""
    return {
        "none": Recompute(),
        "selective": Recompute("selective", modules=("core_attn",)),
        "selective, MLPs too": Recompute("selective", modules=("core_attn", "mlp")),
        "block, half": Recompute("full", "block", max(1, layers // 2)),
        "full": Recompute("full", "uniform"),
    }


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one decoder layer saves.

    If core attention is recomputed, ``core_inputs`` replaces ``core``; if MLPs are, ``mlp_inputs`` replaces ``mlp``. The inputs of dense
    MLPs are part of ``projections``.
    """

    hidden: int
    projections: int
    core: int
    core_inputs: int
    mlp: int
    mlp_inputs: int = 0

    def saved_bytes(self, modules: tuple[str, ...]) -> int:
        """Return the bytes that the layer saves if ``modules`` are recomputed."""
        core = self.core_inputs if "core_attn" in modules else self.core
        return self.hidden + self.projections + core + (self.mlp_inputs if "mlp" in modules else self.mlp)


class ActivationModel:
    """Computes the activation bytes of the pipeline stages of a run."""

    def __init__(self, inputs: CostInputs) -> None:
        """Read the sizes. Raises ValueError for the reference backend ``dense``, whose matrices no run should have."""
        self.megatron, self.arch, self.freeze_und = inputs.megatron, inputs.arch, inputs.frozen.und
        self.lora = inputs.frozen.lora
        self._chunks: dict[int, list[list[int]]] = {}
        self.backend, self.bytes = inputs.sizes.attention_backend, 2 if inputs.sizes.bf16 else FP32
        if self.backend == "dense":
            raise ValueError("--attention_backend dense is a reference for tests and has no plan; use sdpa or flex")
        llm, tp = inputs.arch.llm, inputs.megatron.tensor_model_parallel_size
        self.tp = tp
        self.groups = max(1, llm.num_key_value_heads // tp)
        self.heads_per_group = llm.num_attention_heads // (llm.num_key_value_heads * max(1, tp // llm.num_key_value_heads))
        self.heads, self.ffn = self.groups * self.heads_per_group, llm.intermediate_size // tp

    def rows(self, tokens: RankTokens) -> int:
        """Return the slots of the hidden states between layers."""
        return tokens.slots // self.tp if self.megatron.sequence_parallel else tokens.slots

    def hidden_bytes(self, tokens: RankTokens) -> int:
        """Return the bytes of one tensor of hidden states, which stages send and full recomputation saves."""
        return self.rows(tokens) * self.arch.llm.hidden_size * self.bytes

    def layer(self, tokens: RankTokens, number: int = 0) -> LayerActivations:
        """Return the bytes that a decoder layer saves. Layers are counted from 0 and differ by which MLPs are sparse."""
        llm, width = self.arch.llm, self.bytes
        n, h, d = tokens.num_tokens, llm.hidden_size, llm.head_dim
        trained = tokens.gen if self.freeze_und else n
        normed_rows = min(n, self.rows(tokens))
        # With tensor parallelism the rows of both experts are gathered into one tensor first.
        expert_inputs = (trained if self.tp == 1 else tokens.slots) * h * width
        mixed = n * self.groups * (self.heads_per_group + 2) * d * width
        norm_statistics = FP32 * n * self.groups * (self.heads_per_group + 1) if llm.qk_norm else 0
        core, inputs = self._core(tokens, 0 if llm.qk_norm else mixed)
        is_sparse = llm.is_sparse(number)
        return LayerActivations(
            # Inputs of the two norms, and their statistics.
            hidden=2 * (self.hidden_bytes(tokens) + FP32 * normed_rows),
            # Inputs of QKV and of a dense MLP, QKV's result (read by QK-norm) with statistics, input of the output projection.
            projections=(1 if is_sparse else 2) * expert_inputs
            + (mixed if llm.qk_norm else 0)
            + norm_statistics
            + n * self.heads * d * width
            + self._adapters(tokens, "qkv", "proj"),
            core=core,
            core_inputs=inputs,
            mlp=self._sparse_mlps(tokens, number) if is_sparse else 3 * trained * self.ffn * width + self._adapters(tokens, "fc1", "fc2"),
            mlp_inputs=normed_rows * h * width if is_sparse else 0,
        )

    def _sparse_mlps(self, tokens: RankTokens, layer: int) -> int:
        """Return the bytes that the MLPs of a layer save of which at least one is sparse, inputs included."""
        llm, counts = self.arch.llm, {"und": tokens.und, "gen": tokens.gen}
        size = 0
        for routed in routed_rows(llm, self.megatron, tokens, layer):
            if not (self.freeze_und and routed.kind == "und"):
                size += sparse_mlp_bytes(llm, self.megatron, routed, self.bytes)
        for kind in dense_kinds(llm, layer):
            if not (self.freeze_und and kind == "und"):
                inputs = counts[kind] if self.tp == 1 else tokens.slots
                size += (inputs * llm.hidden_size + 3 * counts[kind] * self.ffn) * self.bytes
        return size

    def mlp_gradient(self, tokens: RankTokens) -> int:
        """Return the bytes of the largest temporary gradient inside an MLP."""
        llm = self.arch.llm
        sizes = [2 * self.ffn * tokens.num_tokens] if llm.sparse is None else []
        for layer in range(llm.num_hidden_layers if llm.sparse is not None else 0):
            if dense_kinds(llm, layer):
                sizes.append(2 * self.ffn * tokens.num_tokens)
            # The gradient of all rows that the experts work on, and inside them that of one expert's.
            for routed in routed_rows(llm, self.megatron, tokens, layer):
                width = 2 * routed.expert_width(llm) // routed.experts
                sizes.append(routed.received * (llm.hidden_size + width))
        return max(sizes) * self.bytes

    def _adapters(self, tokens: RankTokens, *targets: str) -> int:
        """Return the bytes that the adapters of a layer's ``targets`` save: results of A, and B spread over the parts of a fused linear."""
        if self.lora is None:
            return 0
        fused_rows = {"qkv": (self.heads + 2 * self.groups) * self.arch.llm.head_dim, "fc1": 2 * self.ffn}
        parts, rows = {"qkv": 3, "fc1": 2}, {"und": tokens.num_tokens - tokens.gen, "gen": tokens.gen}
        elements = 0
        for expert, target in ((expert, target) for expert in rows for target in targets if self.lora.adapts_linear(expert, target)):
            elements += (rows[expert] + fused_rows.get(target, 0)) * parts.get(target, 1) * self.lora.rank
        return elements * self.bytes

    def _core(self, tokens: RankTokens, mixed: int) -> tuple[int, int]:
        """Return the bytes of core attention (without its result, the input of the output projection), and of its inputs alone.

        ``mixed`` is the size of QKV's result if nothing else saves it: values are a view of it.
        """
        d, width, n = self.arch.llm.head_dim, self.bytes, tokens.num_tokens
        row, kv_row = self.heads * d * width, self.groups * d * width
        # Queries are sliced from the rotated queries and keys, which copies them unless there is one group.
        inputs = n * (row + kv_row) + (n * row if self.groups > 1 else 0) + mixed
        if self.backend in ("flex", "flex_flash"):
            statistics = FP32 * n * self.heads
            gathered = tokens.keys * 2 * kv_row if self.megatron.context_parallel_size > 1 else 0
            # flex saves its result in [heads, tokens] order, in addition to the copy that the projection reads.
            return inputs + statistics + gathered + n * row, inputs
        if self.backend == "magi":
            return self._magi(tokens, inputs), inputs
        return self._sdpa(tokens, inputs, mixed), inputs

    def _magi(self, tokens: RankTokens, inputs: int) -> int:
        """Return the bytes of core attention with MagiAttention's kernel. The projection reads its result itself."""
        width, n, d = self.bytes, tokens.num_tokens, self.arch.llm.head_dim
        statistics = FP32 * n * self.heads
        if self.megatron.context_parallel_size == 1:
            return inputs + statistics
        row, kv_row = self.heads * d * width, self.groups * d * width
        if self.megatron.cp_comm_type == "a2a":
            # Queries, keys and values of all tokens for a share of the heads arrive in one tensor, and the result is sent back.
            return n * (2 * row + 2 * kv_row) + statistics
        # Keys and values of all ranks replace the rank's own. Queries are a view of the rotated queries and keys if there is one group.
        return n * (row if self.groups > 1 else row + kv_row) + statistics + tokens.keys * 2 * kv_row

    def _sdpa(self, tokens: RankTokens, inputs: int, mixed: int) -> int:
        """Return the bytes of core attention with SDPA."""
        d, cp = self.arch.llm.head_dim, self.megatron.context_parallel_size
        share = cp if self.megatron.cp_comm_type == "a2a" else 1
        row, kv_row = self.heads * d * self.bytes // share, self.groups * d * self.bytes // share
        queries = sum(count * num_queries for count, num_queries, _ in tokens.documents)
        keys = sum(count * num_keys for count, _, num_keys in tokens.documents)
        result = queries * (row + FP32 * self.heads // share)
        repeated = self.heads_per_group > 1
        if not self._in_place(tokens):
            return queries * row + 2 * keys * (row if repeated else kv_row) + result
        # Queries are not copied, and the projection reads the result itself.
        statistics = result - queries * row
        if not repeated:
            return inputs + statistics
        return (queries * row if self.groups > 1 else inputs - mixed) + 2 * keys * row + statistics

    def shared(self, tokens: RankTokens) -> int:
        """Return the bytes that all layers of a pass share: rotary angles and, for SDPA, masks."""
        # Cosines and sines; in fp32 half of each table is a view of the full table.
        angles = 2 * tokens.slots * self.arch.llm.head_dim * (FP32 if self.bytes == FP32 else self.bytes // 2)
        if self.backend in ("flex", "flex_flash"):
            # Four tables with one number for each block of 128 x 128.
            return angles + 4 * 4 * (-(-tokens.num_tokens // 128)) * (-(-tokens.keys // 128))
        if self.backend == "magi":
            # A few rectangles for each image and text: kilobytes.
            return angles
        masks = sum(count * num_queries * num_keys for count, num_queries, num_keys in tokens.documents) * self.bytes
        indices = 0 if self._in_place(tokens) else INT64 * (2 * sum(c * q for c, q, _ in tokens.documents) + tokens.num_tokens)
        return angles + masks + indices

    def _in_place(self, tokens: RankTokens) -> bool:
        """Return whether SDPA reads its inputs without a copy, because the pack is one document on one context-parallel rank."""
        return self.megatron.context_parallel_size == 1 and len(tokens.documents) == 1 and tokens.documents[0][0] == 1

    def embedding(self, tokens: RankTokens) -> int:
        """Return the bytes that the first stage saves before its first layer: token ids, latents, timesteps."""
        # With sequence parallelism a rank's slots are a view of those of the whole pack.
        pack_rows = (tokens.slots - self.rows(tokens)) * self.arch.llm.hidden_size * self.bytes
        ids = INT64 * (tokens.text + tokens.vit) + pack_rows
        if self.arch.autoencoder is None:
            return ids
        h, width = self.arch.llm.hidden_size, self.bytes
        timestep_bytes = tokens.timesteps * (TIMESTEP_FREQUENCIES + 2 * h) * width + INT64 * tokens.gen
        return ids + tokens.gen * self.arch.latent_token_dim * width + timestep_bytes

    def head(self, tokens: RankTokens) -> int:
        """Return the bytes that the last stage saves after its last layer: norm, head inputs, log probabilities, velocity errors."""
        llm, width = self.arch.llm, self.bytes
        vocabulary = padded_vocabulary(llm.vocab_size, self.tp, self.megatron.make_vocab_size_divisible_by) // self.tp
        norm = self.hidden_bytes(tokens) + FP32 * min(tokens.num_tokens, self.rows(tokens))
        # The chunked cross entropy saves one number for each token in place of log probabilities.
        saved_numbers = 1 if self.megatron.ce_chunk_tokens else vocabulary
        text = tokens.ce * (llm.hidden_size * width + saved_numbers * FP32 + 2 * INT64)
        pictures = 0
        if self.arch.autoencoder is not None:
            pictures = tokens.mse * (llm.hidden_size * width + self.arch.latent_token_dim * FP32 + INT64)
        return norm + text + pictures

    def microbatch(self, stage: int, tokens: RankTokens, recompute: Recompute) -> int:
        """Return the bytes that one microbatch saves on a stage, in all its chunks."""
        saved_bytes = 0
        for layers in self.chunks(stage):
            saved_bytes += recompute.saved_inputs(len(layers)) * self.hidden_bytes(tokens)
            saving_layers = layers[len(layers) - recompute.saving_layers(len(layers)) :]
            saved_bytes += sum(count * layer.saved_bytes(recompute.modules) for layer, count in self._layers(tokens, saving_layers))
        last = self.megatron.pipeline_model_parallel_size - 1
        ends = (self.embedding(tokens) if stage == 0 else 0) + (self.head(tokens) if stage == last else 0)
        return saved_bytes + self.shared(tokens) + ends

    def working_set(self, stage: int, tokens: RankTokens, recompute: Recompute) -> int:
        """Return the bytes of what is recomputed at one time in the backward pass: a unit of layers, or one core attention or MLP."""
        chunks = self.chunks(stage)
        layers = [layer for layer, _ in self._layers(tokens, [number for chunk in chunks for number in chunk])]
        recomputed_bytes = recompute.recomputed_layers(max(map(len, chunks))) * max(layer.saved_bytes(()) for layer in layers)
        if "core_attn" in recompute.modules:
            recomputed_bytes = max(recomputed_bytes, *(layer.core for layer in layers))
        if "mlp" in recompute.modules:
            recomputed_bytes = max(recomputed_bytes, *(layer.mlp for layer in layers))
        return recomputed_bytes

    def _layers(self, tokens: RankTokens, numbers: Sequence[int]) -> list[tuple[LayerActivations, int]]:
        """Return the layers with these numbers, and how many of them are alike."""
        if self.arch.llm.sparse is None:
            return [(self.layer(tokens), len(numbers))]
        alike: dict[tuple[str, ...], list[int]] = {}
        for number in numbers:
            alike.setdefault(tuple(dense_kinds(self.arch.llm, number)), []).append(number)
        return [(self.layer(tokens, group[0]), len(group)) for group in alike.values()]

    def in_flight(self, stage: int, microbatches: int) -> float:
        """Return how many microbatches have activations at the same time in Megatron's schedules, in units of all chunks of the stage."""
        stages, chunks = self.megatron.pipeline_model_parallel_size, len(self.chunks(stage))
        if stages == 1:
            return 1
        if chunks == 1:
            return min(microbatches, stages - stage)
        warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
        return min(microbatches * chunks, warm_up) / chunks

    def chunks(self, stage: int) -> list[list[int]]:
        """Return the numbers of the layers of each chunk of a stage."""
        if stage not in self._chunks:
            self._chunks[stage] = chunk_layers(self.megatron, self.arch.llm.num_hidden_layers, stage)
        return self._chunks[stage]


def parts(activations: LayerActivations) -> dict[str, int]:
    """Return the terms by name."""
    return {field.name: getattr(activations, field.name) for field in fields(activations)}
