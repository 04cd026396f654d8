"""Losses by dataset: which data a model gets better at, on any layout, for one small sum over ranks.

A loss token knows the sample it belongs to, and a sample its dataset ("group/name"), so every rank adds up what it holds and a table of
a few numbers per dataset is exchanged. Velocity errors are also told apart by timestep: near the noise and near the picture they mean
different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.model.batch import MicroBatch

#: Limits of the timestep buckets: quarters from the picture (0) to the noise (1).
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


class LossTable:
    """Sums of both losses per dataset and, with ``edges``, of the velocity error per timestep bucket.

    ``datasets`` are all names that can occur, in an order that is the same on every rank.
    """

    def __init__(self, datasets: Sequence[str], edges: Sequence[float] = ()) -> None:
        self.datasets, self.edges = tuple(datasets), tuple(edges)
        self._numbers = {name: number for number, name in enumerate(self.datasets)}
        # Columns: sum and count of CE, then sum and count of MSE per bucket (one bucket without edges).
        self._buckets = max(len(self.edges) - 1, 1)
        self._sums = torch.zeros(len(self.datasets), 2 + 2 * self._buckets, dtype=torch.float64, device=platform.device())

    def clear(self) -> None:
        """Forget everything, for a step that is computed again."""
        self._sums.zero_()

    @property
    def groups(self) -> tuple[str, ...]:
        """The datasets' groups, each once, in the order of the datasets."""
        return tuple(dict.fromkeys(name.split("/", 1)[0] for name in self.datasets))

    @torch.no_grad()
    def add(self, batch: MicroBatch, ce: Tensor, mse: Tensor) -> None:
        """Count a microbatch: ``ce`` [n_ce] and ``mse`` [n_mse, channels], unreduced, as the model returns them."""
        numbers = torch.tensor([self._numbers[name] for name in batch.datasets], dtype=torch.long, device=self._sums.device)
        if len(ce):
            rows = numbers[batch.ce_samples]
            self._sums[:, 0].index_add_(0, rows, ce.double())
            self._sums[:, 1].index_add_(0, rows, torch.ones_like(ce, dtype=torch.float64))
        if len(mse):
            columns = 2 + 2 * self._bucket(batch.timesteps.index_select(0, batch.mse_rows))
            flat, places = self._sums.view(-1), numbers[batch.mse_samples] * self._sums.shape[1] + columns
            flat.index_add_(0, places, mse.double().mean(-1))
            flat.index_add_(0, places + 1, torch.ones(len(mse), dtype=torch.float64, device=flat.device))

    def _bucket(self, timesteps: Tensor) -> Tensor:
        """Bucket of each timestep; a timestep on a limit belongs to the bucket below it."""
        inner = torch.tensor(self.edges[1:-1], dtype=timesteps.dtype, device=timesteps.device)
        return torch.bucketize(timesteps, inner)

    def reduce(self, *groups: dist.ProcessGroup) -> None:
        """Sum over the ranks of ``groups``, one group after the other. All of their ranks call this."""
        for group in groups:
            if dist.get_world_size(group) > 1:
                dist.all_reduce(self._sums, group=group)

    def means(self) -> dict[str, float]:
        """``ce`` and ``mse`` over everything, ``ce/<group>``, ``ce/<group>/<dataset>`` (``mse`` alike) and
        ``mse/<group>/<dataset>/t<low>-<high>``: means over tokens. What had no token is left out."""
        sums = self._sums.cpu()
        found: dict[str, float] = {}
        for name, rows in self._row_groups().items():
            ce, ce_count, *mse = sums[rows].sum(0).tolist()
            where = f"/{name}" if name else ""
            _put(found, f"ce{where}", ce, ce_count)
            _put(found, f"mse{where}", sum(mse[0::2]), sum(mse[1::2]))
            if self.edges and name in self._numbers:
                for low, high, total, count in zip(self.edges, self.edges[1:], mse[0::2], mse[1::2], strict=False):
                    _put(found, f"mse{where}/t{low:.2f}-{high:.2f}", total, count)
        return found

    def _row_groups(self) -> Mapping[str, list[int]]:
        """Rows behind each name: everything (""), every group, every dataset."""
        rows: dict[str, list[int]] = {"": list(range(len(self.datasets)))}
        for number, name in enumerate(self.datasets):
            rows.setdefault(name.split("/", 1)[0], []).append(number)
            rows.setdefault(name, [number])
        return rows


def losses_by_dataset(table: LossTable) -> dict[str, float]:
    """A training step's losses of every group and dataset, for its log line. Collective over the world."""
    table.reduce(parallel_state.get_data_parallel_group(with_context_parallel=True), parallel_state.get_pipeline_model_parallel_group())
    return {name: mean for name, mean in table.means().items() if "/" in name}


def _put(found: dict[str, float], name: str, total: float, count: float) -> None:
    if count:
        found[name] = total / count
