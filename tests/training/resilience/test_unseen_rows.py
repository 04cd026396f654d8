# SPDX-License-Identifier: Apache-2.0
"""New rows of the vocabulary are said once, also where each rank has a results folder of its own (`test_lora_runs.py` has whole runs)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_bagel.training.resilience.events import EVENTS, EventFile
from megatron_bagel.training.resilience.unseen_rows import NewRows, UnseenRows
from tests.distributed import run_ranks


def _two_steps(folder: Path) -> str:
    """Rank 0 sees its own folder, and so does rank 1: disks of two machines."""
    own = folder / str(dist.get_rank())
    own.mkdir(exist_ok=True)
    hook = UnseenRows(NewRows({7: "<seven>"}, own, total_steps=2), EventFile(own))
    hook.start()
    done: Any = SimpleNamespace(step=1)
    for _ in range(2):
        hook.after_step(done)
    return (own / EVENTS).read_text() if (own / EVENTS).is_file() else ""


@pytest.mark.distributed
def test_a_rank_that_has_not_said_it_waits_for_nobody(tmp_path: Path) -> None:
    first = run_ranks(_two_steps, 2, tmp_path, parallel={}, timeout=60)
    assert first[0].count("unseen_rows") == 1 and "<seven>" in first[0] and first[1] == ""
    assert run_ranks(_two_steps, 2, tmp_path, parallel={}, timeout=60) == first
