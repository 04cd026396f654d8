# SPDX-License-Identifier: Apache-2.0
"""Losses on held-out rows, by dataset and timestep, for the weights and for their average, with the parallel sizes of the run.

The rows, their order and all noise are fixed, so the losses of two steps, or of two runs with one seed, can be compared.
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
    """Measures losses on this replica's held-out packs, and reads them again each time so that they take no memory from training."""

    def __init__(
        self, sources: Sequence[GroupSource], reader: PackReader, samples: int, max_num_tokens: int, max_num_tokens_per_sample: int
    ) -> None:
        """Plan packs of ``samples`` held-out samples of every dataset. Raises ValueError if no held-out sample is short enough."""
        self.reader = reader
        self.datasets = [name for source in sources for name in source.datasets()]
        self.plans = held_out_packs(sources, samples, max_num_tokens, max_num_tokens_per_sample)

    def measure(self, trainable: Trainable, settings: StepSettings, averaged: bool, packs_per_pass: int) -> dict[str, float]:
        """Return mean losses by name (``LossTable.means``) on every rank. Collective.

        Args:
            trainable: The model.
            settings: The settings of a training step.
            averaged: Whether the weights are replaced by their average.
            packs_per_pass: The number of packs that are encoded and in memory at the same time.
        """
        table = LossTable(self.datasets, QUARTERS)
        with evaluating(trainable, averaged):
            for packs in self._packs_by_pass(microbatch_multiple(trainable), packs_per_pass):
                batches = microbatches([self.reader[pack.plan] for pack in packs], trainable.image_encoder, settings)
                counted_ids = {id(batch) for batch, pack in zip(batches, packs, strict=True) if not pack.repeated}

                def collect(batch: MicroBatch, ce: Tensor, mse: Tensor, counted_ids: set[int] = counted_ids) -> None:
                    if id(batch) in counted_ids:
                        table.add(batch, ce, mse)

                forward_only(trainable, batches, settings, collect)
        table.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True), parallel_state.get_pipeline_model_parallel_group())
        return table.means()

    def _packs_by_pass(self, multiple: int, packs_per_pass: int) -> Iterator[list[HeldOutPack]]:
        """Yield this replica's packs in lists of about ``packs_per_pass``, each a multiple of ``multiple`` long."""
        group = parallel_state.get_data_parallel_group()
        packs = share_of(self.plans, dist.get_rank(group), dist.get_world_size(group), multiple)
        size = max(packs_per_pass // multiple, 1) * multiple
        for start in range(0, len(packs), size):
            yield packs[start : start + size]
