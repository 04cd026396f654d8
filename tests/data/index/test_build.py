# SPDX-License-Identifier: Apache-2.0
"""An index gives back what was in the sources, whatever the number of processes; it appears whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_bagel.data.index import build
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import MANIFEST, SKIPPED
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.sources.dataset_config import parse_groups
from megatron_bagel.data.tokenizer import load_tokenizer
from tests.data.index_files import SIZES, files_of, groups_of, png, reasons, talk, write_lines, write_t2i

QUIET = BuildOptions(progress=False)


def test_what_goes_in_comes_out(goldens: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(goldens / "hf")
    write_t2i(tmp_path / "t2i", [(png(i), json.dumps({"a": f"a red circle {i}", "b": "blue"})) for i in range(7)])
    write_lines(tmp_path / "text/plain.jsonl", [{"text": f"number {i}"} for i in range(5)])
    build_index(groups_of(tmp_path, "t2i_pretrain", "text"), goldens / "hf", tmp_path / "index", QUIET)
    index = pickle.loads(pickle.dumps(IndexedSamples.open(tmp_path / "index", tokenizer)))
    t2i, text = index.datasets["t2i_pretrain/t2i"], index.datasets["text/plain"]
    assert (len(t2i), len(text)) == (7, 5)
    for i in range(7):
        assert t2i.image_bytes(i, 0) == png(i)
        assert (int(t2i.record(i).widths[0]), int(t2i.record(i).heights[0])) == (20 + i, 30)
        assert tokenizer.decode(t2i.text_ids(i, 0)) == f"a red circle {i}" and tokenizer.decode(t2i.text_ids(i, 1)) == "blue"
        assert t2i.record(i).text_tokens.tolist() == [len(t2i.text_ids(i, 0)), len(t2i.text_ids(i, 1))]
        assert t2i.source(i) == (str(tmp_path / "t2i/0000.parquet"), i)
    assert [tokenizer.decode(text.text_ids(i, 0)) for i in range(5)] == [f"number {i}" for i in range(5)]
    with pytest.raises(IndexError, match="no row 7"):
        t2i.record(7)
    with pytest.raises(IndexError, match="no image 1"):
        t2i.image_bytes(0, 1)


def test_the_same_bytes_whatever_the_processes(goldens: Path, tmp_path: Path) -> None:
    for n in range(4):
        write_t2i(tmp_path / "t2i", [(png(i), '{"a": "red"}') for i in range(n + 2)], f"{n:04d}.parquet")
    write_lines(tmp_path / "text/plain.jsonl", [{"text": f"number {i}"} for i in range(11)])
    groups = groups_of(tmp_path, "t2i_pretrain", "text")
    for workers in (0, 2):
        options = BuildOptions(workers=workers, rows_per_shard=4, progress=False)
        manifest = build_index(groups, goldens / "hf", tmp_path / f"index{workers}", options)
    assert [len(dataset.shards) for dataset in manifest.datasets] == [3, 3]  # files of 2+3, 4, 5 rows; lines 4+4+3
    assert files_of(tmp_path / "index0") == files_of(tmp_path / "index2")
    reader = IndexedSamples.open(tmp_path / "index0").datasets["text/plain"]
    assert [reader.source(i)[1] for i in range(11)] == list(range(11))


def test_bad_rows_are_named_and_kept_out(goldens: Path, tmp_path: Path) -> None:
    good = '{"a": "red"}'
    rows = [
        (png(0), good), (b"", good), (b"junk", good), (png(0)[:-30], good), (png(1), "not json"), (png(1), '["red"]'),
        (png(1), '{"a": " "}'), (png(1), '{"a": "", "b": "red"}'), (png(1), "{}"), (None, good), (png(2, "RGBA"), good),
    ]  # fmt: skip
    write_t2i(tmp_path / "t2i", rows)
    manifest = build_index(groups_of(tmp_path, "t2i_pretrain"), goldens / "hf", tmp_path / "index", QUIET)
    found = reasons(tmp_path / "index")
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 9]
    for row, reason in {1: "no bytes", 2: "not a readable image", 3: "decoded", 4: "not JSON", 5: "dict", 6: "empty caption"}.items():
        assert reason in found[row]
    assert manifest.datasets[0].samples == 4 and sum(manifest.datasets[0].skipped.values()) == 7
    assert manifest.datasets[0].sources[0].rows == 11 and manifest.datasets[0].sources[0].samples == 4


def test_bad_conversations_are_named_and_kept_out(goldens: Path, tmp_path: Path) -> None:
    (tmp_path / "vlm/images").mkdir(parents=True)
    (tmp_path / "vlm/images/0.png").write_bytes(png(0))
    (tmp_path / "vlm/images/bad.png").write_bytes(b"junk")
    lines = [
        talk("<image>what?", image="0.png"),
        talk("<image> or <image>?", image="0.png"),
        {"image": ["0.png"], "conversations": talk("<image>a")["conversations"] + talk("<image>b")["conversations"]},
        talk("<image>what?", image="missing.png"),
        talk("<image>what?", image="bad.png"),
        talk("what?", answer=None),
        "{not json",
        "[1]",
        {"conversations": [{"from": "system", "value": "be kind"}, {"from": "gpt", "value": "yes"}]},
        {"conversations": "none"},
        talk("<video>", video="a.mp4"),
        "",
        talk("no image at all", answer="right"),
        talk("<image> second is unused", image=["0.png", "0.png"]),
    ]
    write_lines(tmp_path / "vlm/chat.jsonl", lines)
    build_index(groups_of(tmp_path, "vlm_sft"), goldens / "hf", tmp_path / "index", QUIET)
    found = reasons(tmp_path / "index")
    expected = {
        1: "2 <image> marks but 1 images", 2: "2 <image> marks but 1 images", 3: "missing.png cannot be read", 4: "corrupt image",
        5: "no answer", 6: "not JSON", 7: "JSON object was expected", 8: "'system'", 9: "conversations", 10: "video",
    }  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert all(reason in found[row] for row, reason in expected.items())
    reader = IndexedSamples.open(tmp_path / "index").datasets["vlm_sft/chat"]
    assert [(reader.source(i)[1], len(reader.record(i).widths)) for i in range(len(reader))] == [(0, 1), (12, 0), (13, 1)]


def test_bad_edits_and_files_are_named(goldens: Path, tmp_path: Path) -> None:
    folder = tmp_path / "editing/edits"
    folder.mkdir(parents=True)
    images, texts = pa.list_(pa.binary()), pa.list_(pa.list_(pa.string()))

    def table(rows: list[tuple[list, list]]) -> pa.Table:
        return pa.table({"image_list": pa.array([r[0] for r in rows], images), "instruction_list": pa.array([r[1] for r in rows], texts)})

    rows = [([png(0), png(1)], [["make it red"]]), ([png(0)], []), ([png(0), png(1), png(2)], [["a"]]), ([png(0), png(1)], [[" "]])]
    pq.write_table(table(rows), folder / "0000.parquet")
    pq.write_table(table(rows), folder / "0001.parquet")
    (folder / "0002.parquet").write_bytes((folder / "0000.parquet").read_bytes()[:200])
    pq.write_table(pa.table({"picture": [1]}), folder / "0003.parquet")
    info = tmp_path / "editing/parquet_info/edits.json"
    write_lines(info, [{f"/elsewhere/edits/000{n}.parquet": {"num_row_groups": 1, "num_rows": 4} for n in (0, 2, 3)}])
    build_index(groups_of(tmp_path, "unified_edit"), goldens / "hf", tmp_path / "index", QUIET)
    lines = [json.loads(line) for line in (tmp_path / "index" / SKIPPED).read_text().splitlines()]
    told = [(Path(line["file"]).name, line["row"], line["reason"]) for line in lines]
    expected = [
        ("0001.parquet", None, "not listed"), ("0002.parquet", None, "not a readable parquet"), ("0003.parquet", None, "no column"),
        ("0000.parquet", 1, "2 images"), ("0000.parquet", 2, "need 2"), ("0000.parquet", 3, "empty"),
    ]  # fmt: skip
    assert [item[:2] for item in told] == [item[:2] for item in expected]
    for (_, _, reason), (_, _, words) in zip(told, expected, strict=True):
        assert words in reason
    info.write_text('{"/elsewhere/other/9.parquet": {}}')
    with pytest.raises(ValueError, match="lists none of the 4 files"):
        build_index(groups_of(tmp_path, "unified_edit"), goldens / "hf", tmp_path / "index2", QUIET)


def test_nothing_usable_is_an_error_and_leaves_no_index(goldens: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": ""}, {"words": "x"}])
    with pytest.raises(ValueError, match="not one usable sample"):
        build_index(groups_of(tmp_path, "text"), goldens / "hf", tmp_path / "index", QUIET)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("group", "message"), [("t2i_pretrain", "no folder"), ("text", "no file"), ("vlm_sft", "no file")])
def test_missing_sources_are_refused(goldens: Path, tmp_path: Path, group: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(groups_of(tmp_path, group), goldens / "hf", tmp_path / "index", QUIET)


def test_a_build_that_broke_off_continues(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": f"number {i}"} for i in range(10)])
    groups, options = groups_of(tmp_path, "text"), BuildOptions(rows_per_shard=3, progress=False)
    build_index(groups, goldens / "hf", tmp_path / "whole", options)
    write, written = build.write_shard, []

    def write_two(*args: object) -> object:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args[1].name)
        return write(*args)

    monkeypatch.setattr(build, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        build_index(groups, goldens / "hf", tmp_path / "index", options)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(build, "write_shard", lambda *args: written.append(args[1].name) or write(*args))
    build_index(groups, goldens / "hf", tmp_path / "index", options)
    assert written == ["00000", "00001", "00002", "00003"]
    assert files_of(tmp_path / "index") == files_of(tmp_path / "whole")
    assert not (tmp_path / "index.building").exists()


def test_an_index_that_fits_is_kept_and_another_is_not_overwritten(goldens: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": "one"}])
    groups = groups_of(tmp_path, "text")
    build_index(groups, goldens / "hf", tmp_path / "index", QUIET)
    before = (tmp_path / "index" / MANIFEST).stat().st_mtime_ns
    build_index(groups, goldens / "hf", tmp_path / "index", QUIET)
    assert (tmp_path / "index" / MANIFEST).stat().st_mtime_ns == before
    write_lines(tmp_path / "text/plain.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(ValueError, match="--overwrite"):
        build_index(groups, goldens / "hf", tmp_path / "index", QUIET)
    build_index(groups, goldens / "hf", tmp_path / "index", BuildOptions(overwrite=True, progress=False))
    assert len(IndexedSamples.open(tmp_path / "index").datasets["text/plain"]) == 2


def test_an_index_that_does_not_fit_is_not_opened(goldens: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": "one"}])
    build_index(groups_of(tmp_path, "text"), goldens / "hf", tmp_path / "index", QUIET)
    with pytest.raises(ValueError, match="is not an index"):
        IndexedSamples.open(tmp_path)
    other = tmp_path / "tokenizer"
    shutil.copytree(goldens / "hf", other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((other / name).read_text().replace("<|video_pad|>", "<|renamed|>"))
    with pytest.raises(ValueError, match="tokenizer"):
        IndexedSamples.open(tmp_path / "index", load_tokenizer(other))
    data = tmp_path / "index/text/plain/00000.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="should have"):
        IndexedSamples.open(tmp_path / "index").datasets["text/plain"].text_ids(0, 0)
    manifest = json.loads((tmp_path / "index" / MANIFEST).read_text())
    (tmp_path / "index" / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        IndexedSamples.open(tmp_path / "index")


def test_num_used_data(goldens: Path, tmp_path: Path) -> None:
    for n in range(3):
        write_t2i(tmp_path / "t2i", [(png(0), '{"a": "red"}')] * (n + 1), f"{n}.parquet")
    write_lines(tmp_path / "text/plain.jsonl", [{"text": f"{i}"} if i % 3 else "bad" for i in range(30)])
    groups = groups_of(tmp_path, "t2i_pretrain", "text")
    build_index(groups, goldens / "hf", tmp_path / "index", QUIET)
    index = IndexedSamples.open(tmp_path / "index")

    def used(number: int, count: int, **keys: object) -> list[list[int]]:
        content = {groups[number].name: {"dataset_names": [groups[number].datasets[0].name], "weight": 1, "num_used_data": [count],
                                         "image_transform_args": SIZES, **keys}}  # fmt: skip
        group = parse_groups(content, "x", tmp_path, tmp_path)[0]
        return [np.asarray(rows).tolist() for rows in index.reader(group, group.datasets[0]).used_rows(group.datasets[0], group)]

    assert used(0, 2) == [[0, 1, 2]]
    assert used(0, 4) == [[0, 1, 2, 3, 4, 5], [0]]
    assert used(1, 10) == [list(range(6))]
    shuffled = used(1, 10, shuffle_lines=True)[0]
    assert shuffled == used(1, 10, shuffle_lines=True)[0] != used(1, 10, shuffle_lines=True, shuffle_seed=1)[0]
    assert shuffled == sorted(shuffled) and 2 <= len(shuffled) <= 10
    assert used(1, 99) == [list(range(20))]


def test_more_shards_than_a_process_may_open_files(goldens: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "text/plain.jsonl", [{"text": f"number {row}"} for row in range(150)])
    build_index(groups_of(tmp_path, "text"), goldens / "hf", tmp_path / "index", BuildOptions(rows_per_shard=1, progress=False))
    reader = IndexedSamples.open(tmp_path / "index").datasets["text/plain"]
    assert len(reader.shards()) == 150
    texts = [reader.text_ids(row, 0).tolist() for row in range(150)]
    assert len(list(Path("/proc/self/fd").iterdir())) < 3 * 64 + 100
    assert [reader.text_ids(row, 0).tolist() for row in range(150)] == texts and len(set(map(tuple, texts))) == 150
