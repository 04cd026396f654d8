# SPDX-License-Identifier: Apache-2.0
"""Sums losses by dataset, with any parallel sizes, at the cost of one small sum over ranks.

A loss token belongs to a sample, and a sample to a dataset ("group/name"). So every rank sums its own tokens, and the ranks exchange a
table of a few numbers per dataset. Velocity errors can also be summed by timestep: near the noise and near the picture they have
different meanings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.model.batch import MicroBatch
from megatron_bagel.platform.device import to_device

#: Edges of the timestep buckets: quarters from the picture (0) to the noise (1).
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


class LossTable:
    """Sums both losses per dataset and, with ``edges``, the velocity error per timestep bucket.

    ``datasets`` are the names of all datasets that can occur, in the same order on every rank.
    """

    def __init__(self, datasets: Sequence[str], edges: Sequence[float] = ()) -> None:
        self.datasets, self.edges = tuple(datasets), tuple(edges)
        self._numbers = {name: number for number, name in enumerate(self.datasets)}
        # Columns: sum and count of CE, then sum and count of MSE per bucket (one bucket without edges).
        self._buckets = max(len(self.edges) - 1, 1)
        self._sums = torch.zeros(len(self.datasets), 2 + 2 * self._buckets, dtype=torch.float64, device=platform.device())

    def clear(self) -> None:
        """Set all sums to zero, for a step that is computed again."""
        self._sums.zero_()

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the groups of the datasets, each once, in the order of the datasets."""
        return tuple(dict.fromkeys(name.split("/", 1)[0] for name in self.datasets))

    @torch.no_grad()
    def add(self, batch: MicroBatch, ce: Tensor, mse: Tensor) -> None:
        """Add a microbatch's ``ce`` [n_ce] and ``mse`` [n_mse, channels], unreduced, as the model returns them."""
        numbers = to_device(torch.tensor([self._numbers[name] for name in batch.datasets], dtype=torch.long), self._sums.device)
        if len(ce):
            rows = numbers[batch.ce_samples]
            self._sums[:, 0].index_add_(0, rows, ce.double())
            self._sums[:, 1].index_add_(0, rows, torch.ones_like(ce, dtype=torch.float64))
        if len(mse):
            columns = 2 + 2 * self._bucket(batch.timesteps.index_select(0, batch.mse_rows))
            flat, indexes = self._sums.view(-1), numbers[batch.mse_samples] * self._sums.shape[1] + columns
            flat.index_add_(0, indexes, mse.double().mean(-1))
            flat.index_add_(0, indexes + 1, torch.ones(len(mse), dtype=torch.float64, device=flat.device))

    def _bucket(self, timesteps: Tensor) -> Tensor:
        """Return the bucket of each timestep. A timestep on an edge belongs to the bucket below it."""
        inner_edges = to_device(torch.tensor(self.edges[1:-1], dtype=timesteps.dtype), timesteps.device)
        return torch.bucketize(timesteps, inner_edges)

    def reduce(self, *groups: dist.ProcessGroup) -> None:
        """Sum over the ranks of ``groups``, one group after the other. All ranks of the groups call this."""
        for group in groups:
            if dist.get_world_size(group) > 1:
                dist.all_reduce(self._sums, group=group)

    def means(self) -> dict[str, float]:
        """Return means over tokens by name, without those that have no token.

        The names are ``ce``, ``ce/<group>`` and ``ce/<group>/<dataset>``, the same with ``mse``, and, with edges,
        ``mse/<group>/<dataset>/t<low>-<high>``.
        """
        sums = self._sums.cpu()
        means: dict[str, float] = {}
        for name, rows in self._row_groups().items():
            ce, ce_count, *mse = sums[rows].sum(0).tolist()
            suffix = f"/{name}" if name else ""
            _add_mean(means, f"ce{suffix}", ce, ce_count)
            _add_mean(means, f"mse{suffix}", sum(mse[0::2]), sum(mse[1::2]))
            if self.edges and name in self._numbers:
                for low, high, total, count in zip(self.edges, self.edges[1:], mse[0::2], mse[1::2], strict=False):
                    _add_mean(means, f"mse{suffix}/t{low:.2f}-{high:.2f}", total, count)
        return means

    def _row_groups(self) -> Mapping[str, list[int]]:
        """Return the rows of each name: the whole table (""), every group, every dataset."""
        rows: dict[str, list[int]] = {"": list(range(len(self.datasets)))}
        for number, name in enumerate(self.datasets):
            rows.setdefault(name.split("/", 1)[0], []).append(number)
            rows.setdefault(name, [number])
        return rows


def losses_by_dataset(table: LossTable) -> dict[str, float]:
    """Return a training step's losses of every group and dataset, for its record. Collective over the world."""
    table.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True), parallel_state.get_pipeline_model_parallel_group())
    return {name: mean for name, mean in table.means().items() if "/" in name}


def _add_mean(means: dict[str, float], name: str, total: float, count: float) -> None:
    if count:
        means[name] = total / count
