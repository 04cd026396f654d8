"""Losses on held-out rows, by dataset and timestep, for the weights and for their average, on the layout the run has.

The rows, their order and all noise are fixed, so two steps of a run, and two runs of one seed, are compared on the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bagel.data.loading.held_out import HeldOutPack, held_out_packs, share_of
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.planner.group_source import GroupSource
from megatron_bagel.model.batch import MicroBatch
from megatron_bagel.training.evaluation.forward import evaluating, forward_only, microbatch_multiple
from megatron_bagel.training.observability.loss_table import QUARTERS, LossTable
from megatron_bagel.training.step import StepSettings, Trainable, microbatches

#: The two sets of weights that are validated.
WEIGHTS = ("model", "ema")


class HeldOutLosses:
    """The held-out packs of this replica, read anew each time: they are few, and training's memory is not theirs to keep."""

    def __init__(
        self, sources: Sequence[GroupSource], reader: PackReader, samples: int, max_num_tokens: int, max_num_tokens_per_sample: int
    ) -> None:
        """``samples`` of every dataset, packed up to ``max_num_tokens``. Raises ValueError when no held-out sample is short enough."""
        self.reader = reader
        self.datasets = [name for source in sources for name in source.datasets()]
        self.plans = held_out_packs(sources, samples, max_num_tokens, max_num_tokens_per_sample)

    def measure(self, trainable: Trainable, settings: StepSettings, averaged: bool, at_once: int) -> dict[str, float]:
        """Mean losses by name (`LossTable.means`) on every rank; ``at_once`` packs are encoded and held together. Collective."""
        table = LossTable(self.datasets, QUARTERS)
        with evaluating(trainable, averaged):
            for packs in self._portions(microbatch_multiple(trainable), at_once):
                batches = microbatches([self.reader[pack.plan] for pack in packs], trainable.image_encoder, settings)
                counted = {id(batch) for batch, pack in zip(batches, packs, strict=True) if not pack.repeated}

                def collect(batch: MicroBatch, ce: Tensor, mse: Tensor, counted: set[int] = counted) -> None:
                    if id(batch) in counted:
                        table.add(batch, ce, mse)

                forward_only(trainable, batches, settings, collect)
        table.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True), parallel_state.get_pipeline_model_parallel_group())
        return table.means()

    def _portions(self, multiple: int, at_once: int) -> Iterator[list[HeldOutPack]]:
        group = parallel_state.get_data_parallel_group()
        mine = share_of(self.plans, dist.get_rank(group), dist.get_world_size(group), multiple)
        each = max(at_once // multiple, 1) * multiple
        for start in range(0, len(mine), each):
            yield mine[start : start + each]
