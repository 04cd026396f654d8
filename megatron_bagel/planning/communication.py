"""Every collective that a rank issues in one training step, with its size: per axis, from the layout and the packs alone.

The list follows the code that issues them: model/experts.py (tensor and sequence parallel), model/attention/context_parallel.py,
encoders/sharded_image_encoding.py, Megatron-Core's schedules, gradient buffers and optimizer. A test records what a real step issues.
The dozen sums of a few numbers per step (loss counts, norms, losses) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.costs.memory import MemoryModel, stage_layers
from megatron_bagel.planning.activations import FP32, ActivationModel, Recompute
from megatron_bagel.planning.rank_tokens import RankTokens

#: Elements of a bucket of overlapped gradient reduction (Megatron-Core's DistributedDataParallel).
SMALLEST_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Collective:
    """``count`` calls of ``kind`` in a group of ``ranks``; ``size`` bytes each: of the whole tensor for all_reduce, all_gather and
    reduce_scatter, of what a rank sends for all_to_all and send. ``span`` is how far apart in the world the group's ends lie."""

    axis: str
    what: str
    kind: str
    ranks: int
    size: int
    count: int
    span: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in all calls together, by the ring algorithms."""
        share = {"all_reduce": 2.0 * (self.ranks - 1) / self.ranks, "send": 1.0, "all_to_all": 1.0}
        return self.count * self.size * share.get(self.kind, (self.ranks - 1) / self.ranks)


class CommunicationModel:
    """Collectives of the ranks of a layout."""

    def __init__(self, inputs: CostInputs, memory: MemoryModel | None = None) -> None:
        self.megatron, self.arch, self.sizes = inputs.megatron, inputs.arch, inputs.sizes
        self.activations = ActivationModel(inputs)
        self.memory = memory or MemoryModel(inputs)
        self.recompute, self.width = Recompute.of(inputs.megatron), self.activations.bytes
        self.tp, self.pp, self.cp = (
            self.megatron.tensor_model_parallel_size, self.megatron.pipeline_model_parallel_size, self.megatron.context_parallel_size,
        )  # fmt: skip
        self.stride = inputs.sizes.world_size // self.pp

    def rank(self, stage: int, packs: Sequence[RankTokens]) -> list[Collective]:
        """Of a rank of ``stage`` whose replica trains on ``packs`` in a step; equal calls are counted together."""
        counts: dict[Collective, int] = {}
        for call in self._calls(stage, packs):
            if call.ranks > 1 and call.size and call.count:
                alike = replace(call, count=0)
                counts[alike] = counts.get(alike, 0) + call.count
        return [replace(call, count=count) for call, count in counts.items()]

    def _calls(self, stage: int, packs: Sequence[RankTokens]) -> Iterator[Collective]:
        for tokens in packs:
            yield from self._tensor(stage, tokens)
            yield from self._context(stage, tokens)
            yield from self._pipeline(stage, tokens)
        yield from self._gradients(stage)
        yield from self._encoders(stage, packs)

    def _tensor(self, stage: int, tokens: RankTokens) -> Iterator[Collective]:
        layers, again = self._layers(stage)
        hidden, width = self.arch.llm.hidden_size, self.width
        whole, first, last = tokens.slots * hidden * width, stage == 0, stage == self.pp - 1

        def call(what: str, kind: str, size: int, count: int) -> Collective:
            return Collective("tensor", what, kind, self.tp, size, count, self.tp)

        if self.megatron.sequence_parallel:
            # Two of each per layer and pass; the head gathers once, and the first stage's cut is gathered in its backward pass.
            passes = 2 * (2 * layers + again)
            yield call("hidden states", "all_gather", whole, passes + last + first)
            yield call("hidden states", "reduce_scatter", whole, passes)
        else:
            yield call("hidden states", "all_reduce", whole, 2 * (2 * layers + again))
        if first:
            yield call("token embeddings", "all_reduce", tokens.text * hidden * width, 1)
        if last:
            yield call("gradient of the head's input", "all_reduce", tokens.ce * hidden * width, 1)
            yield call("cross entropy", "all_reduce", tokens.ce * FP32, 3)
        sharing = max(1, self.tp // self.arch.llm.num_key_value_heads)
        if sharing > 1:
            # Columns of a key/value head's group, per expert, forward and backward.
            columns = self.activations.heads_per_group * sharing + 2
            for rows in (tokens.und, tokens.gen):
                size = rows * columns * self.arch.llm.head_dim * width
                yield Collective("tensor", "shared key/value heads", "all_gather", sharing, size, layers + again, sharing)
                yield Collective("tensor", "shared key/value heads", "reduce_scatter", sharing, size, layers, sharing)

    def _context(self, stage: int, tokens: RankTokens) -> Iterator[Collective]:
        layers, again = self._layers(stage)
        if "core_attn" in self.recompute.modules:
            again = layers
        each, groups, head = -(-tokens.everyone // self.cp), self.activations.groups, self.arch.llm.head_dim * self.width

        def call(what: str, kind: str, size: int, count: int) -> Collective:
            return Collective("context", what, kind, self.cp, size, count, self.tp * self.cp)

        if self.megatron.cp_comm_type == "a2a":
            for what, heads in (("queries, keys and values", self.activations.heads + 2 * groups), ("results", self.activations.heads)):
                yield call(what, "all_to_all", each * heads * head, 2 * layers + again)
            return
        size = self.cp * each * 2 * groups * head
        yield call("keys and values", "all_gather", size, layers + again)
        yield call("gradients of keys and values", "reduce_scatter", size, layers)

    def _pipeline(self, stage: int, tokens: RankTokens) -> Iterator[Collective]:
        chunks = virtual_stages(self.megatron, self.arch.llm.num_hidden_layers) or 1
        # Forward to the next stage (from the last one on to the next chunk of the first), backward the other way round.
        forward = chunks - (stage == self.pp - 1)
        backward = chunks - (stage == 0)
        if self.pp > 1:
            size = self.activations.hidden_bytes(tokens)
            yield Collective("pipeline", "hidden states and their gradients", "send", self.pp, size, forward + backward, 2 * self.stride)

    def _gradients(self, stage: int) -> Iterator[Collective]:
        sizes, everywhere = self.sizes, encoders_on_all_ranks(self.megatron)
        replicas = sizes.data_parallel_size * self.cp
        shards = replicas // sizes.distributed_optimizer_instances
        span = self.tp * self.cp * sizes.data_parallel_size
        for tower, held in self.memory.buffers(stage):
            over = sizes.world_size if tower and everywhere else shards
            reach = sizes.world_size if tower and everywhere else span
            buckets = self._buckets(held.gradient_bytes // FP32, over)
            trained = held.gradient_bytes // FP32 // buckets
            if not sizes.use_distributed_optimizer:
                yield Collective("data", "gradients", "all_reduce", over, trained * FP32, buckets, reach)
                continue
            yield Collective("data", "gradients", "reduce_scatter", over, trained * FP32, buckets, reach)
            yield Collective("data", "weights", "all_gather", over, trained * self.width, buckets, reach)
            if sizes.distributed_optimizer_instances > 1 and not (tower and everywhere):
                between = sizes.distributed_optimizer_instances
                yield Collective("data", "gradients between instances", "all_reduce", between, trained * FP32 // shards, buckets, span)
        yield Collective(
            "tensor", "gradients of norms", "all_reduce", self.tp, self.memory.norm_gradients(stage) * FP32, 1, self.tp
        )  # fmt: skip
        if self.arch.llm.tie_word_embeddings and self.pp > 1 and stage in (0, self.pp - 1):
            size = self.memory.embedding_gradients() * FP32
            yield Collective("pipeline", "gradient of the tied embedding", "all_reduce", 2, size, 1, self.sizes.world_size)

    def _buckets(self, elements: int, ranks: int) -> int:
        """Pieces that a gradient buffer is reduced in: Megatron's rule for overlapped reduction, to one or two, for a bucket ends with a
        whole parameter."""
        if not self.megatron.overlap_grad_reduce:
            return 1
        return max(1, round(elements / max(SMALLEST_BUCKET, BUCKET_PER_RANK * ranks)))

    def _encoders(self, stage: int, packs: Sequence[RankTokens]) -> Iterator[Collective]:
        """What an average rank of the replica sends; nothing where each rank of the ends encodes everything itself."""
        if not encoders_on_all_ranks(self.megatron):
            return
        ranks = self.tp * self.pp * self.cp
        tokens = {kind: sum(image.tokens for pack in packs for image in pack.images if image.kind == kind) for kind in ("vit", "vae")}
        first, ends = self.tp * self.cp, self.tp * self.cp * min(2, self.pp)
        span = self.sizes.world_size if self.pp > 1 else ranks

        def call(what: str, size: float) -> Collective:
            return Collective("encoders", what, "all_to_all", ranks, round(size), 1, span)

        if self.arch.vit is not None:
            rows = tokens["vit"] * self.arch.llm.hidden_size * self.width
            yield call("ViT features", rows * first / ranks)
            # Of tensor-parallel ranks, whose gradients are equal, the first sends all of them and the others none.
            yield call("gradients of ViT features", rows / self.tp if stage == 0 else 0)
        if self.arch.autoencoder is not None:
            yield call("latents", tokens["vae"] * self.arch.latent_token_dim * FP32 * ends / ranks)

    def _layers(self, stage: int) -> tuple[int, int]:
        """Layers of a stage, and how many of them are run forward twice."""
        layers = stage_layers(self.megatron, self.arch.llm.num_hidden_layers)[stage]
        chunks = virtual_stages(self.megatron, self.arch.llm.num_hidden_layers) or 1
        return layers, chunks * (layers // chunks - self.recompute.untouched(layers // chunks))


def sent_by_axis(calls: Sequence[Collective]) -> dict[str, float]:
    """Bytes that a rank sends per step, by axis."""
    total: dict[str, float] = dict.fromkeys(("tensor", "context", "pipeline", "data", "encoders"), 0.0)
    for call in calls:
        total[call.axis] += call.sent
    return total
