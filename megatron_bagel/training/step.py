"""One optimizer step, in the order of the design: count, encode, pipeline, encode backward, update.

Every sum over ranks that a step needs besides gradients is one small vector, exchanged before the schedule starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel import platform
from megatron_bagel.costs.flops import StepWork
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.loading.loader import StepBatch
from megatron_bagel.encoders.image_encoding import ImageEncoder
from megatron_bagel.layout.cp_partition import context_orders, padded_length
from megatron_bagel.model.attention.context_parallel import CPContext
from megatron_bagel.model.batch import MicroBatch, make_microbatch
from megatron_bagel.training.losses import LossTotals, LossWeights, global_losses, microbatch_loss
from megatron_bagel.training.observability.loss_table import LossTable
from megatron_bagel.training.observability.timers import Phases, untimed
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.lr_schedule import LearningRate
from megatron_bagel.training.optim.optimizer import StepOutcome, finalize_gradients, gradient_norm, update_weights
from megatron_bagel.training.resilience.bad_steps import Attempt, BadSteps
from megatron_bagel.training.step_result import StepResult, TaskCounts


@dataclass
class Trainable:
    """What a step moves. ``decoder`` and ``tower`` are wrapped; ``tower`` is None without a ViT, or when all of it is frozen."""

    config: TransformerConfig
    decoder: list[DistributedDataParallel]
    tower: DistributedDataParallel | None
    image_encoder: ImageEncoder
    optimizer: MegatronOptimizer
    learning_rate: LearningRate
    ema: ShardedEma

    @property
    def wrapped(self) -> list[DistributedDataParallel]:
        """Every module with a gradient buffer."""
        return [*self.decoder, *([self.tower] if self.tower is not None else [])]


@dataclass(frozen=True)
class StepSettings:
    """``backend`` names the attention (sdpa, flex, dense), ``seq_length`` is the capacity of a pack in tokens, ``cp_comm_type`` how
    context-parallel ranks exchange keys (all_gather, a2a).

    Slots of a microbatch are a multiple of ``slot_multiple`` (sequence parallelism cuts them evenly), and with ``fixed_slots`` the
    same for every pack, so that pipeline stages need not tell each other shapes.
    """

    weights: LossWeights
    backend: str
    seq_length: int
    device: torch.device | str = "cpu"
    slot_multiple: int = 1
    fixed_slots: bool = False
    cp_comm_type: str = "all_gather"

    def slots(self, tokens: int) -> int:
        """Slots of one context-parallel rank for a pack of ``tokens`` tokens, padding included."""
        wanted = self.seq_length if self.fixed_slots else tokens
        return padded_length(wanted, parallel_state.get_context_parallel_world_size(), self.slot_multiple)


def global_counts(
    packs: Sequence[LoadedPack], group: dist.ProcessGroup | None, tasks: Sequence[str] = ()
) -> tuple[LossTotals, StepWork, int, TaskCounts | None]:
    """Loss totals, work and samples of the global batch, from each replica's own packs; with ``tasks`` also their shares of it.

    One float64 vector is summed over the replicas, exact for counts below 2 ** 53. (The design would have every rank lay out every
    pack of the global batch; at thousands of replicas that costs more than this exchange of about 120 bytes.)
    """
    totals = LossTotals.of(pack.pack for pack in packs)
    work = sum((StepWork.of(pack.pack) for pack in packs), StepWork())
    samples = sum(len(pack.pack.samples) for pack in packs)
    counts = [float(getattr(part, field.name)) for part in (totals, work) for field in fields(part)] + [float(samples)]
    fixed = len(counts)
    counts += TaskCounts.of(packs, tasks).to_list() if tasks else []
    summed = torch.tensor(counts, dtype=torch.float64, device=platform.device())
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(summed, group=group)
    values = summed.tolist()
    split = len(fields(totals))
    totals = LossTotals(int(values[0]), values[1], int(values[2]))
    work = StepWork(*(int(value) for value in values[split : fixed - 1]))
    return totals, work, int(values[fixed - 1]), TaskCounts.from_list(values[fixed:], tasks) if tasks else None


def microbatches(packs: Sequence[LoadedPack], image_encoder: ImageEncoder, settings: StepSettings) -> list[MicroBatch]:
    """Encode the packs and put this rank's share of their tokens into its order."""
    features = image_encoder.encode(packs)
    group = parallel_state.get_context_parallel_group()
    made = []
    for pack, encoded in zip(packs, features, strict=True):
        orders = context_orders(pack.pack, group.size(), settings.slots(pack.pack.sequence_length))
        place = CPContext(group.rank(), group, orders, settings.cp_comm_type)
        made.append(make_microbatch(pack.pack, orders[place.rank], encoded, settings.backend, settings.device, place))
    return made


def forward_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module, totals: LossTotals, weights: LossWeights, table: LossTable | None = None
) -> tuple[object, Callable[..., tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
    """Megatron's forward_step_func: the stage's output, and how the last stage turns it into a loss."""
    batch = next(batches)

    def loss(output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        if table is not None:
            table.add(batch, *output)
        scalar, shares = microbatch_loss(*output, batch.ce_weights, totals, weights)
        # The token count is Megatron's divisor; the loss is divided already (losses.py), so it stays unused.
        return scalar, torch.ones((), dtype=torch.int, device=scalar.device), {"shares": shares}

    return model(batch), loss


@dataclass(frozen=True)
class StepWatch:
    """Who looks at a step on its way: ``bad_steps`` judges its numbers before the update, ``gradients_ready`` is called when this rank's
    gradients are there and not yet exchanged."""

    step: int
    bad_steps: BadSteps
    gradients_ready: Callable[[], None] = lambda: None


def train_step(
    trainable: Trainable,
    batch: StepBatch,
    settings: StepSettings,
    table: LossTable | None = None,
    timed: Phases = untimed,
    watch: StepWatch | None = None,
) -> StepResult:
    """Train on one global batch, of which this replica holds ``batch.packs``. ``table`` takes this rank's losses by dataset.

    Without a ``watch`` every update is made, whatever its numbers are. A step whose update is left out moves no weight and no average; its
    place in the schedule and in the data is used up.
    """
    tasks = table.groups if table is not None else ()
    totals, work, samples, by_task = global_counts(batch.packs, parallel_state.get_data_parallel_group(), tasks)
    compute = partial(_gradients, trainable, batch, settings, totals, table, timed, watch)
    attempt, good = (compute(), True) if watch is None else watch.bad_steps.attempt(watch.step, compute)
    lr = trainable.learning_rate.lr
    if good:
        with timed("optimizer"):
            update_weights(trainable.optimizer, attempt.grad_norm)
        with timed("ema"):
            trainable.ema.update()
    trainable.learning_rate.step()
    return StepResult(attempt.losses, StepOutcome(good, attempt.grad_norm), totals, work, samples, lr, by_task)


def _gradients(
    trainable: Trainable,
    batch: StepBatch,
    settings: StepSettings,
    totals: LossTotals,
    table: LossTable | None,
    timed: Phases,
    watch: StepWatch | None,
) -> Attempt:
    """Losses and finished gradients of the step; weights stay as they are."""
    for module in trainable.wrapped:
        module.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    if table is not None:
        table.clear()
    with timed("encode"):
        shards = microbatches(batch.packs, trainable.image_encoder, settings)
    chunks = trainable.decoder
    with timed("forward_backward"):
        outputs = get_forward_backward_func()(
            forward_step_func=partial(forward_step, totals=totals, weights=settings.weights, table=table),
            # Every chunk of an interleaved stage sees every microbatch.
            data_iterator=[iter(shards) for _ in chunks] if len(chunks) > 1 else iter(shards),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(shards),
            # Megatron divides by the context-parallel size itself.
            seq_length=settings.slots(settings.seq_length) * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=1,
            forward_only=False,
        )
    with timed("encode_backward"):
        trainable.image_encoder.backward()
    shares = [output["shares"] for output in outputs]
    own = _own_numbers(trainable, shares) if watch is not None and watch.bad_steps.compares else torch.zeros(0)
    if watch is not None:
        watch.gradients_ready()
    with timed("grad_sync"):
        # Not left to the schedule, which would finish before the tower's backward pass.
        finalize_gradients(chunks)
        if trainable.tower is not None:
            trainable.tower.finish_grad_sync()
    with timed("optimizer"):
        norm = gradient_norm(trainable.optimizer)
    # Tensor-parallel ranks have equal shares: one of them speaks. Over the world, so that all ranks judge the step by the same bits.
    speaks = parallel_state.get_tensor_model_parallel_rank() == 0
    losses = global_losses(shares if speaks else [], settings.weights, dist.group.WORLD, fault=not math.isfinite(norm))
    return Attempt(losses, norm, own)


def _own_numbers(trainable: Trainable, shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """[2 + buffers] float64: this rank's losses, and the sum of each gradient buffer before it is exchanged (or, with
    ``overlap_grad_reduce``, while it is)."""
    losses = sum((share.double() for share in shares), torch.zeros(2, dtype=torch.float64, device=platform.device()))
    sums = [buffer.grad_data.sum(dtype=torch.float64) for module in trainable.wrapped for buffer in module.buffers]
    return torch.cat([losses, *(total.reshape(1) for total in sums)])
