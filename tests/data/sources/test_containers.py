# SPDX-License-Identifier: Apache-2.0
"""Rows of any group from JSON lines, parquet and tar files; bad ones are told with file, row, item and member."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings
from megatron_bagel.data.sources.dataset_config import GroupConfig, parse_groups
from megatron_bagel.data.sources.forms import FORMS
from megatron_bagel.data.sources.records import BadRow
from megatron_bagel.data.tokenizer import load_tokenizer
from tests.data.index_files import SIZES, png, talk, write_lines
from tests.data.interleaved_rows import VIT
from tests.strategies import SPEC


def group_of(root: Path, name: str = "t2i_pretrain", **keys: Any) -> GroupConfig:
    settings = {"dataset_names": ["a"], "weight": 1, "image_transform_args": SIZES, "vit_image_transform_args": VIT, **keys}
    return parse_groups({name: settings}, "x.yaml", root)[0]


def build(root: Path, goldens: Path, group: GroupConfig) -> tuple[list[str], dict[int | None, str]]:
    """The texts of every sample, alternatives joined, and row -> reason of the rows left out."""
    build_index([group], goldens / "hf", root / "index", BuildOptions(progress=False))
    index, tokenizer = IndexedSamples.open(root / "index"), load_tokenizer(goldens / "hf")
    reader = index.reader(group, group.datasets[0])
    texts = [
        "|".join(tokenizer.decode(reader.text_ids(row, text).tolist()) for text in range(len(reader.record(row).text_tokens)))
        for row in range(len(reader))
    ]
    skipped = [json.loads(line) for line in (root / "index/skipped.jsonl").read_text().splitlines()]
    return texts, {line["row"]: line["reason"] for line in skipped}


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_captions_of_any_type_of_arrow(goldens: Path, tmp_path: Path) -> None:
    """Large, dictionary and list types; a struct without bytes; captions that are null or blank."""
    (tmp_path / "p").mkdir()
    struct = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)]
    struct[3] = {"bytes": None, "path": "3.png"}
    text = pa.array(["one", "two", " ", "four", None], pa.large_string()).dictionary_encode()
    large = pa.array([row["bytes"] for row in struct], pa.large_binary())
    pq.write_table(pa.table({"img": struct, "text": text, "large": large}), tmp_path / "p/0.parquet")
    columns = {"image": "img", "caption": "text"}
    texts, reasons = build(tmp_path, goldens, group_of(tmp_path, data_dir=["p"], columns=columns))
    assert texts == ["one", "two"]
    assert "empty caption" in reasons[2] and "without bytes" in reasons[3] and "no caption" in reasons[4]
    other = tmp_path / "other"
    other.mkdir()
    texts, reasons = build(other, goldens, group_of(tmp_path, data_dir=["p"], columns={"image": "large", "caption": "text"}))
    assert texts == ["one", "two"] and "NoneType" in reasons[3]


def test_conversations_of_parquet(goldens: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    rows = [{"images": [{"bytes": png(1), "path": None}], **talk("<image>what?", "a thing")}, talk("<image>what?", "a thing")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p/0.parquet")
    texts, reasons = build(tmp_path, goldens, group_of(tmp_path, "vlm_sft", data_dir=["p"], columns={"image": "images"}))
    assert texts == ["what?|a thing"] and "1 <image> marks but 0 images" in reasons[1]


def test_a_file_without_the_column_is_told(goldens: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"img": [png(1)]}), tmp_path / "p/0.parquet")
    for keys, missing in (({"columns": {"image": "picture"}}, "no column picture"), ({}, "no column image, captions")):
        with pytest.raises(ValueError, match=missing):
            build(tmp_path, goldens, group_of(tmp_path, data_dir=["p"], **keys))


def test_jsonl_of_pictures_named_by_path(goldens: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(1))
    deep = '{"image": ' + "[" * 100_000 + "]" * 100_000 + "}"
    rows = [{"image": "a.png", "caption": "red"}, {"image": "../a.png", "caption": "x"}, {"image": "b.png", "caption": "x"}, deep,
            {"image": "a.png", "captions": {"x": "one", "y": None, "z": "two"}}, {"image": "a.png", "captions": '{"x": "one"'}]  # fmt: skip
    write_lines(tmp_path / "rows.jsonl", rows)
    texts, reasons = build(tmp_path, goldens, group_of(tmp_path, jsonl_path=["rows.jsonl"], data_dir=["images"]))
    assert texts == ["red", "one|two"]
    assert "leaves the folder" in reasons[1] and "cannot be read" in reasons[2] and "nested deeper" in reasons[3]
    assert "captions is not valid JSON" in reasons[5]


BAD_ITEMS = {
    "item 1: type 'sound' is unknown": {"type": "sound", "text": "x"},
    'item 1: a user\'s picture with loss needs "vae" in its condition': {
        "image": "a.png",
        "role": "user",
        "loss": True,
        "condition": ["vit"],
    },
    "item 1: role 'robot' is unknown": {"text": "x", "role": "robot"},
    "item 1: an image {bytes, path} without bytes": {"image": {"bytes": None}},
    "item 1: image IMAGES/gone.png cannot be read": {"image": "gone.png"},
    "513 items are above the limit of 512: no pack holds them": None,
    "nested deeper than 100 levels": "[" * 100_000 + "]" * 100_000,
}  # fmt: skip


def test_every_bad_input_is_told_with_file_row_and_item(goldens: Path, tmp_path: Path) -> None:
    """As rows of one file between good ones: each is left out by itself."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(0))
    learned = {"text": "yes", "role": "assistant"}
    rows: list[Any] = []
    for item in BAD_ITEMS.values():
        items = [learned] * 513 if item is None else [learned, item]
        rows += [f'{{"items": {item}}}' if isinstance(item, str) else {"items": items}, {"items": [learned]}]
    write_lines(tmp_path / "rows.jsonl", rows)
    group = group_of(tmp_path, "interleaved", jsonl_path=["rows.jsonl"], data_dir=["images"])
    build_index([group], goldens / "hf", tmp_path / "index", BuildOptions(progress=False))
    told = [json.loads(line) for line in (tmp_path / "index/skipped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in told] == list(range(0, 2 * len(BAD_ITEMS), 2))
    for line, reason in zip(told, BAD_ITEMS, strict=True):
        assert line["file"] == str(tmp_path / "rows.jsonl") and reason.replace("IMAGES", str(tmp_path / "images")) in line["reason"]
    without = group_of(tmp_path, "interleaved", jsonl_path=["rows.jsonl"], data_dir=["images"], vit_image_transform_args=None)
    write_lines(tmp_path / "rows.jsonl", [{"items": [learned, {"image": "a.png", "condition": ["vit"]}]}, {"items": [learned]}])
    build_index([without], goldens / "hf", tmp_path / "without", BuildOptions(progress=False))
    (line,) = map(json.loads, (tmp_path / "without/skipped.jsonl").read_text().splitlines())
    assert (line["row"], line["reason"]) == (
        0, "item 1: a picture with the condition vit has no transform; give the group vit_image_transform_args",
    )  # fmt: skip


def test_items_with_bad_ones_named_by_file_row_and_item(goldens: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(1))
    good = {"items": [{"text": "q"}, {"image": "a.png", "loss": True}]}
    deep = json.dumps({"items": json.dumps([{"text": "x"}])}).replace('\\"x\\"', "[" * 100_000 + "]" * 100_000)
    rows = [good, {"items": [{"text": "q"}, {"type": "sound"}]}, {"items": json.dumps(good["items"])}, {"item": []}, deep,
            {"items": [{"text": "q"}, {"image": "gone.png", "loss": True}]}]  # fmt: skip
    write_lines(tmp_path / "rows.jsonl", rows)
    group = group_of(tmp_path, "interleaved", jsonl_path=["rows.jsonl"], data_dir=["images"])
    texts, reasons = build(tmp_path, goldens, group)
    assert texts == ["q", "q"]
    assert reasons[1].startswith("item 1: type 'sound' is unknown") and "no list of items" in reasons[3] and "nested deeper" in reasons[4]
    assert reasons[5].startswith("item 1: image ") and "gone.png cannot be read" in reasons[5]
    index = IndexedSamples.open(tmp_path / "index")
    assert index.manifest.datasets[0].skipped["item N: type 'sound' is unknown"] == 1
    source = GroupSource(group, [index.reader(group, group.datasets[0])], PlanSettings(0, SPEC))
    assert source.pixels(0, _image_of(source)).shape == (3, 48, 32)


def _image_of(source: GroupSource) -> Any:
    from megatron_bagel.layout.pack import build_pack

    return build_pack([source.sample(0, 0)], SPEC).images[0]


def test_tar_shards(goldens: Path, tmp_path: Path) -> None:
    """Captions by txt, by json and by renamed member; a missing picture; a shard that was cut off; an archive that is none."""
    pytest.importorskip("webdataset")
    row = json.dumps({"caption": ["two", "deux"]}).encode()
    write_tar(
        tmp_path / "t/0.tar",
        [("a/1.png", png(1)), ("a/1.txt", b"one"), ("2.JPG", png(2)), ("2.json", row), ("3.json", row), ("__meta__/x.txt", b"no"),
         ("4.png", png(3)), ("5.png", png(4)), ("5.txt", b"five")],
    )  # fmt: skip
    (tmp_path / "t/1.tar").write_bytes((tmp_path / "t/0.tar").read_bytes()[:2700])
    (tmp_path / "t/2.tar").write_bytes(b"no archive" * 100)
    group = group_of(tmp_path, data_dir=["t"])
    build_index([group], goldens / "hf", tmp_path / "index", BuildOptions(progress=False))
    index = IndexedSamples.open(tmp_path / "index")
    skipped = [json.loads(line) for line in (tmp_path / "index/skipped.jsonl").read_text().splitlines()]
    reasons = {(Path(line["file"]).name, line["row"]): line["reason"] for line in skipped}
    assert "no picture in sample 3, which has the members json" in reasons["0.tar", 2]
    assert "no caption" in reasons["0.tar", 3]
    assert "not a readable tar file" in reasons["2.tar", None]
    assert any(file == "1.tar" for file, _ in reasons)
    assert index.manifest.datasets[0].sources[0].samples == 3 and index.manifest.datasets[0].sources[0].rows == 5
    named = group_of(tmp_path, data_dir=["t"], columns={"caption": "en.txt"})
    write_tar(tmp_path / "t/0.tar", [("1.png", png(1)), ("1.en.txt", b"one"), ("1.de.txt", b"eins")])
    (tmp_path / "t/1.tar").unlink()
    (tmp_path / "t/2.tar").unlink()
    (tmp_path / "again").mkdir()
    assert build(tmp_path / "again", goldens, named)[0] == ["one"]


def test_a_missing_member_is_told_with_its_item(goldens: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    rows = [[{"image": name}, {"text": "a", "loss": True}] for name in ("0.png", "1.png", "x.0.png")]
    members = []
    for i, row in enumerate(rows):
        members += [(f"x{i}.json", json.dumps({"items": row}).encode()), (f"x{i}.0.png", png(i))]
    write_tar(tmp_path / "t/0.tar", members)
    texts, reasons = build(tmp_path, goldens, group_of(tmp_path, "interleaved", data_dir=["t"]))
    assert texts == ["a", "a"]
    assert reasons == {1: "item 0: member 1.png is missing from sample x1, which has 0.png, json"}


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("thinkmorph", {"question": "q"}, "no thought and no answer"),
        ("thinkmorph", {"resoning_thought_0": "t"}, "no text from the user"),
        ("thinkmorph", {"image_list": [], "instruction_list": ["q"], "output_text_list": ["a", "b"]}, "output_text_list has 2 texts"),
        ("thinkmorph", {"image_list": [], "instruction_list": "q", "output_text_list": ["a"]}, "column instruction_list is not a list"),
        ("trace", {"question": "q"}, "no list of steps"),
        ("trace", {"question": "q", "trace": [{"text": "a"}, {"image": None}]}, "step 1 of the trace has neither"),
        ("marked_trace", {"Question": "q"}, "no text under 'Question'"),
        ("marked_trace", {"Question": "<image_start>[p]<image_end>", "Text Reasoning Trace": "t"}, "the text names the picture p"),
        ("references", {"images": ["a.png"], "instruction": "i"}, "no picture under 'target'"),
        ("references", {"images": ["a.png"], "target": "t.png"}, "no text from the user"),
        ("think_then_draw", {"prompt": "p", "target": "t.png"}, "no text under 'thought'"),
        ("conversations", {"conversations": []}, "conversations is missing or empty"),
        ("conversations", {"messages": [{"role": "robot", "content": "x"}]}, "turn 0 is from 'robot'"),
        ("conversations", {"messages": [{"role": "user", "content": 3}]}, "turn 0 has no text"),
        ("conversations", {"messages": ["x"]}, "turn 0 of the conversation is no object"),
        ("conversations", talk("<image><image>what?", image="a.png"), "2 <image> marks are more than the images"),
    ],
)
def test_rows_that_a_form_refuses(form: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason.replace("[", r"\[")):
        FORMS[form](row)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "thinkmorf"}, "format 'thinkmorf' is unknown; did you mean 'thinkmorph'"),
        ({"format": ["items", "trace"]}, "format needs one entry, or one per dataset name"),
        ({"columns": ["image"]}, "columns must map our names"),
        ({"columns": {"image": "a", "text": "a"}}, "gives one column of the files two names"),
    ],
)
def test_settings_of_rows_are_checked(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_of(tmp_path, "interleaved", **keys)
    with pytest.raises(ValueError, match="format belongs to the group interleaved"):
        group_of(tmp_path, format="trace")
    with pytest.raises(ValueError, match="share_max_pixels belongs"):
        group_of(tmp_path, share_max_pixels=True)
