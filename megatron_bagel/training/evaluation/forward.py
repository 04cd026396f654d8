# SPDX-License-Identifier: Apache-2.0
"""Forward passes without gradients for validation and sample pictures, on the training path and with any parallel sizes.

An evaluation must run what is trained: the same microbatches, schedule and attention. So no weights are gathered, and a model that
only fits on many ranks is evaluated on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_bagel.model.batch import MicroBatch
from megatron_bagel.training.optim.optimizer import synced_parameters
from megatron_bagel.training.step import StepSettings, Trainable

#: Called on the last stage with a microbatch and the model's two outputs for it.
Collector = Callable[[MicroBatch, Tensor, Tensor], Any]


def microbatch_multiple(trainable: Trainable) -> int:
    """Return the number that must divide the microbatches of a pass: interleaved stages take as many at a time as there are stages."""
    return parallel_state.get_pipeline_model_parallel_world_size() if len(trainable.decoder) > 1 else 1


def most_of_replicas(count: int, device: torch.device | str) -> int:
    """Return the largest ``count`` of all replicas if they share experts, else ``count`` itself. Collective over the replicas.

    Every pass of ranks that divide experts is collective, so replicas that share experts pass equally often.
    """
    if parallel_state.get_expert_model_parallel_world_size() == 1:
        return count
    largest = torch.tensor([count], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    return int(largest.item())


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module, collect: Collector) -> tuple[Tensor, Callable[..., Any]]:
    """Return the stage's output and the function that collects it on the last stage (Megatron's ``forward_step_func``).

    The last stage has two outputs. Megatron asks for one tensor, of which it reads the device if the model has sparse experts.
    """
    batch = next(batches)
    output = model(batch)

    def collect_output(tensor: Tensor, non_loss_data: bool = False) -> Any:
        return collect(batch, *output)

    return output[0] if isinstance(output, tuple) else output, collect_output


def forward_only(trainable: Trainable, batches: Sequence[MicroBatch], settings: StepSettings, collect: Collector) -> list[Any]:
    """Return what ``collect`` returns for each microbatch on the ranks of the last stage, and an empty list on other ranks.

    Every rank of a replica calls it inside ``evaluating``, all with the same number of microbatches, a multiple of
    ``microbatch_multiple``.
    """
    chunks = trainable.decoder
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, collect=collect),
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=settings.slots(settings.seq_length) * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


@contextmanager
def evaluating(trainable: Trainable, averaged: bool) -> Iterator[None]:
    """Evaluate within the block: no gradients, complete weights on every rank and, with ``averaged``, the weights of the average.

    After the block training continues bit for bit as without it.
    """
    # Outermost, so that no hook of overlapped gathering fires inside the block.
    with synced_parameters(trainable.wrapped), trainable.ema.applied() if averaged else nullcontext(), torch.no_grad():
        for module in trainable.wrapped:
            module.eval()
        try:
            yield
        finally:
            for module in trainable.wrapped:
                module.train()
