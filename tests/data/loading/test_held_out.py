# SPDX-License-Identifier: Apache-2.0
"""Validation packs: every chosen sample once over all replicas, none of training's, the same on every layout."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.config.parser import Config
from megatron_bagel.data.loading.build import training_sources
from megatron_bagel.data.loading.held_out import held_out_packs, share_of
from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.planner.group_source import GroupSource
from tests.runs import make_world, resolved, run_config


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 4))
def test_replicas_share_every_pack_once(packs: int, replicas: int, multiple: int) -> None:
    plans = [PackPlan(number, ((0, number, 0),), 1, 1.0) for number in range(packs)]
    shares = [share_of(plans, replica, replicas, multiple) for replica in range(replicas)]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) % multiple == 0
    counted = Counter(pack.plan.number for share in shares for pack in share if not pack.repeated)
    assert counted == Counter(range(packs))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("world")
    return run_config(make_world(folder), folder / "results", split="75,25")


def sources(config: Config, part: str) -> list[GroupSource]:
    run = resolved(config)
    return training_sources(run.data, run.arch, run.tokenizer, part)


def rows(found: list[GroupSource], samples: list[tuple[int, int, int]]) -> set[tuple[str, int]]:
    return {(s.dataset, s.index) for s in (found[source].sample(index, epoch) for source, index, epoch in samples)}


def test_packs_hold_held_out_rows_of_every_dataset(config: Config) -> None:
    held_out, trained = sources(config, "validation"), sources(config, "train")
    plans = held_out_packs(held_out, 3, 320, 256)
    samples = [sample for plan in plans for sample in plan.samples]
    assert len(set(samples)) == len(samples) and all(plan.tokens <= 320 for plan in plans)
    counts = Counter(held_out[source].name for source, _, _ in samples)
    assert counts == {"t2i_pretrain": 3, "unified_edit": 3, "vlm_sft": 3, "text": 2}
    of_training = rows(trained, [(n, i, 0) for n, source in enumerate(trained) for i in range(len(source))])
    assert not rows(held_out, samples) & of_training
    assert plans == held_out_packs(sources(config, "validation"), 3, 320, 256)


def test_nothing_short_enough_is_said(config: Config) -> None:
    with pytest.raises(ValueError, match="no held-out sample is short enough"):
        held_out_packs(sources(config, "validation"), 3, 320, 2)
