# SPDX-License-Identifier: Apache-2.0
"""Question files follow the same rule as sources: what breaks it is named with file and line, and stray files are no questions."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from megatron_bagel.common.text_limits import TextLimits
from megatron_bagel.data.transforms import EXIF_MODES
from megatron_bagel.inference.batch.benchmarks import ReadOptions, read_benchmark
from tests.data.index_files import png


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "half \\ud83d"}', "lone surrogate"),
        ("[" * 5000, "nested deeper"),
        ('{"prompt": ' + "7" * 5000 + "}", "number that cannot be read"),
        ('{"prompt": null}', "there is no prompt"),
        ('{"prompt": ["a"]}', "expected a text, got list"),
        ("[1]", "expected an object"),
    ],
)
def test_bad_lines_are_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=f"q.jsonl, line 2.*{said}"):
        read_benchmark("geneval", tmp_path / "q.jsonl", tmp_path / "work")


def test_limits_are_those_of_the_flags(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "fine"}\n' + json.dumps({"prompt": "x" * 100}))
    reading = ReadOptions(TextLimits(max_text_bytes=100, max_json_depth=2))
    with pytest.raises(ValueError, match=r"q.jsonl, line 2: the line has 114 bytes, above the limit of 100 \(--max_text_bytes\)"):
        read_benchmark("geneval", tmp_path / "q.jsonl", tmp_path / "work", reading)
    (tmp_path / "w.json").write_text(json.dumps([{"prompt_id": 1, "Prompt": "x" * 101}]))
    with pytest.raises(ValueError, match=r"w.json, entry 1: 1: a text has 101 bytes, above the limit of 100"):
        read_benchmark("wise", tmp_path / "w.json", tmp_path / "work", reading)
    (tmp_path / "w.json").write_text(json.dumps([{"prompt_id": 1, "Prompt": "x", "more": []}]))
    with pytest.raises(ValueError, match="w.json is not valid JSON .JSON nested deeper than 2 levels"):
        read_benchmark("wise", tmp_path / "w.json", tmp_path / "work", reading)


def test_pictures_in_tables_are_turned_unless_the_option_says_no(tmp_path: Path) -> None:
    exif, data = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 4)).save(data, "JPEG", exif=exif)
    columns = {"key": ["k"], "instruction": ["turn"], "instruction_language": ["en"], "task_type": ["t"], "input_image": [data.getvalue()]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    sizes = {}
    for mode in EXIF_MODES:
        (item,) = read_benchmark("gedit", tmp_path / "a.parquet", tmp_path / "work", ReadOptions(exif=mode))
        with Image.open(item.row["source"]) as picture:
            sizes[mode] = picture.size
    assert sizes == {"turn": (4, 8), "ignore": (8, 4)}
    assert len(list((tmp_path / "work").iterdir())) == 2


def test_another_container_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(gzip.compress(b'{"prompt": "a"}'))
    with pytest.raises(ValueError, match="compressed with gzip"):
        read_benchmark("geneval", tmp_path / "q.jsonl", tmp_path / "work")


def test_stray_files_are_no_questions(tmp_path: Path) -> None:
    (tmp_path / "wise").mkdir()
    (tmp_path / "wise/a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"prompt_id": 1, "Prompt": "a"}]).encode())
    for name in ("._a.json", ".DS_Store", "a.json~"):
        (tmp_path / "wise" / name).write_bytes(b"\0\x05\x16\x07")
    (item,) = read_benchmark("wise", tmp_path / "wise", tmp_path / "work")
    assert item.prompt.name == "1"
    (tmp_path / "wise/b.json").write_text("[7]")
    with pytest.raises(ValueError, match="b.json, entry 1: expected an object"):
        read_benchmark("wise", tmp_path / "wise", tmp_path / "work")


def test_lines_of_tables_end_where_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme/count.txt").write_bytes("\ufeffa.png\tHow many\u2028circles?\t2\r\nb.png\tAnd now?\t3\r\n".encode())
    (tmp_path / "mme/._count.txt").write_bytes(b"\0\x05\x16\x07")
    first, second = read_benchmark("mme", tmp_path / "mme", tmp_path / "work")
    assert first.row["image"] == "a.png" and first.row["question"] == "How many\u2028circles?" and second.row["truth"] == "3"


def test_files_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "gedit").mkdir()
    columns = {"key": ["k"], "instruction": ["make it red"], "instruction_language": ["en"], "task_type": ["t"], "input_image": [png(0)]}
    pq.write_table(pa.table(columns), tmp_path / "gedit/a.parquet")
    (tmp_path / "gedit/._a.parquet").write_bytes(b"\0")
    assert len(read_benchmark("gedit", tmp_path / "gedit", tmp_path / "work")) == 1
    (tmp_path / "gedit/b.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match="b.parquet is not a readable parquet file"):
        read_benchmark("gedit", tmp_path / "gedit", tmp_path / "work")
