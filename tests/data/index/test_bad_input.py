# SPDX-License-Identifier: Apache-2.0
"""Every kind of bad input is kept out or refused, with a message that names the file and the row."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_bagel.cli.data import build as command
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.plan import ImageChecks
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import PlanSettings
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.sources.rows import read_unit, scan_jsonl
from megatron_bagel.data.transforms import decode_rgb
from tests.data.index_files import SIZES, groups_of, noise_png, png, talk, write_lines, write_t2i
from tests.strategies import SPEC

RED = '{"a": "red"}'


def skipped(index: Path) -> list[tuple[str, int | None, str]]:
    """(file name, row, reason) of every row that was left out."""
    lines = map(json.loads, (index / "skipped.jsonl").read_text().splitlines())
    return [(Path(line["file"]).name, line["row"], line["reason"]) for line in lines]


def build(groups: list[GroupConfig], goldens: Path, output: Path, **checks: object) -> IndexedSamples:
    build_index(groups, goldens / "hf", output, BuildOptions(progress=False, checks=ImageChecks(**checks)))
    return IndexedSamples.open(output)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_a_parquet_file_that_breaks_off_in_its_data(goldens: Path, tmp_path: Path) -> None:
    """The footer is whole, a page in the middle is not: rows before it are kept, and the row where reading ended is named."""
    write_t2i(tmp_path / "t2i", [(noise_png(i), RED) for i in range(9)], "0000.parquet")
    write_t2i(tmp_path / "t2i", [(noise_png(i), RED) for i in range(2)], "0001.parquet")
    path = tmp_path / "t2i/0000.parquet"
    metadata = pq.ParquetFile(path).metadata
    start = metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    index = build(groups_of(tmp_path, "t2i_pretrain"), goldens, tmp_path / "index")
    ((name, row, reason),) = skipped(tmp_path / "index")
    assert name == "0000.parquet" and row <= 3 and "cannot be read from here on" in reason
    assert len(index.datasets["t2i_pretrain/t2i"]) == row + 2


def test_truncated_and_wrong_parquet_files(goldens: Path, tmp_path: Path) -> None:
    write_t2i(tmp_path / "t2i", [(png(0), RED)] * 3, "0000.parquet")
    whole = (tmp_path / "t2i/0000.parquet").read_bytes()
    (tmp_path / "t2i/0001.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "t2i/0002.parquet").write_bytes(b"")
    pq.write_table(pa.table({"picture": [b"x"], "captions": [RED]}), tmp_path / "t2i/0003.parquet")
    pq.write_table(pa.table({"image": ["a path"], "captions": [RED]}), tmp_path / "t2i/0004.parquet")
    build(groups_of(tmp_path, "t2i_pretrain"), goldens, tmp_path / "index")
    told = {name: (row, reason) for name, row, reason in skipped(tmp_path / "index")}
    assert told["0001.parquet"][0] is None and "not a readable parquet file" in told["0001.parquet"][1]
    assert told["0002.parquet"][0] is None and "not a readable parquet file" in told["0002.parquet"][1]
    assert told["0003.parquet"] == (None, "no column image; the file has picture, captions")
    assert told["0004.parquet"] == (0, "column image holds str, not bytes")


def test_images_that_are_none_or_too_much(goldens: Path, tmp_path: Path) -> None:
    pictures = [png(0), b"", bomb(60_000), noise_png(1, 200, 100), bomb(100), noise_png(2)[:-200]]
    write_t2i(tmp_path / "t2i", [(picture, RED) for picture in pictures])
    groups = groups_of(tmp_path, "t2i_pretrain")
    build(groups, goldens, tmp_path / "index")
    expected = {1: "has no bytes", 2: "60000 x 60000 pixels are above the limit of 200000000", 5: "cannot be decoded"}
    told = {row: reason for _, row, reason in skipped(tmp_path / "index")}
    assert sorted(told) == sorted(expected) and all(words in told[row] for row, words in expected.items())
    build(groups, goldens, tmp_path / "decoded", depth="decode")  # whose checksums are right, but it holds too few pixels
    told = {row: reason for _, row, reason in skipped(tmp_path / "decoded")}
    assert sorted(told) == [1, 2, 4, 5] and "cannot be decoded" in told[4]
    build(groups, goldens, tmp_path / "small", max_pixels=10_000)
    told = {row: reason for _, row, reason in skipped(tmp_path / "small")}
    assert "200 x 100 pixels are above the limit of 10000" in told[3]
    build(groups, goldens, tmp_path / "headers", depth="header")
    assert [row for _, row, _ in skipped(tmp_path / "headers")] == [1, 2]


def test_every_mode_of_images_becomes_rgb(goldens: Path, tmp_path: Path) -> None:
    """CMYK, palettes with and without transparency, grey, 16 bits, transparency: the colours are those of the picture."""
    orange = (230, 120, 20)
    clear = Image.new("RGBA", (40, 32), (*orange, 255))
    clear.paste((0, 0, 0, 0), (20, 0, 40, 32))
    palette = Image.new("RGB", (40, 32), orange).quantize(4)
    transparent = Image.new("P", (40, 32), 1)
    transparent.putpalette([0, 0, 0, *orange])
    grey16 = Image.fromarray(np.full((32, 40), 120 << 8, dtype=np.uint16))
    images = [
        (encoded(Image.new("CMYK", (40, 32), (0, 135, 235, 25)), "JPEG"), (230, 108, 18), (230, 108, 18)),
        (encoded(palette, "PNG"), orange, orange),
        (encoded(transparent, "PNG", transparency=0), orange, orange),
        (encoded(clear, "PNG"), orange, (255, 255, 255)),
        (encoded(clear.convert("LA"), "PNG"), (141, 141, 141), (255, 255, 255)),
        (encoded(Image.new("L", (40, 32), 77), "PNG"), (77, 77, 77), (77, 77, 77)),
        (encoded(grey16, "PNG"), (120, 120, 120), (120, 120, 120)),
        (encoded(grey16, "TIFF"), (120, 120, 120), (120, 120, 120)),
        (encoded(Image.new("1", (40, 32), 1), "PNG"), (255, 255, 255), (255, 255, 255)),
    ]
    unknown = encoded(Image.fromarray(np.ones((32, 40), dtype=np.float32)), "TIFF")
    write_t2i(tmp_path / "t2i", [(data, RED) for data, _, _ in images] + [(unknown, RED)])
    reader = build(groups_of(tmp_path, "t2i_pretrain"), goldens, tmp_path / "index").datasets["t2i_pretrain/t2i"]
    ((_, row, reason),) = skipped(tmp_path / "index")
    assert row == len(images) and "pixels of mode F have no known range" in reason
    for row, (_, left, right) in enumerate(images):
        picture = decode_rgb(reader.image_bytes(row, 0))
        assert picture.mode == "RGB" and picture.size == (40, 32)
        for place, colour in (((5, 5), left), ((35, 25), right)):
            assert np.abs(np.subtract(picture.getpixel(place), colour)).max() <= 3, (row, place, picture.getpixel(place))


def test_a_caption_of_100k_characters_is_indexed_and_named_when_it_fits_no_pack(goldens: Path, tmp_path: Path) -> None:
    write_t2i(tmp_path / "t2i", [(png(0), RED), (png(1), json.dumps({"a": "one red circle " * 6700})), (png(2), RED)])
    groups = groups_of(tmp_path, "t2i_pretrain")
    index = build(groups, goldens, tmp_path / "index")
    assert skipped(tmp_path / "index") == [] and int(index.datasets["t2i_pretrain/t2i"].record(1).text_tokens[0]) > 10_000
    (source,) = open_sources(groups, index, PlanSettings(0, SPEC))
    planner = Planner([source], PlannerConfig(400, 300, 200, 4, seed=1, global_batch_size=1))
    rows = {row for number in range(4) for _, row, _ in planner.packs(number, 1)[0].samples}
    assert rows == {0, 2}
    (name, row, epoch), reason = next(iter(planner.stream.skips.reasons.items()))
    assert row == 1 and "tokens: longer than 200 tokens" in reason
    assert source.describe(row) == f"t2i_pretrain/t2i sample 1 ({tmp_path}/t2i/0000.parquet, row 1)"


def test_lines_that_are_no_samples(goldens: Path, tmp_path: Path) -> None:
    (tmp_path / "vlm/images").mkdir(parents=True)
    (tmp_path / "vlm/images/0.png").write_bytes(png(0))
    (tmp_path / "vlm/images/empty.png").touch()
    lines = [
        talk("<image>what?", image="0.png"), "{broken", "null", talk("<image>", image="gone.png"), talk("<image>", image="empty.png"),
        talk("<image><image>", image="0.png"), talk("<image>", image=7), talk("<image>", image="images"), "\x00\xff",
    ]  # fmt: skip
    write_lines(tmp_path / "vlm/chat.jsonl", lines)
    build(groups_of(tmp_path, "vlm_sft"), goldens, tmp_path / "index")
    told = {row: reason for _, row, reason in skipped(tmp_path / "index")}
    expected = {1: "not JSON", 2: "found NoneType", 3: "gone.png cannot be read", 4: "no bytes", 5: "2 <image> marks but 1 images",
                6: "neither a file name", 7: "cannot be read", 8: "not JSON"}  # fmt: skip
    assert sorted(told) == sorted(expected) and all(words in told[row] for row, words in expected.items())


def test_an_index_of_a_newer_version_says_to_update(goldens: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": "one"}])
    build(groups_of(tmp_path, "text"), goldens, tmp_path / "index")
    manifest = tmp_path / "index/manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ValueError, match="has schema 2, this version reads 1; update megatron_bagel"):
        IndexedSamples.open(tmp_path / "index")


def test_a_dataset_without_one_usable_row_is_refused_with_its_reasons(goldens: Path, tmp_path: Path) -> None:
    """The other way to have no sample at all, groups that are empty after planning, is in test_planner.py."""
    write_lines(tmp_path / "text/plain.jsonl", [{"text": " "}, "{broken", {"text": ""}])
    with pytest.raises(ValueError, match=r"dataset text/plain: not one usable sample \(.*2 x empty text.*explained in .*skipped.jsonl"):
        build(groups_of(tmp_path, "text"), goldens, tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("flag", [["--max-image-pixels", "0"], ["--num-jobs", "0"], ["--job-index", "1"], ["--workers", "-1"]])
def test_impossible_flags_are_named(flag: list[str], goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": "one"}])
    (tmp_path / "data.yaml").write_text("text: {dataset_names: [plain], weight: 1}\n")
    arguments = ["--dataset_config_file", str(tmp_path / "data.yaml"), "--data_root", str(tmp_path), "--tokenizer", str(goldens / "hf")]
    assert command.main([*arguments, "--output", str(tmp_path / "index"), *flag]) == 2
    told = capsys.readouterr().err
    assert ("--num-jobs" if flag[0] == "--num-jobs" else flag[0]) in told and told.count("\n") == 1


@pytest.mark.parametrize("kind", ["gzip", "list", "indented", "utf-16"])
def test_another_container_is_told_once(kind: str, goldens: Path, tmp_path: Path) -> None:
    rows = [talk("hello")] * 30
    (tmp_path / "vlm/images").mkdir(parents=True)
    data = {
        "gzip": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
        "list": json.dumps(rows).encode(),
        "indented": json.dumps(rows, indent=2).encode(),
        "utf-16": "\n".join(map(json.dumps, rows)).encode("utf-16"),
    }
    (tmp_path / "vlm/chat.jsonl").write_bytes(data[kind])
    with pytest.raises(
        ValueError, match=r"dataset vlm_sft/chat: .*chat.jsonl is .*one JSON object per line is expected; convert|decompress"
    ):
        build(groups_of(tmp_path, "vlm_sft"), goldens, tmp_path / "index")
    assert not list(tmp_path.glob("index*"))


def test_stray_files_are_no_sources(goldens: Path, tmp_path: Path) -> None:
    write_t2i(tmp_path / "t2i", [(png(0), RED)], "0000.parquet")
    for name in (".DS_Store", "._0000.parquet", ".0000.parquet.crc", "_SUCCESS", "0000.parquet~", "~$0000.parquet"):
        (tmp_path / "t2i" / name).write_bytes(b"\0\x05\x16\x07")
    index = build(groups_of(tmp_path, "t2i_pretrain"), goldens, tmp_path / "index")
    assert [Path(source.path).name for source in index.manifest.datasets[0].sources] == ["0000.parquet"] and not skipped(tmp_path / "index")


def test_lines_of_any_length_cost_themselves_only(goldens: Path, tmp_path: Path) -> None:
    """Long lines at the start, in the middle, and at the end without a line's end; the limit itself is allowed."""
    good = json.dumps({"text": "x" * 89})
    assert len(good) == 101
    long = json.dumps({"text": "x" * 3_000_000})
    (tmp_path / "text").mkdir()
    (tmp_path / "text/plain.jsonl").write_text("\n".join([long, good, good + " ", long, good, long]))
    rules = RowRules(max_text_bytes=101)
    build_index(
        groups_of(tmp_path, "text"), goldens / "hf", tmp_path / "index", BuildOptions(rows_per_shard=2, row_rules=rules, progress=False)
    )
    told = {row: reason for _, row, reason in skipped(tmp_path / "index")}
    assert sorted(told) == [0, 2, 3, 5] and all(
        "above the limit of 101 (--max_text_bytes of megatron-bagel data build)" in reason for reason in told.values()
    )
    reader = IndexedSamples.open(tmp_path / "index").datasets["text/plain"]
    assert [reader.source(row)[1] for row in range(len(reader))] == [1, 4]


def test_a_file_that_shrinks_while_it_is_read_ends_the_build(tmp_path: Path) -> None:
    write_lines(tmp_path / "plain.jsonl", [{"text": f"number {number}"} for number in range(4)])
    (unit,) = scan_jsonl(str(tmp_path / "plain.jsonl"), "text", "", None, 100)
    write_lines(tmp_path / "plain.jsonl", [{"text": "number 0"}])
    with pytest.raises(ValueError, match="plain.jsonl, row 1: the file has become shorter"):
        list(read_unit(unit))


def test_flags_of_rows_reach_the_rows(goldens: Path, tmp_path: Path) -> None:
    (tmp_path / "vlm/images").mkdir(parents=True)
    (tmp_path / "vlm/a.png").write_bytes(png(0))
    write_lines(tmp_path / "vlm/chat.jsonl", [talk("<image>", image="../a.png"), talk("hello", id=[[[[1]]]])])
    (tmp_path / "data.yaml").write_text(json.dumps({"vlm_sft": {"dataset_names": ["chat"], "weight": 1, "image_transform_args": SIZES}}))
    arguments = ["--dataset_config_file", str(tmp_path / "data.yaml"), "--data_root", str(tmp_path), "--tokenizer", str(goldens / "hf")]
    assert command.main([*arguments, "--output", str(tmp_path / "one")]) == 0
    ((_, row, reason),) = skipped(tmp_path / "one")
    assert row == 0 and "--allow_outside_root" in reason
    assert command.main([*arguments, "--output", str(tmp_path / "two"), "--allow-outside-root", "--max-json-depth", "3"]) == 0
    ((_, row, reason),) = skipped(tmp_path / "two")
    assert row == 1 and "deeper than 3" in reason
