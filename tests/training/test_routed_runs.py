# SPDX-License-Identifier: Apache-2.0
"""A token whose choice of experts rounding decides is found, and a run with one is not compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bagel.model.router_statistics import RouterStatistics
from tests.training.routed_runs import TIE, RoutedReference, margins_in


def test_the_margin_is_between_the_last_chosen_and_the_first_rejected_expert(tmp_path: Path) -> None:
    clear, tied = torch.tensor([[2.0, 1.0, 0.5], [0.0, 2.0, 2.0]]), torch.tensor([[0.5, 2.0, 0.5 + 1e-7]])
    with margins_in(tmp_path / "margins"):
        for logits in (clear, tied, torch.empty(0, 3)):
            RouterStatistics(3).count(logits, torch.zeros(len(logits), 3, dtype=torch.bool), topk=2)
    RouterStatistics(3).count(tied, torch.zeros(1, 3, dtype=torch.bool), topk=2)  # outside of the block nothing is written
    margins = [float(line) for line in (tmp_path / "margins").read_text().splitlines()]
    assert len(margins) == 2 and margins[0] == 0.5 and 0 < margins[1] < TIE


@pytest.mark.parametrize("margin", [TIE / 2, 10 * TIE])
def test_a_run_with_a_tie_is_refused(tmp_path: Path, margin: float) -> None:
    reference = RoutedReference(tmp_path, tmp_path)
    reference.made["{}"], reference.margins["{}"] = ([], {}), margin
    if margin > TIE:
        assert reference.run({}) == ([], {})
        return
    with pytest.raises(AssertionError, match="give the case another global_seed"):
        reference.run({})
