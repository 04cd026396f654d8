# SPDX-License-Identifier: Apache-2.0
"""The Slurm example submits an array and a merge; its tasks make the index. A stand-in for sbatch runs what it is given at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bagel.data.index.reader import IndexedSamples
from tests.data.index_files import write_lines

ROOT = Path(__file__).resolve().parents[2]
SBATCH = """#!/usr/bin/env bash
# Takes --array=0-N or --wrap=COMMAND, runs every task in turn, prints a job's number.
echo "$@" >> "$CALLS"
for word in "$@"; do
    case $word in
        --array=0-*) last=${word#--array=0-} ;;
        --wrap=*) exec bash -c "${word#--wrap=}" ;;
    esac
done
for task in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$task bash "${@: -1}" >&2 || exit 1; done
echo 4711
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.distributed
def test_the_array_and_the_merge_make_the_index(goldens: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": f"number {i}"} for i in range(10)])
    (tmp_path / "data.yaml").write_text("text: {dataset_names: [plain], weight: 1}\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    settings = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "PYTHON": sys.executable, "JOBS": "2",
        "CPUS": "1",
        "DATASET_CONFIG": str(tmp_path / "data.yaml"), "DATA_ROOT": str(tmp_path), "TOKENIZER": str(goldens / "hf"),
        "OUTPUT": str(tmp_path / "index"), "SBATCH_OPTIONS": "--partition cpu",
    }  # fmt: skip
    script = ["bash", str(ROOT / "examples/build_index.sbatch")]
    done = subprocess.run(script, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--array=0-1" in calls[0] and "--partition cpu" in calls[0] and "--dependency=afterok:4711" in calls[1]
    assert len(IndexedSamples.open(tmp_path / "index").datasets["text/plain"]) == 10
