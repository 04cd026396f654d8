# SPDX-License-Identifier: Apache-2.0
"""One optimizer step, in this order: count, encode, pipeline, encode backward, judge, update.

All counts that a step needs from other ranks travel in one small vector, which is summed before the schedule starts.
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
from megatron_bagel.data.loading.noise import token_words
from megatron_bagel.encoders.image_encoding import ImageEncoder
from megatron_bagel.layout.cp_partition import context_orders, padded_length
from megatron_bagel.model.attention.context_parallel import CPContext
from megatron_bagel.model.batch import MicroBatch, make_microbatch
from megatron_bagel.model.keyed_dropout import Draws
from megatron_bagel.model.sparse_mlp import set_global_tokens
from megatron_bagel.parallel.host_sums import sum_over_hosts
from megatron_bagel.platform.device import to_device
from megatron_bagel.training.expert_loads import ExpertLoads, global_expert_loads
from megatron_bagel.training.losses import LossTotals, LossWeights, global_losses, microbatch_loss
from megatron_bagel.training.observability.loss_table import LossTable
from megatron_bagel.training.observability.timers import Phases, untimed
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.lr_schedule import LearningRate
from megatron_bagel.training.optim.optimizer import StepOutcome, finalize_gradients, gradient_buffers, gradient_norm, update_weights
from megatron_bagel.training.resilience.bad_steps import Attempt, BadSteps
from megatron_bagel.training.step_result import StepResult, TaskCounts


@dataclass
class Trainable:
    """Holds what a step changes. ``decoder`` and ``tower`` are wrapped; ``tower`` is None without a ViT or if all of it is frozen."""

    config: TransformerConfig
    decoder: list[DistributedDataParallel]
    tower: DistributedDataParallel | None
    image_encoder: ImageEncoder
    optimizer: MegatronOptimizer
    learning_rate: LearningRate
    ema: ShardedEma

    @property
    def wrapped(self) -> list[DistributedDataParallel]:
        """Return every module with a gradient buffer."""
        return [*self.decoder, *([self.tower] if self.tower is not None else [])]


@dataclass(frozen=True)
class StepSettings:
    """Settings of a training step.

    Attributes:
        weights: The weights that combine the two losses.
        backend: The attention: sdpa, flex, flex_flash, magi or dense.
        seq_length: The capacity of a pack in tokens.
        device: The device of the microbatches.
        slot_multiple: The number that divides the slots of a microbatch, because sequence parallelism cuts them evenly.
        fixed_slots: Whether every pack has the same number of slots, so that pipeline stages need not exchange shapes.
        cp_comm_type: How context-parallel ranks exchange keys: all_gather or a2a.
    """

    weights: LossWeights
    backend: str
    seq_length: int
    device: torch.device | str = "cpu"
    slot_multiple: int = 1
    fixed_slots: bool = False
    cp_comm_type: str = "all_gather"
    #: The seed of the dropout of adapters; None for a run that drops nothing.
    dropout_seed: int | None = None

    def slots(self, tokens: int) -> int:
        """Return the slots of one context-parallel rank for a pack of ``tokens`` tokens, padding included."""
        length = self.seq_length if self.fixed_slots else tokens
        return padded_length(length, parallel_state.get_context_parallel_world_size(), self.slot_multiple)


def global_counts(
    packs: Sequence[LoadedPack], group: dist.ProcessGroup | None, tasks: Sequence[str] = ()
) -> tuple[LossTotals, StepWork, int, TaskCounts | None]:
    """Return loss totals, work, samples and, with ``tasks``, counts by task of the global batch.

    One vector is summed over the replicas (``parallel/host_sums.py``). Every rank could instead lay out every
    pack of the global batch, but with thousands of replicas that costs more than this exchange of about 120 bytes.

    Args:
        packs: The packs of this replica.
        group: The data-parallel group; None for a single replica.
        tasks: The dataset groups to count by, in the same order on every rank.
    """
    totals = LossTotals.of(pack.pack for pack in packs)
    work = sum((StepWork.of(pack.pack) for pack in packs), StepWork())
    samples = sum(len(pack.pack.samples) for pack in packs)
    counts = [float(getattr(part, field.name)) for part in (totals, work) for field in fields(part)] + [float(samples)]
    num_fixed = len(counts)
    counts += TaskCounts.of(packs, tasks).to_list() if tasks else []
    values = counts if group is None else sum_over_hosts(counts, group)
    num_totals = len(fields(totals))
    totals = LossTotals(int(values[0]), values[1], int(values[2]))
    work = StepWork(*(int(value) for value in values[num_totals : num_fixed - 1]))
    return totals, work, int(values[num_fixed - 1]), TaskCounts.from_list(values[num_fixed:], tasks) if tasks else None


def microbatches(
    packs: Sequence[LoadedPack], image_encoder: ImageEncoder, settings: StepSettings, dropout: bool = False
) -> list[MicroBatch]:
    """Encode the packs and return a microbatch of each, with this rank's share of its tokens in this rank's order.

    With ``dropout`` adapters drop inputs, if the run has asked for it.
    """
    features = image_encoder.encode(packs)
    group = parallel_state.get_context_parallel_group()
    batches = []
    for pack, encoded in zip(packs, features, strict=True):
        orders = context_orders(pack.pack, group.size(), settings.slots(pack.pack.sequence_length))
        cp_context = CPContext(group.rank(), group, orders, settings.cp_comm_type)
        order = orders[cp_context.rank]
        batch = make_microbatch(pack.pack, order, encoded, settings.backend, settings.device, cp_context)
        if dropout and settings.dropout_seed is not None:
            words = token_words(pack.pack, settings.dropout_seed)[order.positions]
            batch.draws = Draws(to_device(torch.from_numpy(words), settings.device))
        batches.append(batch)
    return batches


def forward_step(
    batches: Iterator[MicroBatch], model: torch.nn.Module, totals: LossTotals, weights: LossWeights, table: LossTable | None = None
) -> tuple[object, Callable[..., tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
    """Return the stage's output and the function that turns it into a loss on the last stage (Megatron's ``forward_step_func``)."""
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
    """Observers of a step while it runs.

    Attributes:
        step: The number of the step.
        bad_steps: Judges the numbers of the step before the update.
        gradients_ready: Called when this rank has its gradients and has not exchanged them yet.
    """

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
    upcoming: Sequence[LoadedPack] = (),
) -> StepResult:
    """Train on one global batch and return its numbers.

    A step whose update is left out changes no weight and no average. It still advances the schedule and uses up its data.

    Args:
        trainable: The modules, optimizer, average and schedule.
        batch: The global batch, with the packs of this replica.
        settings: The settings of the step.
        table: Collects this rank's losses by dataset, if the step is logged.
        timed: Times the phases of the step.
        watch: The observers of the step. Without them every update is made, whatever its numbers are.
        upcoming: The packs of the next step, whose latents are to be computed beside this step; none to compute them in their step.
    """
    tasks = table.groups if table is not None else ()
    totals, work, samples, by_task = global_counts(batch.packs, parallel_state.get_data_parallel_group(), tasks)
    compute = partial(_gradients, trainable, batch, settings, totals, work, table, timed, watch, upcoming)
    attempt, good = (compute(), True) if watch is None else watch.bad_steps.attempt(watch.step, compute)
    lr = trainable.learning_rate.lr
    if good:
        with timed("optimizer"):
            trainable.ema.prepare(trainable.learning_rate.steps)
            update_weights(trainable.optimizer, attempt.grad_norm)
        with timed("ema"):
            trainable.ema.update(trainable.learning_rate.steps)
    trainable.learning_rate.step()
    experts = _expert_loads(trainable) if table is not None else None
    return StepResult(attempt.losses, StepOutcome(good, attempt.grad_norm), totals, work, samples, lr, by_task, experts)


def _expert_loads(trainable: Trainable) -> ExpertLoads | None:
    """Return the loads of the step's sparse experts, or None without any. Collective."""
    config = trainable.config
    return global_expert_loads(trainable.decoder, config.num_layers, config.num_moe_experts) if config.num_moe_experts else None


def _gradients(
    trainable: Trainable,
    batch: StepBatch,
    settings: StepSettings,
    totals: LossTotals,
    work: StepWork,
    table: LossTable | None,
    timed: Phases,
    watch: StepWatch | None,
    upcoming: Sequence[LoadedPack],
) -> Attempt:
    """Compute the losses and the finished gradients of the step. Weights do not change."""
    _clear(trainable, work, table)
    with timed("encode"):
        shards = microbatches(batch.packs, trainable.image_encoder, settings, dropout=True)
        # Before the schedule, whose kernels run beside them. On a CPU, or between the barriers of timers, nothing is beside them.
        trainable.image_encoder.encode_ahead(upcoming)
    with timed("forward_backward"):
        shares = _forward_backward(trainable.decoder, shards, settings, totals, table)
    with timed("encode_backward"):
        trainable.image_encoder.backward()
    local_numbers = _local_numbers(trainable, shares) if watch is not None and watch.bad_steps.compares else torch.zeros(0)
    if watch is not None:
        watch.gradients_ready()
    with timed("grad_sync"):
        # The schedule does not do this, because it would finish before the tower's backward pass.
        finalize_gradients(trainable.decoder)
        if trainable.tower is not None:
            trainable.tower.finish_grad_sync()
    with timed("optimizer"):
        norm = gradient_norm(trainable.optimizer)
    # Tensor-parallel ranks have equal shares, so only the first of them adds its own. The sum is over the world, so that all ranks judge
    # the step by the same bits.
    own_shares = shares if parallel_state.get_tensor_model_parallel_rank() == 0 else []
    losses = global_losses(own_shares, settings.weights, dist.group.WORLD, fault=not math.isfinite(norm))
    return Attempt(losses, norm, local_numbers)


def _clear(trainable: Trainable, work: StepWork, table: LossTable | None) -> None:
    """Set gradients, the losses in ``table`` and the sums of routers to zero, also those of an earlier attempt at the same step."""
    for module in trainable.wrapped:
        module.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    for chunk in trainable.decoder:
        set_global_tokens(chunk, work.tokens - work.vae_tokens, work.vae_tokens)
    if table is not None:
        table.clear()


def _forward_backward(
    chunks: list[DistributedDataParallel],
    shards: Sequence[MicroBatch],
    settings: StepSettings,
    totals: LossTotals,
    table: LossTable | None,
) -> list[torch.Tensor]:
    """Run Megatron's schedule over the microbatches and return their [2] loss shares, which only the last stage has."""
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
    return [output["shares"] for output in outputs]


def _local_numbers(trainable: Trainable, shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return this rank's losses and the sum of each of its gradient buffers [2 + buffers], float64.

    The buffers are summed before they are exchanged or, with ``overlap_grad_reduce``, while they are.
    """
    losses = sum((share.double() for share in shares), torch.zeros(2, dtype=torch.float64, device=platform.device()))
    sums = [buffer.grad_data.sum(dtype=torch.float64) for module in trainable.wrapped for buffer in gradient_buffers(module)]
    return torch.cat([losses, *(total.reshape(1) for total in sums)])
