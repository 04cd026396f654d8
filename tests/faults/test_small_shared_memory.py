# SPDX-License-Identifier: Apache-2.0
"""Commands with worker processes where ``/dev/shm`` has no room for their semaphores: one sentence that names it and the way around."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from megatron_bagel.cli.data import verify
from tests.data.golden_index import CONFIG, build_golden_index
from tests.faults.commands import start

PAGE = 4096


def test_workers_without_room_for_semaphores(goldens: Path, tmp_path: Path) -> None:
    probe = start(["--version"], tmp_path / "probe", 60, shared_memory=PAGE).wait()
    if probe.status != 0:
        pytest.skip(f"no file system can be mounted on /dev/shm: {probe.errors}")
    build_golden_index(goldens, tmp_path / "index")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(CONFIG))
    build = [
        "data", "build", "--dataset_config_file", str(tmp_path / "data.yaml"), "--data_root", str(goldens / "raw_data"),
        "--tokenizer", str(goldens / "hf"), "--output", str(tmp_path / "other"), "--rows_per_shard", "2",
    ]  # fmt: skip
    for words, what in (
        (["data", "verify", str(tmp_path / "index")], "2 processes that verify"),
        (build, "2 worker processes of the build"),
    ):
        ended = start([*words, "--workers", "2"], tmp_path / "log", 120, shared_memory=PAGE).wait()
        assert ended.status == 2 and "Traceback" not in ended.errors, ended.errors
        assert f"{what} cannot be started: " in ended.errors and "make room there (docker run --ipc host" in ended.errors
        assert start([*words, "--workers", "0"], tmp_path / "log", 120, shared_memory=PAGE).wait().status == 0


def test_a_process_of_the_verification_that_is_killed_is_said() -> None:
    with pytest.raises(ValueError, match="a process that verifies was killed, perhaps because memory ran out; use fewer --workers"):
        list(verify.results(_ends, [1, 2], workers=2))


def _ends(number: int) -> list[str]:
    os._exit(number)
