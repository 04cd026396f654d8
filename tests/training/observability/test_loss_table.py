# SPDX-License-Identifier: Apache-2.0
"""Means by dataset are those of the tokens of that dataset, wherever they lie."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, build_pack
from megatron_bagel.training.observability.loss_table import QUARTERS, LossTable

DATASETS = ("t2i_pretrain/a", "t2i_pretrain/b", "vlm_sft/c")


@given(st.data())
def test_means_are_those_of_each_dataset(data: st.DataObject) -> None:
    samples = data.draw(st.lists(st.sampled_from(DATASETS), min_size=1, max_size=5))
    ce_samples = np.array(data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=12)), dtype=np.int64)
    mse_samples = np.array(data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=12)), dtype=np.int64)
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    ce, mse, times = draw.random(len(ce_samples)), draw.random((len(mse_samples), 3)), draw.random(len(mse_samples))
    batch = SimpleNamespace(
        datasets=tuple(samples), ce_samples=torch.from_numpy(ce_samples), mse_samples=torch.from_numpy(mse_samples),
        timesteps=torch.from_numpy(times), mse_rows=torch.arange(len(times)),
    )  # fmt: skip
    table = LossTable(DATASETS, QUARTERS)
    table.add(batch, torch.from_numpy(ce), torch.from_numpy(mse))
    means = table.means()
    names = np.array(samples)
    for name in ("", "t2i_pretrain", "vlm_sft", *DATASETS):
        where = f"/{name}" if name else ""
        for kind, values, owners in (("ce", ce, ce_samples), ("mse", mse.mean(1), mse_samples)):
            mine = np.array([owner.startswith(name) for owner in names[owners]], dtype=bool)
            if not mine.any():
                assert f"{kind}{where}" not in means
                continue
            assert means[f"{kind}{where}"] == pytest.approx(values[mine].mean())
            if kind == "mse" and name in DATASETS:
                for low, high in zip(QUARTERS, QUARTERS[1:], strict=False):
                    inside = mine & (times > low) & (times <= high)
                    key = f"mse/{name}/t{low:.2f}-{high:.2f}"
                    assert means.get(key) == (pytest.approx(values[inside].mean()) if inside.any() else None)


def test_tokens_know_their_sample_also_after_one_of_which_nothing_is_left() -> None:
    spec = LayoutSpec(1, 2, 3, 4)
    texts = [Item("text", loss=True, ids=np.arange(count), dropped=count == 9) for count in (2, 9, 1, 3)]
    samples = [Sample("a", 0, 0, (texts[0],)), Sample("b", 0, 0, (texts[1],)), Sample("c", 0, 0, tuple(texts[2:]))]
    pack = build_pack(samples, spec)
    assert pack.sample_numbers(pack.ce_positions).tolist() == [0] * 3 + [2] * (2 + 4)
