# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not run the same thing find out at once, and ranks agree on when to stop."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.config.parser import Config
from megatron_bagel.parallel.rank_coordinates import rank_list
from megatron_bagel.platform.launch.signals import StopRequest
from megatron_bagel.training.resilience.config_fingerprint import check_same_everywhere, code_hash, fingerprint
from megatron_bagel.training.resilience.stop_agreement import StepAgreement
from tests.distributed import run_ranks


def _different(odd: list[int]) -> str:
    import torch.distributed as dist

    values = {"lr": 1e-3, "results_dir": "elsewhere"} if dist.get_rank() in odd else {}
    try:
        check_same_everywhere(Config.from_values(values).to_dict())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_ranks_that_differ_from_most_are_named_on_all() -> None:
    assert run_ranks(_different, 3, []) == ["", "", ""]
    messages = run_ranks(_different, 4, [1])
    assert len(set(messages)) == 1
    assert "rank 1 (on " in messages[0] and "--lr is 0.001 there and 0.0001 elsewhere" in messages[0]
    assert "--results_dir is elsewhere there and results elsewhere" in messages[0] and "rank 2" not in messages[0]


def _stops(asked: list[int]) -> list[tuple[int, bool]]:
    import torch.distributed as dist

    request = StopRequest()
    agreement = StepAgreement(request)
    found = []
    for step in range(3):
        if step == 1 and dist.get_rank() in asked:
            request(signal.SIGTERM, None)
        found.append((agreement.exchange(dist.get_rank()), agreement.stop))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("asked", [[], [2], [0, 1, 2]])
def test_all_ranks_stop_in_the_same_step(asked: list[int]) -> None:
    expected = [(3, False), (3, bool(asked)), (3, bool(asked))]
    assert run_ranks(_stops, 3, asked) == [expected] * 3


def test_any_change_of_the_code_is_another_version(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n")
    (folder / "deep/b.py").write_text("")
    before = code_hash(folder)
    (folder / "notes.txt").write_text("not code")
    assert code_hash(folder) == before
    (folder / "a.py").write_text("x = 2\n")
    changed = code_hash(folder)
    (folder / "a.py").rename(folder / "c.py")
    assert len({before, changed, code_hash(folder)}) == 3


def test_every_setting_is_in_the_fingerprint() -> None:
    from megatron_bagel.config.parser import SECTION_OF

    assert {f"--{name}" for name in SECTION_OF} <= fingerprint(Config().to_dict()).keys()


@given(st.sets(st.integers(0, 40), min_size=1))
def test_a_list_of_ranks_says_each_once(ranks: set[int]) -> None:
    words = rank_list(sorted(ranks)).split(" ", 1)[1]
    said: list[int] = []
    for part in words.split(", "):
        first, _, last = part.partition("-")
        said += range(int(first), int(last or first) + 1)
    assert said == sorted(ranks)
