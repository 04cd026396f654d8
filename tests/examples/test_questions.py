"""The quickstart's questions have known answers: a perfect model scores full marks, a blind one does not."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.inference.batch.prompts import read_prompts
from megatron_bagel.sample_world.world import render

SCRIPT = Path(__file__).parents[2] / "examples/quickstart/questions.py"


@pytest.fixture(scope="module")
def questions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_questions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(questions: ModuleType, asked: Path, answered: Path, perfect: bool) -> None:
    """Writes results.jsonl and pictures as the generator does."""
    answered.mkdir()
    rows = []
    for prompt, truth in zip(questions.read_lines(asked / "prompts.jsonl"), questions.read_lines(asked / "truth.jsonl"), strict=True):
        scene = questions.to_scene(truth["scene"])
        row = {"id": truth["id"], "task": prompt["task"]}
        if "question" in truth:
            row["text"] = getattr(scene.shapes[0], questions.QUESTIONS[truth["question"]]) if perfect else "yes"
        else:
            row["image"] = f"{truth['id']}.png"
            pixels = render(scene) if perfect else np.zeros((64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(answered / row["image"])
        rows.append(json.dumps(row))
    (answered / "results.jsonl").write_text("\n".join(rows) + "\n")


def test_scores_tell_a_perfect_model_from_a_blind_one(questions: ModuleType, tmp_path: Path, capsys) -> None:
    asked = tmp_path / "questions"
    questions.main(["make", str(asked), "--pictures", "6", "--answers", "4", "--edits", "3"])
    prompts = read_prompts(asked / "prompts.jsonl", "t2i", {})
    assert [prompt.task for prompt in prompts] == ["t2i"] * 6 + ["understand"] * 4 + ["edit"] * 3
    for prompt in prompts:
        prompt.check_files()
    for perfect in (True, False):
        answered = tmp_path / str(perfect)
        answer(questions, asked, answered, perfect)
        table = questions.score(asked, answered)
        assert set(table) == {"t2i colour", "t2i position", "t2i shape", "question colour", "question shape",
                              "edit colour", "edit position", "edit shape"}  # fmt: skip
        assert all(all(right) if perfect else not any(right) for right in table.values())
        questions.main(["score", str(asked), str(answered)])
    assert "100%" in capsys.readouterr().out
    with Image.open(tmp_path / "True/grid.png") as grid:
        assert grid.size == (8 * 136, 2 * 136)


def test_scoring_before_generating_is_refused(questions: ModuleType, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        questions.main(["score", str(tmp_path), str(tmp_path)])
    assert "results.jsonl" in capsys.readouterr().err
