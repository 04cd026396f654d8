# SPDX-License-Identifier: Apache-2.0
"""Each loss is divided by its global token count: the same gradients however the tokens fall on microbatches and ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_bagel.training.losses import LossTotals, LossWeights, global_losses, microbatch_loss
from tests.distributed import run_ranks


@dataclass
class _Pack:
    ce_weights: np.ndarray
    mse_positions: np.ndarray


def _golden(goldens: Path, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LossTotals]:
    expected = load_file(goldens / "train" / f"{name}_expected.safetensors")
    weights = load_file(goldens / "batches" / f"{name}.safetensors")["ce_loss_weights"]
    totals = LossTotals.of([_Pack(weights.numpy(), np.arange(len(expected["mse"])))])
    return expected["ce"], expected["mse"], weights, totals


@pytest.mark.parametrize(
    ("key", "weights"),
    [("losses", LossWeights()), ("losses_reweighted", LossWeights(ce_loss_reweighting=True))],
)
def test_equals_the_original(goldens: Path, key: str, weights: LossWeights) -> None:
    recorded = json.loads((goldens / "train" / "expected.json").read_text())["flex_0"]
    ce, mse, ce_weights, totals = _golden(goldens, "flex_0")
    assert (totals.ce_tokens, totals.mse_tokens) == (recorded["total_ce_tokens"], recorded["total_mse_tokens"])
    assert totals.ce_weight_sum == pytest.approx(recorded["total_ce_weights"], rel=1e-6)
    loss, shares = microbatch_loss(ce, mse, ce_weights, totals, weights)
    expected = recorded[key]
    assert shares.tolist() == pytest.approx([expected["ce"], expected["mse"]], rel=1e-5)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)


def test_weights_of_the_losses(goldens: Path) -> None:
    expected = json.loads((goldens / "train" / "expected.json").read_text())["flex_0_reweight_ce0.25_mse1.5"]["losses"]
    ce, mse, ce_weights, totals = _golden(goldens, "flex_0")
    loss, _ = microbatch_loss(ce, mse, ce_weights, totals, LossWeights(0.25, 1.5, True))
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("reweighting", [False, True])
def test_two_ranks_share_one_mean(goldens: Path, reweighting: bool) -> None:
    """The original logs each rank's loss times the number of ranks; half of it is that rank's share here."""
    recorded = json.loads((goldens / "train" / "expected.json").read_text())["two_ranks"]
    packs = [_golden(goldens, name) for name in ("flex_0", "flex_1")]
    totals = packs[0][3] + packs[1][3]
    weights = LossWeights(ce_loss_reweighting=reweighting)
    expected = recorded["reweighted"] if reweighting else recorded
    shares = [microbatch_loss(ce, mse, w, totals, weights)[1] for ce, mse, w, _ in packs]
    for rank, share in enumerate(shares):
        assert (2 * share).tolist() == pytest.approx([expected[f"rank{rank}"]["ce"], expected[f"rank{rank}"]["mse"]], rel=1e-5)
    if not reweighting:
        logged = global_losses(shares, weights)
        assert [logged.ce, logged.mse] == pytest.approx([recorded["logged_ce"], recorded["logged_mse"]], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=5), st.booleans(), st.randoms())
def test_any_split_gives_the_gradient_of_the_whole(pieces: list[tuple[int, int]], reweighting: bool, random: object) -> None:
    generator = torch.Generator().manual_seed(len(pieces))
    n_ce, n_mse = (sum(piece[i] for piece in pieces) for i in (0, 1))
    ce_values = torch.rand(n_ce, generator=generator, requires_grad=True)
    mse_values = torch.rand(n_mse, 3, generator=generator, requires_grad=True)
    ce_weights = torch.rand(n_ce, generator=generator) + 0.1
    weights = LossWeights(0.7, 1.3, reweighting)
    totals = LossTotals(n_ce, float(ce_weights.double().sum()), n_mse)
    shares, ce_at, mse_at = [], 0, 0
    for ce_n, mse_n in pieces:
        ce, mse = ce_values[ce_at : ce_at + ce_n], mse_values[mse_at : mse_at + mse_n]
        loss, share = microbatch_loss(ce, mse, ce_weights[ce_at : ce_at + ce_n], totals, weights)
        loss.backward()
        shares.append(share)
        ce_at, mse_at = ce_at + ce_n, mse_at + mse_n
    scale = ce_weights / ce_weights.sum() if reweighting else torch.full((n_ce,), 1.0 / max(n_ce, 1))
    torch.testing.assert_close(ce_values.grad, 0.7 * scale)
    torch.testing.assert_close(mse_values.grad, torch.full((n_mse, 3), 1.3 / (3 * max(n_mse, 1))))
    losses = global_losses(shares, weights)
    assert losses.ce == pytest.approx(float((ce_values.detach() * scale).sum()), abs=1e-5)


def test_nothing_to_learn_is_zero_and_differentiable() -> None:
    leaf = torch.ones(3, requires_grad=True)
    loss, shares = microbatch_loss(leaf[:0], leaf[:0].view(0, 1), leaf[:0], LossTotals(), LossWeights(ce_loss_reweighting=True))
    loss.backward()
    assert loss.item() == 0.0 and shares.tolist() == [0.0, 0.0] and torch.equal(leaf.grad, torch.zeros(3))


def _logged_on(rank_shares: list[list[float]]) -> tuple[float, float, float]:
    shares = [torch.tensor(rank_shares[dist.get_rank()])] if rank_shares[dist.get_rank()] else []
    losses = global_losses(shares, LossWeights(2.0, 1.0), dist.group.WORLD)
    return losses.loss, losses.ce, losses.mse


@pytest.mark.distributed
def test_logged_losses_are_sums_over_ranks_even_with_an_idle_one() -> None:
    for loss, ce, mse in run_ranks(_logged_on, 2, [[0.5, 0.25], []]):
        assert (loss, ce, mse) == (1.25, 0.5, 0.25)
