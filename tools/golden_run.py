# SPDX-License-Identifier: Apache-2.0
"""One step of training on recorded batches, and how its losses and gradients are compared with the recorded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.layout.order import expert_order
from megatron_bagel.model.batch import make_microbatch
from megatron_bagel.training.losses import LossTotals, LossWeights, microbatch_loss
from tools.golden_common import ELEMENT_ABS, ELEMENT_REL, NORM_REL, Comparison
from tools.golden_model import GoldenBatch, Parts, RecordedImageEncoder


@dataclass
class Outcome:
    """Forward and backward of some microbatches: each one's (ce, mse) share and unreduced losses, and the summed gradients."""

    shares: list[Tensor]
    ce: list[Tensor]
    mse: list[Tensor]
    gradients: dict[str, Tensor | None]

    @property
    def total_norm(self) -> float:
        """L2 norm of all gradients together."""
        squares = [gradient.double().square().sum() for gradient in self.gradients.values() if gradient is not None]
        return float(torch.stack(squares).sum().sqrt())


def run(
    parts: Parts,
    batches: Sequence[GoldenBatch],
    image_encoder: RecordedImageEncoder,
    totals: Sequence[LossTotals] | None = None,
    weights: LossWeights | None = None,
    backend: str = "sdpa",
    backward: bool = True,
) -> Outcome:
    """Microbatches of one step, through the image encoder, the decoder and the losses. ``totals``: of each microbatch's step."""
    totals = totals or [LossTotals.of(batch.pack for batch in batches)] * len(batches)
    outcome = Outcome([], [], [], {})
    for module in parts.modules:
        module.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(backward):
        features = image_encoder.encode([batch.loaded for batch in batches])
        for batch, encoded, total in zip(batches, features, totals, strict=True):
            microbatch = make_microbatch(batch.pack, expert_order(batch.pack), encoded, backend, platform.device())
            ce, mse = parts.decoder(microbatch)
            loss, shares = microbatch_loss(ce, mse, microbatch.ce_weights, total, weights or LossWeights())
            if backward:
                loss.backward()
            outcome.shares.append(shares)
            outcome.ce.append(ce.detach())
            outcome.mse.append(mse.detach())
    if backward:
        image_encoder.backward()
        outcome.gradients = parts.by_recorded_name(lambda parameter: parameter.grad)
    return outcome


def compare_losses(
    check: Comparison, shares: Tensor, want: Mapping[str, float], weights: LossWeights | None = None, scale: float = 1.0
) -> None:
    """Shares (ce, mse) times ``scale`` and their weighted sum, as far as they were recorded."""
    weights = weights or LossWeights()
    ce, mse = (float(share) * scale for share in shares)
    got = {"ce": ce, "mse": mse, "loss": ce * weights.ce_weight + mse * weights.mse_weight}
    for name, value in want.items():
        check.norms(name, got[name], value)


def compare_gradients(check: Comparison, outcome: Outcome, want: Mapping[str, Any]) -> None:
    """Norm (and sum) of every recorded gradient; what was not recorded must be absent or exactly zero."""
    got = outcome.gradients
    # Some gradients are zero but for rounding (key biases, which softmax does not see): fp32's resolution of the whole is their floor.
    floor = torch.finfo(torch.float32).eps * outcome.total_norm
    for name, value in want.items():
        gradient = got.get(name)
        if gradient is None:
            check.failures.append(f"{name}: no gradient")
            continue
        recorded = value if isinstance(value, Mapping) else {"norm": value}
        check.close(f"norm of {name}", gradient.double().norm(), recorded["norm"], floor, NORM_REL)
        if "sum" in recorded:
            check.close(f"sum of {name}", gradient.double().sum(), recorded["sum"], ELEMENT_ABS, ELEMENT_REL)
    compare_untouched(check, got, [name for name in got if name not in want])


def compare_untouched(check: Comparison, got: Mapping[str, Tensor | None], names: Sequence[str]) -> None:
    """These have no gradient or exact zeros."""
    touched = [name for name in names if (gradient := got.get(name)) is not None and bool(gradient.any())]
    check.same("parameters with a gradient that the original has not", touched, [])


def compare_totals(check: Comparison, totals: LossTotals, want: Mapping[str, Any]) -> None:
    """Token counts of the whole batch."""
    recorded = {"total_ce_tokens": totals.ce_tokens, "total_ce_weights": totals.ce_weight_sum, "total_mse_tokens": totals.mse_tokens}
    for name, got in recorded.items():
        if name in want:
            check.norms(name, got, want[name])
