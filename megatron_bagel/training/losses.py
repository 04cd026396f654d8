# SPDX-License-Identifier: Apache-2.0
"""Two losses, each divided by its own token count over the global batch, so gradients do not depend on how samples are packed.

The counts come from the layout (integers), so they are known before the step starts. A microbatch without text or without
images simply adds nothing. Summing the gradients of ``microbatch_loss`` over all microbatches and data-parallel ranks gives
the gradient of ``ce_weight * mean(ce) + mse_weight * mean(mse)``. Nothing may divide by the number of ranks or microbatches
afterwards (``calculate_per_token_loss`` and ``optimizer.finalize_gradients``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bagel import platform


class CountedPack(Protocol):
    """The part of a pack's layout that the totals are counted from."""

    @property
    def ce_weights(self) -> np.ndarray:
        """Return the weight of each text token with a loss."""

    @property
    def mse_positions(self) -> np.ndarray:
        """Return the positions of the latent tokens with a loss."""


@dataclass(frozen=True)
class LossWeights:
    """Weights that combine the two losses.

    ``ce_loss_reweighting`` takes the weighted mean of CE with the pack's ``ce_weights``: each token of a text of n tokens weighs
    n^-1/2, so that long answers do not outweigh short ones.
    """

    ce_weight: float = 1.0
    mse_weight: float = 1.0
    ce_loss_reweighting: bool = False


@dataclass(frozen=True)
class LossTotals:
    """Denominators of one optimizer step, counted over every pack of the global batch."""

    ce_tokens: int = 0
    ce_weight_sum: float = 0.0
    mse_tokens: int = 0

    @classmethod
    def of(cls, packs: Iterable[CountedPack]) -> LossTotals:
        """Return the totals of a global batch. Weights are summed in float64, in the order of ``packs``."""
        total = cls()
        for pack in packs:
            total = total + cls(len(pack.ce_weights), float(np.sum(pack.ce_weights, dtype=np.float64)), len(pack.mse_positions))
        return total

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(self.ce_tokens + other.ce_tokens, self.ce_weight_sum + other.ce_weight_sum, self.mse_tokens + other.mse_tokens)


def _mean_share(summed: Tensor, denominator: float) -> Tensor:
    """Return this microbatch's share of a mean, or 0 (still attached to the graph) if no token of the global batch counts."""
    return summed / denominator if denominator > 0 else summed * 0.0


def microbatch_loss(ce: Tensor, mse: Tensor, ce_weights: Tensor, totals: LossTotals, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """Return the loss of one microbatch and its share of the two global means.

    Args:
        ce: The unreduced cross entropy [n_ce], fp32; may be empty.
        mse: The squared error of the velocity [n_mse, channels], fp32; may be empty. A token's loss is the mean over channels.
        ce_weights: The weights of the text tokens [n_ce], used only with ``ce_loss_reweighting``.
        totals: The counts of the global batch.
        weights: The weights that combine the two losses.

    Returns:
        A scalar to differentiate, and a detached [2] tensor (ce, mse) whose sum over all microbatches and data-parallel ranks is
        the pair of global means (the original's ``losses.ce`` and ``losses.mse``).
    """
    if weights.ce_loss_reweighting:
        ce_mean = _mean_share((ce * ce_weights.to(ce.dtype)).sum(), totals.ce_weight_sum)
    else:
        ce_mean = _mean_share(ce.sum(), totals.ce_tokens)
    channels = mse.shape[-1] if mse.dim() > 1 else 1
    mse_mean = _mean_share(mse.sum() / max(channels, 1), totals.mse_tokens)
    loss = ce_mean * weights.ce_weight + mse_mean * weights.mse_weight
    return loss, torch.stack([ce_mean.detach(), mse_mean.detach()])


@dataclass(frozen=True)
class StepLosses:
    """Losses of a step averaged over its global batch, as logged. ``faults`` is the number of ranks with a number that is not finite."""

    loss: float
    ce: float
    mse: float
    faults: int = 0


def global_losses(shares: Sequence[Tensor], weights: LossWeights, *groups: dist.ProcessGroup | None, fault: bool = False) -> StepLosses:
    """Sum the shares of this rank's microbatches over ``groups``, one group after the other, and return the losses of the step.

    The sum is float64 so that the logged value does not depend on the order of microbatches beyond the last fp32 digit.
    Every rank of the groups must call this, also one without microbatch shares (an empty list counts as zeros).

    Args:
        shares: The [2] shares (ce, mse) that ``microbatch_loss`` returned on this rank.
        weights: The weights that combine the two losses.
        groups: The process groups; with none, this process is the only one.
        fault: Whether this rank has a number that is not finite.
    """
    total = torch.zeros(3, dtype=torch.float64, device=platform.device())
    for share in shares:
        total[:2] += share.double()
    total[2] = float(fault)
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(total, group=group)
    ce, mse, faults = total.tolist()
    return StepLosses(loss=ce * weights.ce_weight + mse * weights.mse_weight, ce=ce, mse=mse, faults=int(faults))
