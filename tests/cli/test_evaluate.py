# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: files made here in each published format are read, answered, and written where the scorer looks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_bagel.cli.evaluate import main
from megatron_bagel.inference.batch.benchmarks import BENCHMARKS, BenchmarkItem, read_benchmark
from tests.inference.tiny_model import write_tiny_model


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_geneval(folder: Path) -> Path:
    rows = [{"tag": "colors", "include": [{"class": "bench", "count": 1}], "prompt": f"a photo of a {what}"} for what in ("bench", "cow")]
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "evaluation_metadata.jsonl"


def write_wise(folder: Path) -> Path:
    for file, first in (("cultural.json", 1), ("natural.json", 3)):
        rows = [{"prompt_id": first + n, "Prompt": "a plant", "Explanation": "e", "Category": "c"} for n in range(2)]
        (folder / file).write_text(json.dumps(rows))
    return folder


def write_gedit(folder: Path) -> Path:
    shared = {"key": "k1", "task_type": "color_alter", "input_image": {"bytes": png("red")}}
    rows = [{**shared, "instruction": text, "instruction_language": name} for name, text in (("en", "make it blue"), ("cn", "blue"))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    return folder


def write_questions(folder: Path) -> Path:
    (folder / "a.png").write_bytes(png("blue"))
    rows = [{"question_id": n, "image": "a.png", "text" if n else "question": "what color is it?", "label": "no"} for n in range(2)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


def write_mme(folder: Path) -> Path:
    (folder / "color").mkdir()
    (folder / "color/a.png").write_bytes(png("blue"))
    (folder / "color.txt").write_text("a.png\tIs it blue?\tYes\na.png\tIs it red?\tNo\n")
    return folder


def answered(items: list[BenchmarkItem], made: Path, samples: int = 1) -> dict[str, list[dict]]:
    """Answers as a run leaves them: one picture or text for each sample."""
    found = {}
    for item in items:
        for number in range(samples):
            Image.new("RGB", (8, 8), "green").save(made / f"{item.prompt.name}_{number}.png")
        found[item.prompt.name] = [{"image": f"{item.prompt.name}_{n}.png", "text": "blue\nsky"} for n in range(samples)]
    return found


EXPECTED = {
    "geneval": (write_geneval, ["00000/metadata.jsonl", "00000/samples/00000.png", "00000/samples/00001.png", "00001/samples/00001.png"]),
    "wise": (write_wise, ["images/1.png", "images/4.png"]),
    "gedit": (write_gedit, ["fullset/color_alter/en/k1.png", "fullset/color_alter/cn/k1.png", "fullset/color_alter/cn/k1_SRCIMG.png"]),
    "vqa": (write_questions, ["answers.json"]),
    "mmvet": (write_questions, ["answers.json"]),
    "mme": (write_mme, ["color.txt"]),
}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_each_format_is_read_and_handed_on(tmp_path: Path, name: str) -> None:
    for folder in ("questions", "made", "out"):
        (tmp_path / folder).mkdir()
    write, files = EXPECTED[name]
    items = read_benchmark(name, write(tmp_path / "questions"), tmp_path / "work")
    assert len({item.prompt.name for item in items}) == len(items) >= 2
    for item in items:
        item.prompt.check_files()
    BENCHMARKS[name].write(items, answered(items, tmp_path / "made", 2), tmp_path / "made", tmp_path / "out")
    assert all((tmp_path / "out" / file).is_file() for file in files)
    if name == "vqa":
        said = json.loads((tmp_path / "out/answers.json").read_text())
        assert said == [{"question_id": n, "answer": "blue\nsky"} for n in range(2)]
    if name == "mme":
        assert (tmp_path / "out/color.txt").read_text().splitlines()[0] == "a.png\tIs it blue?\tYes\tblue sky"
    if name == "geneval":
        assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text())["prompt"] == "a photo of a cow"


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("geneval", "a.jsonl", '{"prompt": "a"}\n{"tag": 1}\n', "a.jsonl, line 2: there is no prompt"),
        ("geneval", "a.jsonl", "{", "a.jsonl, line 1 is not valid JSON"),
        ("geneval", "a.jsonl", "", "holds no question"),
        ("wise", "a.json", '[{"Prompt": "a", "prompt_id": 1}, {"Prompt": "b", "prompt_id": 1}]', "'1' must name exactly one question"),
        ("wise", "a.json", '{"Prompt": "a"}', "expected a list of prompts"),
        ("mmvet", "a.jsonl", '{"image": "a.png", "text": "b"}', "a.jsonl, line 1: there is no question_id"),
        ("mme", "a.txt", "a.png\tonly a question\n", "a.txt, line 1: .* got 2 fields"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, file: str, content: str, said: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_benchmark(name, tmp_path if name == "mme" else tmp_path / file, tmp_path / "work")


def test_a_column_that_is_missing_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column instruction, instruction_language, task_type, input_image"):
        read_benchmark("gedit", tmp_path, tmp_path / "work")


def test_the_command_draws_answers_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = write_tiny_model(tmp_path / "model")
    argv = ["geneval", str(write_geneval(tmp_path)), "--model", str(model), "--out", str(tmp_path / "out")]
    small = ["--image-size", "16x16", "--num-timesteps", "3", "--num-samples", "2"]
    assert main([*argv, *small]) == 0 and main([*argv, *small, "--resume"]) == 0
    found = sorted(str(path.relative_to(tmp_path / "out/scored")) for path in (tmp_path / "out/scored").rglob("*.png"))
    assert found == [f"0000{question}/samples/0000{sample}.png" for question in range(2) for sample in range(2)]
    assert "4 answers to 2 questions of geneval" in capsys.readouterr().out
    assert main([*argv, "--prompt", "a"]) == 2 and "leave --input" in capsys.readouterr().err
