# SPDX-License-Identifier: Apache-2.0
"""The text of torch's error holds a traceback of every rank; ours holds each reason once."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_bagel.checkpoint.dist.stream_write import write_checkpoint
from megatron_bagel.checkpoint.dist.write_errors import source_error, space_advice, write_reasons
from tests.checkpoint.hf.test_weight_map import tiny_arch


def test_reasons_without_tracebacks() -> None:
    stack = traceback.extract_stack()
    short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0: c10::ThrowEnforceNotMet")
    error = CheckpointException("write", {0: (short, stack), 1: (short, stack), 2: (OSError(28, "No space left on device"), stack)})
    assert "Traceback (most recent call last)" in str(error)
    position = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    assert write_reasons(error) == f"{position}; [Errno 28] No space left on device"
    assert write_reasons(OSError(28, "No space left on device", "/x")) == "[Errno 28] No space left on device: '/x'"


def test_an_error_of_what_was_to_be_written_is_no_error_of_writing() -> None:
    stack = traceback.extract_stack()
    broken = ValueError("model.safetensors: tensor a holds NaN")
    assert source_error(CheckpointException("write", {0: (broken, stack)})) is broken
    assert source_error(CheckpointException("write", {0: (OSError(28, "No space left on device"), stack)})) is None
    assert source_error(OSError(28, "No space left on device")) is None


def test_a_checkpoint_that_cannot_be_written_gets_advice_about_space_only_where_space_is_short(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^cannot write a checkpoint into .*file/out \(.*Not a directory.*\); find out what changed"):
        write_checkpoint(tmp_path / "file/out", 1, tiny_arch(), {}, {}.__getitem__, {"run": {}})


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
