# SPDX-License-Identifier: Apache-2.0
"""The small world's one command, from nothing to the table, with hardly any data and two steps; a second run reuses every stage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bagel.sample_world.exam import read_lines

REPOSITORY = Path(__file__).parents[2]
ONLY_PUZZLES = "--pictures 0 --questions 0 --edits 0 --puzzles"
FEW = {"T2I": "30", "EDIT": "30", "VLM": "60", "PROCESSES": "1", "QUESTION_STEPS": "2",
       "EXAM": "--pictures 2 --questions 2 --edits 2", "PYTHON": sys.executable,
       "PUZZLES": "60", "PUZZLE_STEPS": "2", "PUZZLE_EXAM": f"{ONLY_PUZZLES} 2"}  # fmt: skip
SHORT = ["--total_steps", "2", "--warmup_steps", "0", "--save_every", "2", "--eval_every", "2", "--eval_samples", "4", "--num_workers", "0",
         "--global_batch_size", "2", "--split", "50,50"]  # fmt: skip


def run(out: Path, script: str = "run.sh", **variables: str) -> str:
    command = ["bash", f"examples/small_world/{script}", str(out), *SHORT]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **FEW, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.distributed
def test_one_command_from_nothing_to_the_table(tmp_path: Path) -> None:
    said = run(tmp_path / "out")
    table = said.rpartition("== marks (")[2]
    assert "after 2 steps; puzzles: after 2" in table and "autoencoder alone" in table
    assert all(name in table for name in ("t2i colour", "question shape", "edit recolour success", "interleaved all"))
    [line] = [line for line in said.splitlines() if "tensors are absent and allowed to be" in line]
    assert "time_embedder.mlp.0.weight" in line, "the second stage starts from the first one's weights"
    (row,) = read_lines(tmp_path / "out/answers/marks.jsonl")
    assert set(row["marks"]["t2i colour"]) == {"seen", "held out"}
    assert list((tmp_path / "out/results/samples").glob("*_unified_edit.png")), "a run with stored latents draws its sheets"
    answered = tmp_path / "out/answers/0000002/results.jsonl"
    before = answered.stat().st_mtime_ns
    again = run(tmp_path / "out")
    assert again.count("reusing") == 6 and "after 2 steps" in again
    assert answered.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.distributed
def test_puzzles_are_trained_and_asked_in_order(tmp_path: Path) -> None:
    few = {"INTERLEAVED": "60", "EXAM": f"{ONLY_PUZZLES} 4"}
    said = run(tmp_path / "out", "interleaved.sh", **few)
    assert all(f"interleaved {name}" in said for name in ("thought", "colour", "position", "shape", "background", "all"))
    rows = read_lines(tmp_path / "out/answers/0000002/results.jsonl")
    assert len(rows) == 4 and all([*item] == ["text", "finished"] for item in (row["items"][0] for row in rows))
    assert all((tmp_path / "out/answers/0000002" / row["items"][1]["image"]).is_file() for row in rows)
