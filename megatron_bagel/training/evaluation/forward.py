"""Passes without gradients over the whole layout: validation and sample pictures use the training path itself, on any parallelism.

What a model is watched with must be what is trained: the same microbatches, schedule and attention. So nothing is gathered, and a model
that only fits on many ranks is evaluated on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_bagel.model.batch import MicroBatch
from megatron_bagel.training.optim.optimizer import synced_parameters
from megatron_bagel.training.step import StepSettings, Trainable

#: Called on the last stage with a microbatch and the model's two outputs for it.
Collector = Callable[[MicroBatch, Tensor, Tensor], Any]


def microbatch_multiple(trainable: Trainable) -> int:
    """Microbatches of a pass come in multiples of this: interleaved stages take them in groups of as many as there are stages."""
    return parallel_state.get_pipeline_model_parallel_world_size() if len(trainable.decoder) > 1 else 1


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module, collect: Collector) -> tuple[Any, Callable[..., Any]]:
    batch = next(batches)

    def collected(output: tuple[Tensor, Tensor], non_loss_data: bool = False) -> Any:
        return collect(batch, *output)

    return model(batch), collected


def forward_only(trainable: Trainable, batches: Sequence[MicroBatch], settings: StepSettings, collect: Collector) -> list[Any]:
    """What ``collect`` returns for each microbatch, on the ranks of the last stage; an empty list elsewhere.

    Every rank of a replica calls it, inside ``evaluating``, with as many microbatches, a multiple of ``microbatch_multiple``.
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
    """Within the block nothing has gradients, and weights are whole on every rank and, with ``averaged``, the EMA's; afterwards
    training goes on as if nothing had been."""
    # Outermost, so that no hook of overlapped gathering fires inside the block.
    with synced_parameters(trainable.wrapped), trainable.ema.applied() if averaged else nullcontext(), torch.no_grad():
        for module in trainable.wrapped:
            module.eval()
        try:
            yield
        finally:
            for module in trainable.wrapped:
                module.train()
