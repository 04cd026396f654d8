# SPDX-License-Identifier: Apache-2.0
"""The command finds damage anywhere in an index, names it, and answers with its exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_bagel.cli.data.verify import main
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.tokenizer import load_tokenizer
from tests.data.golden_index import build_golden_index
from tests.data.index_files import png, write_lines


@pytest.fixture(scope="module")
def whole(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "index"
    build_golden_index(goldens, folder)
    return folder


@pytest.mark.parametrize("more", [[], ["--no-decode"], ["--workers", "2"]])
def test_a_good_index_has_no_problems(whole: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(whole), *more]) == 0
    assert "18 samples in 3 shard(s), all as they should be" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["bin", "idx", "arrow"])
def test_a_changed_byte_anywhere_is_found(whole: Path, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "index"
    shutil.copytree(whole, index)
    (path,) = index.glob(f"vlm_sft/*/*.{ending}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main([str(index)]) == 1
    told = capsys.readouterr().out
    assert f"vlm_sft/llava_ov/00000: 00000.{ending} does not have the checksum" in told and "problem(s)" in told
    path.unlink()
    assert main([str(index)]) == 1 and "no file" in capsys.readouterr().out


def test_what_is_no_index_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_rows_are_checked_against_the_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of interleaved rows before any index: a line per bad row, with its item."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(1))
    (tmp_path / "images/cut.png").write_bytes(png(1)[:40])
    rows = [{"items": [{"text": "q"}, {"image": name, "loss": True}]} for name in ("a.png", "gone.png", "cut.png")]
    write_lines(tmp_path / "rows.jsonl", rows)
    arguments = [str(tmp_path / "rows.jsonl"), "--images", str(tmp_path / "images")]
    assert main(arguments) == 1
    told = capsys.readouterr().out.splitlines()
    assert "rows.jsonl, row 1: item 1: image" in told[0] and "row 2: image 0: " in told[1] and told[2].endswith("3 row(s), 2 problem(s)")
    assert main([*arguments, "--form", "trace"]) == 1 and "no list of steps under 'trace'" in capsys.readouterr().out
    write_lines(tmp_path / "rows.jsonl", rows[:1])
    assert main(arguments) == 0 and "1 row(s), all as they should be" in capsys.readouterr().out
    assert (
        main([*arguments, "--max_text_bytes", "20"]) == 1
        and "above the limit of 20 (--max_text_bytes of megatron-bagel data build)" in capsys.readouterr().out
    )
    assert main([*arguments, "--max-json-depth", "2"]) == 1 and "nested deeper than 2 levels" in capsys.readouterr().out
    write_lines(tmp_path / "rows.jsonl", [{"items": [{"text": "q"}, {"image": "../b.png", "loss": True}]}])
    (tmp_path / "b.png").write_bytes(png(1))
    assert main(arguments) == 1 and "--allow_outside_root of megatron-bagel data build reads it" in capsys.readouterr().out
    assert main([*arguments, "--allow_outside_root"]) == 0
    assert main([str(tmp_path / "none.jsonl")]) == 2


def test_a_fixed_copy_has_the_other_samples(whole: Path, goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte of one picture is changed: the copy lacks that sample, lists it, holds the others bit for bit and verifies."""
    index, clean = tmp_path / "index", tmp_path / "clean"
    shutil.copytree(whole, index)
    before = IndexedSamples.open(whole).datasets["t2i_pretrain/t2i"]
    picture = before.image_bytes(3, 0)
    (path,) = index.glob("t2i_pretrain/*/*.bin")
    data = bytearray(path.read_bytes())
    data[data.index(picture) + len(picture) // 2] ^= 1
    path.write_bytes(data)
    assert main([str(index), "--fix", str(clean)]) == 0
    assert "without 1 sample(s)" in capsys.readouterr().out
    assert main([str(clean)]) == 0 and "17 samples in 3 shard(s), all as they should be" in capsys.readouterr().out
    after = IndexedSamples.open(clean, load_tokenizer(goldens / "hf")).datasets["t2i_pretrain/t2i"]
    rows = [row for row in range(len(before)) if row != 3]
    assert [after.image_bytes(new, 0) for new in range(7)] == [before.image_bytes(old, 0) for old in rows]
    assert [after.text_ids(new, 0).tolist() for new in range(7)] == [before.text_ids(old, 0).tolist() for old in rows]
    assert [after.source(new) for new in range(7)] == [before.source(old) for old in rows]
    lines = [json.loads(line) for line in (clean / "skipped.jsonl").read_text().splitlines()]
    assert (lines[-1]["file"], lines[-1]["row"]) == before.source(3) and lines[-1]["reason"].startswith("image 0")
    other = "vlm_sft/llava_ov/00000.bin"
    assert (clean / other).read_bytes() == (whole / other).read_bytes()
    assert main([str(index), "--fix", str(clean)]) == 2 and "exists; give a new folder" in capsys.readouterr().err
    assert main([str(index), "--fix", "/sys/megatron_bagel/out"]) == 2
    assert "--fix: the folder /sys/megatron_bagel cannot be written (" in capsys.readouterr().err
    (broken,) = index.glob("t2i_pretrain/*/*.arrow")
    broken.write_bytes(broken.read_bytes()[:-1] + b"?")
    assert main([str(index), "--fix", str(tmp_path / "other")]) == 2 and ".arrow" in capsys.readouterr().err
