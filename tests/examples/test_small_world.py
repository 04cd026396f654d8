# SPDX-License-Identifier: Apache-2.0
"""The small world's exam script: the world that was trained on is read back, and every step's marks reach the table and the curves."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from megatron_bagel.cli.data import sample as make_sample_data
from megatron_bagel.sample_world.exam import read_lines
from megatron_bagel.sample_world.world import World, parse_pairs

SCRIPT = Path(__file__).parents[2] / "examples/small_world/exam.py"
HELD_OUT = ["red:square", "cyan:cross"]


@pytest.fixture(scope="module")
def exam() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_world_exam", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_from_the_data_to_the_table(exam: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_sample_data.main([str(tmp_path / "data"), "--t2i", "2", "--edit", "2", "--vlm", "2", "--hold-out", *HELD_OUT])
    assert exam.read_world(tmp_path / "data/world.json") == World(held_out=parse_pairs(HELD_OUT))
    exam.main(["ask", str(tmp_path / "data/world.json"), str(tmp_path / "exam"), "--pictures", "4", "--questions", "2", "--edits", "2"])
    # Step 10 answers every question wrongly, step 200 rightly; pictures are those that were shown.
    for step, right in (("0000010", False), ("0000200", True)):
        folder = tmp_path / "answers" / step
        folder.mkdir(parents=True)
        rows = []
        for prompt, truth in zip(read_lines(tmp_path / "exam/prompts.jsonl"), read_lines(tmp_path / "exam/truth.jsonl"), strict=True):
            row = {"id": truth["id"], "task": prompt["task"]}
            if "answer" in truth:
                row["text"] = truth["answer"] if right else "no"
            else:
                row["image"] = f"{truth['id']}.png"
                shown = next(path for path in (tmp_path / "exam").glob("edit_*.png"))
                (folder / row["image"]).write_bytes(shown.read_bytes())
            rows.append(json.dumps(row) + "\n")
        (folder / "results.jsonl").write_text("".join(rows))
    exam.main(["marks", str(tmp_path / "exam"), str(tmp_path / "answers")])
    first, last = read_lines(tmp_path / "answers/marks.jsonl")
    assert (first["step"], last["step"]) == (10, 200)
    assert first["marks"]["question colour"] == {"seen": 0.0, "held out": 0.0}
    assert last["marks"]["question colour"] == {"seen": 1.0, "held out": 1.0}
    assert (tmp_path / "answers/marks.png").stat().st_size > 5000
    said = capsys.readouterr().out
    exam.main(["compare", str(tmp_path), str(tmp_path)])
    assert "question position" in (table := capsys.readouterr().out) and table.count("100.0%") >= 6
    assert "after 200 steps" in said and "question position" in said and "held-out pairs" in said


def test_a_world_that_is_not_there_is_named(exam: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        exam.main(["ask", str(tmp_path / "world.json"), str(tmp_path / "exam")])
    assert "there is no file" in capsys.readouterr().err
