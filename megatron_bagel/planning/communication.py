# SPDX-License-Identifier: Apache-2.0
"""Lists the collectives that a rank issues in one training step, with their sizes, from the parallel sizes and the packs alone.

The list follows the code that issues them: ``model/experts.py`` (tensor and sequence parallel), ``model/attention/context_parallel.py``,
``encoders/sharded_image_encoding.py``, and Megatron-Core's schedules, gradient buffers and optimizer. A test records what a real step
issues. About a dozen sums of a few numbers per step (loss counts, norms, losses) are not in the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.memory import MemoryModel
from megatron_bagel.planning.activations import FP32, ActivationModel, Recompute
from megatron_bagel.planning.collective import Collective
from megatron_bagel.planning.expert_communication import ExpertCommunication
from megatron_bagel.planning.rank_tokens import RankTokens
from megatron_bagel.planning.routed_rows import dense_kinds

#: Elements of a bucket of overlapped gradient reduction (Megatron-Core's DistributedDataParallel).
SMALLEST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000


class CommunicationModel:
    """Lists the collectives of the ranks of a run."""

    def __init__(self, inputs: CostInputs, memory: MemoryModel | None = None) -> None:
        self.megatron, self.arch, self.sizes = inputs.megatron, inputs.arch, inputs.sizes
        self.activations = ActivationModel(inputs)
        self.memory = memory or MemoryModel(inputs)
        self.recompute, self.width = Recompute.of(inputs.megatron), self.activations.bytes
        self.tp, self.pp, self.cp = (
            self.megatron.tensor_model_parallel_size, self.megatron.pipeline_model_parallel_size, self.megatron.context_parallel_size,
        )  # fmt: skip
        self.stride = inputs.sizes.world_size // self.pp
        self.experts = ExpertCommunication(inputs, self.recompute)

    def rank(self, stage: int, packs: Sequence[RankTokens]) -> list[Collective]:
        """Return the collectives of a rank of ``stage`` whose replica trains on ``packs`` in a step. Equal calls are counted together."""
        counts: dict[Collective, int] = {}
        for call in self._calls(stage, packs):
            if call.ranks > 1 and call.size and call.count:
                uncounted = replace(call, count=0)
                counts[uncounted] = counts.get(uncounted, 0) + call.count
        return [replace(call, count=count) for call, count in counts.items()]

    def _calls(self, stage: int, packs: Sequence[RankTokens]) -> Iterator[Collective]:
        # The packs of a plan are one object.
        for _, same_packs in groupby(packs, key=id):
            tokens, *others = same_packs
            for call in self._pack_calls(stage, tokens):
                yield replace(call, count=call.count * (1 + len(others)))
        yield from self._gradients(stage)
        yield from self._encoders(stage, packs)

    def _pack_calls(self, stage: int, tokens: RankTokens) -> Iterator[Collective]:
        yield from self._tensor(stage, tokens)
        yield from self._context(stage, tokens)
        yield from self.experts.calls(self._stage_layers(stage), self._repeated_layers(stage), tokens)
        yield from self._pipeline(stage, tokens)

    def _tensor(self, stage: int, tokens: RankTokens) -> Iterator[Collective]:
        """Yield the collectives of tensor parallelism for one pack."""
        layers, recomputed_layers = self._layers(stage)
        hidden, width = self.arch.llm.hidden_size, self.width
        size, first, last = tokens.slots * hidden * width, stage == 0, stage == self.pp - 1

        def call(payload: str, kind: str, size: int, count: int) -> Collective:
            return Collective("tensor", payload, kind, self.tp, size, count, self.tp)

        if self.megatron.sequence_parallel:
            # Each layer has two of each per pass, or one if its MLPs are sparse. The head gathers once, and the first stage gathers
            # once in its backward pass.
            passes = self._exchanges(stage)
            yield call("hidden states", "all_gather", size, passes + last + first)
            yield call("hidden states", "reduce_scatter", size, passes)
        else:
            yield call("hidden states", "all_reduce", size, 2 * (2 * layers + recomputed_layers))
        if first:
            yield call("token embeddings", "all_reduce", tokens.text * hidden * width, 1)
        if last:
            yield call("gradient of the head's input", "all_reduce", tokens.ce * hidden * width, 1)
            if self.megatron.ce_chunk_tokens:
                yield call("cross entropy, maxima", "all_reduce", tokens.ce * FP32, 1)
                yield call("cross entropy", "all_reduce", 2 * tokens.ce * FP32, 1)
            else:
                yield call("cross entropy", "all_reduce", tokens.ce * FP32, 3)
        sharing = max(1, self.tp // self.arch.llm.num_key_value_heads)
        if sharing > 1:
            # Columns of a key/value head's group, per expert, forward and backward.
            columns = self.activations.heads_per_group * sharing + 2
            for rows in (tokens.und, tokens.gen):
                shared_size = rows * columns * self.arch.llm.head_dim * width
                yield Collective(
                    "tensor", "shared key/value heads", "all_gather", sharing, shared_size, layers + recomputed_layers, sharing
                )
                yield Collective("tensor", "shared key/value heads", "reduce_scatter", sharing, shared_size, layers, sharing)

    def _context(self, stage: int, tokens: RankTokens) -> Iterator[Collective]:
        """Yield the collectives of context parallelism for one pack."""
        layers, recomputed_layers = self._layers(stage)
        if "core_attn" in self.recompute.modules:
            recomputed_layers = layers
        rows, groups, head = -(-tokens.pack_tokens // self.cp), self.activations.groups, self.arch.llm.head_dim * self.width

        def call(payload: str, kind: str, size: int, count: int) -> Collective:
            return Collective("context", payload, kind, self.cp, size, count, self.tp * self.cp)

        if self.megatron.cp_comm_type == "a2a":
            for payload, heads in (("queries, keys and values", self.activations.heads + 2 * groups), ("results", self.activations.heads)):
                yield call(payload, "all_to_all", rows * heads * head, 2 * layers + recomputed_layers)
            return
        size = self.cp * rows * 2 * groups * head
        yield call("keys and values", "all_gather", size, layers + recomputed_layers)
        yield call("gradients of keys and values", "reduce_scatter", size, layers)

    def _pipeline(self, stage: int, tokens: RankTokens) -> Iterator[Collective]:
        """Yield what a stage sends to its neighbours for one pack."""
        chunks = virtual_stages(self.megatron, self.arch.llm.num_hidden_layers) or 1
        # Hidden states go to the next stage, from the last one to the next chunk of the first. Gradients take the opposite way.
        forward = chunks - (stage == self.pp - 1)
        backward = chunks - (stage == 0)
        if self.pp > 1:
            size = self.activations.hidden_bytes(tokens)
            yield Collective("pipeline", "hidden states and their gradients", "send", self.pp, size, forward + backward, 2 * self.stride)

    def _gradients(self, stage: int) -> Iterator[Collective]:
        """Yield the collectives after the passes: reductions of gradients, and the gather of updated weights."""
        sizes, on_all_ranks = self.sizes, encoders_on_all_ranks(self.megatron)
        replica_span = self.tp * self.cp * sizes.data_parallel_size
        buffers = self.memory.buffers(stage)
        divided = any(buffer.part == "experts" and buffer.memory.trained for buffer in buffers)
        for buffer in buffers:
            is_world_tower = buffer.part == "tower" and on_all_ranks
            span = sizes.world_size if is_world_tower else replica_span
            ranks, gradient_bytes = buffer.shards, buffer.memory.gradient_bytes
            buckets = self._buckets(gradient_bytes // FP32, ranks)
            elements = gradient_bytes // FP32 // buckets
            name = " of experts" if buffer.part == "experts" else ""
            if not sizes.use_distributed_optimizer:
                yield Collective("data", f"gradients{name}", "all_reduce", ranks, elements * FP32, buckets, span)
                continue
            yield Collective("data", f"gradients{name}", "reduce_scatter", ranks, elements * FP32, buckets, span)
            # Divided experts have an optimizer of their own, and after its step each optimizer gathers every buffer of its modules.
            has_own_optimizer = buffer.part == "tower" and on_all_ranks and sizes.world_size > sizes.data_parallel_size
            gathers = 2 if divided and not has_own_optimizer else 1
            yield Collective("data", f"weights{name}", "all_gather", ranks, elements * self.width, gathers * buckets, span)
            if sizes.distributed_optimizer_instances > 1 and not is_world_tower:
                instances = sizes.distributed_optimizer_instances
                yield Collective("data", "gradients between instances", "all_reduce", instances, elements * FP32 // ranks, buckets, span)
        yield Collective(
            "tensor", "gradients of norms", "all_reduce", self.tp, self.memory.norm_gradients(stage) * FP32, 1, self.tp
        )  # fmt: skip
        if self.arch.llm.tie_word_embeddings and self.pp > 1 and stage in (0, self.pp - 1):
            size = self.memory.embedding_gradients() * FP32
            yield Collective("pipeline", "gradient of the tied embedding", "all_reduce", 2, size, 1, self.sizes.world_size)

    def _buckets(self, elements: int, ranks: int) -> int:
        """Return the number of buckets that a gradient buffer is reduced in, by Megatron's rule for overlapped reduction.

        The number is exact to one or two, because a bucket ends at the end of a parameter.
        """
        if not self.megatron.overlap_grad_reduce:
            return 1
        return max(1, round(elements / max(SMALLEST_BUCKET, BUCKET_PER_RANK * ranks)))

    def _encoders(self, stage: int, packs: Sequence[RankTokens]) -> Iterator[Collective]:
        """Yield what an average rank of the replica sends; nothing if the first and the last stage encode all images themselves."""
        if not encoders_on_all_ranks(self.megatron):
            return
        ranks = self.tp * self.pp * self.cp
        tokens = {kind: sum(image.tokens for pack in packs for image in pack.images if image.kind == kind) for kind in ("vit", "vae")}
        first, ends = self.tp * self.cp, self.tp * self.cp * min(2, self.pp)
        span = self.sizes.world_size if self.pp > 1 else ranks

        def call(payload: str, size: float) -> Collective:
            return Collective("encoders", payload, "all_to_all", ranks, round(size), 1, span)

        if self.arch.vit is not None:
            rows = tokens["vit"] * self.arch.llm.hidden_size * self.width
            yield call("ViT features", rows * first / ranks)
            # Tensor-parallel ranks have equal gradients, so the first of them sends all and the others none.
            yield call("gradients of ViT features", rows / self.tp if stage == 0 else 0)
        if self.arch.autoencoder is not None:
            yield call("latents", tokens["vae"] * self.arch.latent_token_dim * FP32 * ends / ranks)

    def _exchanges(self, stage: int) -> int:
        """Return how often layers of a stage gather hidden states, and scatter them, for one pack: around attention and dense MLPs."""
        layers, again = self._stage_layers(stage), self._repeated_layers(stage)
        if self.arch.llm.sparse is None:
            return 2 * (2 * len(layers) + len(again))
        exchanges = 2 * len(layers) + len(again)
        exchanges += sum(2 + (layer in again) for layer in layers if dense_kinds(self.arch.llm, layer))
        if "mlp" in self.recompute.modules:
            # A dense MLP beside a sparse one is recomputed with its exchange.
            exchanges += sum(self.arch.llm.is_sparse(layer) and bool(dense_kinds(self.arch.llm, layer)) for layer in layers)
        return exchanges

    def _stage_layers(self, stage: int) -> list[int]:
        return [layer for layers in self.activations.chunks(stage) for layer in layers]

    def _repeated_layers(self, stage: int) -> frozenset[int]:
        """Return the layers of a stage that have a second forward pass."""
        return frozenset(
            layer
            for layers in self.activations.chunks(stage)
            for layer in layers[: len(layers) - self.recompute.saving_layers(len(layers))]
        )

    def _layers(self, stage: int) -> tuple[int, int]:
        """Return the layers of a stage, and how many of them have a second forward pass."""
        return len(self._stage_layers(stage)), len(self._repeated_layers(stage))


def sent_by_axis(calls: Sequence[Collective]) -> dict[str, float]:
    """Return the bytes that a rank sends per step, by axis."""
    total: dict[str, float] = dict.fromkeys(("tensor", "context", "expert", "pipeline", "data", "encoders"), 0.0)
    for call in calls:
        total[call.axis] += call.sent
    return total
