# SPDX-License-Identifier: Apache-2.0
"""Reads the prompt files of public benchmarks and writes the file formats of their scorers; generation in between is the usual one.

| name | reads | writes, below the output folder |
| --- | --- | --- |
| geneval | evaluation_metadata.jsonl: {"prompt", ...} per line | 00000/metadata.jsonl, 00000/samples/00000.png, ... |
| wise | *.json: a list of {"prompt_id", "Prompt", ...} | images/<prompt_id>.png |
| gedit | *.parquet: key, instruction, instruction_language, task_type, input_image | fullset/<task>/<language>/<key>.png |
| vqa | *.jsonl: {"question_id", "image", "question" or "text"} | answers.json: [{"question_id", "answer"}, ...] |
| mmvet | the same | answers.json: {"<question_id>": answer} |
| mme | a folder of <task>.txt: image, question, truth, separated by tabs | <task>.txt with the answer as a fourth column |

The formats are those that the benchmarks' published scorers document; nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_bagel.common.files import is_stray, read_text, replacing
from megatron_bagel.common.json_files import json_lines, read_json_value
from megatron_bagel.common.json_text import split_lines
from megatron_bagel.common.text_limits import DEFAULT_LIMITS, TextLimits
from megatron_bagel.data.transforms import EXIF_MODES, decode_rgb
from megatron_bagel.inference.batch.prompts import Prompt, make_prompt

#: Answers of a run by the name of their prompt, as in results.jsonl; several samples of a prompt are in order.
Answers = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class BenchmarkItem:
    """A question of a benchmark: the prompt, and its row, which the scorer needs."""

    prompt: Prompt
    row: dict[str, Any]


@dataclass(frozen=True)
class ReadOptions:
    """How questions are read.

    Attributes:
        limits: Of texts and of JSON.
        exif: Whether pictures are turned as their EXIF orientation says (``decode_rgb``).
    """

    limits: TextLimits = DEFAULT_LIMITS
    exif: str = EXIF_MODES[0]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and written. ``options`` are the generation settings of BAGEL's published measurements."""

    read: Callable[[Path, Path, ReadOptions], Iterator[BenchmarkItem]]
    write: Callable[[list[BenchmarkItem], Answers, Path, Path], None]
    options: dict[str, Any]


def read_benchmark(name: str, questions: Path, work: Path, options: ReadOptions = ReadOptions()) -> list[BenchmarkItem]:
    """Read all questions; ``work`` holds pictures that must be files. Raises ValueError naming the file and row of a problem."""
    if not questions.exists():
        raise ValueError(f"{questions} does not exist; give the questions of {name}")
    items = list(BENCHMARKS[name].read(questions, work, options))
    if not items:
        raise ValueError(f"{questions} holds no question of {name}")
    names = Counter(item.prompt.name for item in items)
    for question_name, count in names.items():
        if count > 1 or not question_name or question_name.startswith(".") or any(sign in question_name for sign in "/\\\0"):
            raise ValueError(
                f"{questions}: '{question_name}' must name exactly one question and be a valid file name; it occurs {count} times"
            )
    return items


def _files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of a benchmark in the order of their names, without the stray files of other programs."""
    return sorted(path for path in paths if not is_stray(path.name))


def _value(row: Mapping[str, Any], label: str, *names: str) -> Any:
    """Return the value of the first of ``names`` that the row has; null counts as absent."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{label}: there is no {' or '.join(names)}; the row has {', '.join(row)}")


def _prompt(label: str, name: str, task: str, text: str, options: ReadOptions, images: tuple[str, ...] = ()) -> Prompt:
    try:
        return make_prompt(name, task, [text], images, limits=options.limits)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


# ------------------------------------------------------------------ GenEval
def _read_geneval(path: Path, work: Path, options: ReadOptions) -> Iterator[BenchmarkItem]:
    for number, (label, row) in enumerate(json_lines(path, "geneval", options.limits)):
        yield BenchmarkItem(_prompt(label, f"{number:05d}", "t2i", _value(row, label, "prompt"), options), row)


def _write_geneval(items: list[BenchmarkItem], answers: Answers, generated_folder: Path, out: Path) -> None:
    for item in items:
        folder = out / item.prompt.name
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(item.row, ensure_ascii=False) + "\n", encoding="utf-8")
        for number, answer in enumerate(answers[item.prompt.name]):
            shutil.copyfile(generated_folder / answer["image"], folder / "samples" / f"{number:05d}.png")


# ------------------------------------------------------------------ WISE
def _read_wise(path: Path, work: Path, options: ReadOptions) -> Iterator[BenchmarkItem]:
    files = _files(path.glob("*.json")) if path.is_dir() else [path]
    for file in files:
        rows = read_json_value(file, "wise", options.limits.max_json_depth)
        if not isinstance(rows, list):
            raise ValueError(f"{file}: expected a list of prompts, found {type(rows).__name__}")
        for number, row in enumerate(rows, start=1):
            label = f"{file}, entry {number}"
            if not isinstance(row, dict):
                raise ValueError(f"{label}: expected an object, got {type(row).__name__}")
            yield BenchmarkItem(_prompt(label, str(_value(row, label, "prompt_id")), "t2i", _value(row, label, "Prompt"), options), row)


def _write_wise(items: list[BenchmarkItem], answers: Answers, generated_folder: Path, out: Path) -> None:
    (out / "images").mkdir(parents=True, exist_ok=True)
    for item in items:
        shutil.copyfile(generated_folder / answers[item.prompt.name][0]["image"], out / "images" / f"{item.prompt.name}.png")


# ------------------------------------------------------------------ GEdit
def _read_gedit(path: Path, work: Path, options: ReadOptions) -> Iterator[BenchmarkItem]:
    work.mkdir(parents=True, exist_ok=True)
    columns = ("key", "instruction", "instruction_language", "task_type", "input_image")
    for file in _files(path.rglob("*.parquet")) if path.is_dir() else [path]:
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is not a readable parquet file ({error})") from error
        missing_columns = [name for name in columns if name not in table.schema_arrow.names]
        if missing_columns:
            raise ValueError(f"{file}: there is no column {', '.join(missing_columns)}; it has {', '.join(table.schema_arrow.names)}")
        number = 0
        for batch in table.iter_batches(64, columns=list(columns)):
            for row in batch.to_pylist():
                label, image = f"{file}, row {number}", row.pop("input_image")
                data = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(data, bytes):
                    raise ValueError(f"{label}: input_image holds no bytes")
                name = f"{row['key']}_{row['instruction_language']}"
                source = work / f"{row['key']}{'' if options.exif == EXIF_MODES[0] else '.as_stored'}.png"
                if not source.is_file():
                    with replacing(source) as part:
                        _decoded(data, label, options.exif).save(part, "PNG")
                yield BenchmarkItem(
                    _prompt(label, name, "edit", row["instruction"], options, (str(source),)), {**row, "source": str(source)}
                )
                number += 1


def _decoded(data: bytes, label: str, exif: str) -> Image.Image:
    try:
        return decode_rgb(data, exif=exif)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _write_gedit(items: list[BenchmarkItem], answers: Answers, generated_folder: Path, out: Path) -> None:
    for item in items:
        folder = out / "fullset" / item.row["task_type"] / item.row["instruction_language"]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(generated_folder / answers[item.prompt.name][0]["image"], folder / f"{item.row['key']}.png")
        shutil.copyfile(item.row["source"], folder / f"{item.row['key']}_SRCIMG.png")


# ------------------------------------------------------------------ questions about images
def _read_questions(path: Path, work: Path, options: ReadOptions) -> Iterator[BenchmarkItem]:
    for label, row in json_lines(path, "vqa", options.limits):
        image, text = _value(row, label, "image"), _value(row, label, "question", "text")
        name = str(_value(row, label, "question_id"))
        yield BenchmarkItem(_prompt(label, name, "understand", text, options, (str(path.parent / image),)), row)


def _write_vqa(items: list[BenchmarkItem], answers: Answers, generated_folder: Path, out: Path) -> None:
    answer_rows = [{"question_id": item.row["question_id"], "answer": _text(answers, item)} for item in items]
    (out / "answers.json").write_text(json.dumps(answer_rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_mmvet(items: list[BenchmarkItem], answers: Answers, generated_folder: Path, out: Path) -> None:
    answer_by_id = {str(item.row["question_id"]): _text(answers, item) for item in items}
    (out / "answers.json").write_text(json.dumps(answer_by_id, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _read_mme(path: Path, work: Path, options: ReadOptions) -> Iterator[BenchmarkItem]:
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; mme needs one with a <task>.txt for each task, and the images below it")
    for file in _files(path.glob("*.txt")):
        for number, line in enumerate(split_lines(read_text(file, "mme")), start=1):
            fields, label = line.split("\t"), f"{file}, line {number}"
            if len(fields) != 3:
                raise ValueError(f"{label}: expected image, question and truth separated by tabs, got {len(fields)} fields")
            image, question, truth = fields
            candidates = [folder / image for folder in (path / file.stem, path / file.stem / "images", path)]
            image_path = next((image_path for image_path in candidates if image_path.is_file()), candidates[0])
            row = {"task": file.stem, "image": image, "question": question, "truth": truth}
            yield BenchmarkItem(_prompt(label, f"{file.stem}_{number:05d}", "understand", question, options, (str(image_path),)), row)


def _write_mme(items: list[BenchmarkItem], answers: Answers, generated_folder: Path, out: Path) -> None:
    lines: dict[str, list[str]] = {}
    for item in items:
        fields = [item.row["image"], item.row["question"], item.row["truth"], " ".join(_text(answers, item).split())]
        lines.setdefault(item.row["task"], []).append("\t".join(fields) + "\n")
    for task, task_lines in lines.items():
        (out / f"{task}.txt").write_text("".join(task_lines), encoding="utf-8")


def _text(answers: Answers, item: BenchmarkItem) -> str:
    return answers[item.prompt.name][0]["text"]


_PICTURES = {"num_timesteps": 50, "timestep_shift": 3.0, "cfg_text_scale": 4.0}
_IMAGE_INPUT = {"vit_transform": (980, 378)}
_EDITS = {**_PICTURES, **_IMAGE_INPUT, "cfg_img_scale": 1.5, "cfg_renorm_type": "text_channel"}
#: Settings of BAGEL's evaluation scripts (its scripts/eval).
BENCHMARKS: dict[str, Benchmark] = {
    "geneval": Benchmark(_read_geneval, _write_geneval, {**_PICTURES, "num_samples": 4, "cfg_interval": (0.0, 1.0)}),
    "wise": Benchmark(_read_wise, _write_wise, {**_PICTURES, "cfg_interval": (0.4, 1.0)}),
    "gedit": Benchmark(_read_gedit, _write_gedit, {**_EDITS, "cfg_interval": (0.4, 1.0)}),
    "vqa": Benchmark(_read_questions, _write_vqa, {**_IMAGE_INPUT, "max_length": 100}),
    "mmvet": Benchmark(_read_questions, _write_mmvet, {**_IMAGE_INPUT, "max_length": 1000}),
    "mme": Benchmark(_read_mme, _write_mme, {**_IMAGE_INPUT, "max_length": 20}),
}
