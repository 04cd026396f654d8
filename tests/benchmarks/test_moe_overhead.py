# SPDX-License-Identifier: Apache-2.0
"""The benchmark of sparse MLPs runs, and its parts are those of the layer."""

from __future__ import annotations

import pytest
import torch

from benchmarks.moe_overhead import Sizes, measure


@pytest.mark.usefixtures("single_rank")
def test_every_part_is_measured() -> None:
    figures = measure(Sizes(hidden=32, experts=4, topk=2, width=16, tokens=24), rounds=1)
    around = {
        "router",
        "permutation",
        "exchange",
        "permutation_of_received",
        "permutation_of_results",
        "exchange_of_results",
        "combination",
    }
    assert set(figures["parts_s"]) == {"experts", *around}
    assert set(figures["share_of_dense"]) == {"smaller_products", "elements", *around}
    assert all(seconds > 0 for seconds in [figures["parts_s"]["experts"], figures["dense_s"], figures["sparse_s"], figures["products_s"]])
    assert figures["overhead"] == pytest.approx(figures["sparse_s"] / figures["dense_s"] - 1)
    assert figures["threads"] == torch.get_num_threads()
