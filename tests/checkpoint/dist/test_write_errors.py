# SPDX-License-Identifier: Apache-2.0
"""The text of torch's error holds a traceback of every rank; ours holds each reason once."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bagel.checkpoint.dist.write_errors import space_advice, write_reasons


def test_reasons_without_tracebacks() -> None:
    stack = traceback.extract_stack()
    short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0: c10::ThrowEnforceNotMet")
    error = CheckpointException("write", {0: (short, stack), 1: (short, stack), 2: (OSError(28, "No space left on device"), stack)})
    assert "Traceback (most recent call last)" in str(error)
    position = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    assert write_reasons(error) == f"{position}; [Errno 28] No space left on device"
    assert write_reasons(OSError(28, "No space left on device", "/x")) == "[Errno 28] No space left on device: '/x'"


def test_advice_names_the_folder_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"shared": 40_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[Path(folder).name]))
    shared = tmp_path / "shared"
    assert space_advice(10**11, tmp_path / "absent").startswith("the disk has 100000.0 MB free")
    shared.mkdir()
    assert space_advice(10**11, shared).startswith(f"{shared}, which the writing processes need, has 0.0 MB free")
    assert space_advice(10**6, shared).startswith("the disk has 1.0 MB free")
    free["shared"] = 64 * 2**20
    assert space_advice(10**11, shared).startswith("the disk has 100000.0 MB free")
