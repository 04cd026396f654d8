# SPDX-License-Identifier: Apache-2.0
"""What a logged step says about itself: extremes over ranks, and the same composition on any layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_bagel.data.loading.planned_steps import BatchTotals
from megatron_bagel.training.observability.step_stats import compared_over_ranks
from megatron_bagel.training.observability.timers import PHASES, RARE
from tests.distributed import run_ranks
from tests.runs import make_world, run, run_config
from tests.training.test_step_result import loaded


def _compare() -> dict[str, float]:
    import torch.distributed as dist

    rank = dist.get_rank()
    packs = [loaded([("t2i", 100 * (rank + 1))], (10.0, 30.0)[rank])]
    batch = SimpleNamespace(packs=packs, totals=BatchTotals(2, 2, 40.0))
    return compared_over_ranks({"encode": 1.0 + rank, "save": 0.0, "eval": 2.0 * rank}, batch, tokens=300, replicas=2)


@pytest.mark.distributed
def test_extremes_are_those_of_all_ranks_on_every_rank() -> None:
    first, second = run_ranks(_compare, 2)
    memory = {name: first.pop(name) for name in ("memory/peak_bytes", "memory/resident_bytes")}
    assert memory == {name: second.pop(name) for name in memory} and min(memory.values()) > 1e6
    expected = {"time/encode": 2.0, "time_min/encode": 1.0, "time/eval": 2.0, "time_min/eval": 0.0}
    assert first == second == {**expected, "imbalance/tokens": 4 / 3, "imbalance/cost": 1.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_on_two_ranks_tells_of_the_same_batches_as_on_one(world: Path, tmp_path: Path) -> None:
    traces = {"profile": True, "profile_step_start": 1, "profile_step_end": 2, "profile_ranks": [1]}
    one = run(run_config(world, tmp_path / "one", prometheus_file=str(tmp_path / "one.prom")))
    two = run(run_config(world, tmp_path / "two", ranks=2, barrier_timers=True, **traces), ranks=2)
    for alone, record in zip(one, two, strict=True):
        same = [name for name in record if name.startswith(("task_", "expert_", "pack_fill"))]
        assert len(same) >= 2 * 3 + 3 and [record[name] for name in same] == [alone[name] for name in same]
        for prefix, total in (("task_tokens/", "step_tokens"), ("task_samples/", "step_samples"), ("expert_tokens/", "step_tokens")):
            assert sum(value for name, value in record.items() if name.startswith(prefix)) == record[total]
        assert record["expert_tokens/generation"] > 0 and 0 < record["pack_fill"] <= 1
        assert alone["imbalance/tokens"] == alone["imbalance/cost"] == 1 <= record["imbalance/tokens"] < 2
        assert {f"time/{phase}" for phase in PHASES} - {f"time/{phase}" for phase in RARE} <= set(record)
        assert 0 < record["time_min/forward_backward"] <= record["time/forward_backward"] < record["step_time_s"]
    assert ["time/save" in record for record in one] == [False, False, True, False], "a save shows on the next line"
    assert [path.name for path in (tmp_path / "two/traces").iterdir()] == ["rank1_steps1-1.json.gz"]
    assert "megatron_bagel_phase_seconds" in (tmp_path / "one.prom").read_text()
