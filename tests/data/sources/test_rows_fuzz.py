# SPDX-License-Identifier: Apache-2.0
"""Whatever a row holds, it is a sample or has a reason, and the rows around it stay samples."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bagel.data.index.plan import ImageChecks
from megatron_bagel.data.index.shard_writer import measure
from megatron_bagel.data.sources.dataset_config import INTERLEAVED
from megatron_bagel.data.sources.forms import FORMS
from megatron_bagel.data.sources.records import BadRow, RawSample
from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.sources.rows import read_unit, scan_jsonl
from megatron_bagel.data.sources.unit import SourceUnit
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.index_files import png, talk

GOOD = talk("<image>What?", "Red.", image="0.png", id=7)
RULES = RowRules(max_text_bytes=10_000, max_json_depth=20)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=20), st.just("<image>"), st.just("<video>"),
    st.just("\ud83d"), st.just("../0.png"), st.just("0.png\0"), st.just("x" * 11_000), st.just([]), st.just({}), st.just([[["0.png"]]]),
    st.just({"bytes": "x", "path": None}), st.just("memory://nowhere/0.png"), st.just(10**400),
)  # fmt: skip
SHORT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LONG = settings(SHORT, max_examples=5000)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def replaced(value: Any, path: tuple, odd: Any) -> Any:
    """A copy of a JSON value with ``odd`` at ``path``."""
    if not path:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], odd)
    return copy


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A good line with a value replaced, a key added, or bytes changed; it stays one line."""
    row = replaced(GOOD, draw(st.sampled_from(places(GOOD))), draw(ODD))
    if isinstance(row, dict) and draw(st.booleans()):
        # A copy: the row itself may be an empty object that every example shares.
        row = {**row, draw(st.sampled_from(["video", "image", "text", "conversations", "more"])): draw(ODD)}
    data = bytearray(json.dumps(row).encode())
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 9))] = draw(st.one_of(st.binary(max_size=9), st.sampled_from([b"[" * 99, b"9" * 5000])))
    return bytes(data).replace(b"\n", b" ")


@pytest.fixture(scope="module")
def tokenizer(goldens: Path) -> Tokenizer:
    return load_tokenizer(goldens / "hf")


def check(unit: SourceUnit, tokenizer: Tokenizer, rows: int) -> None:
    """All rows are there; the first and the last are samples; a sample can be measured or has a reason."""
    results = list(read_unit(unit))
    assert [row for row, _ in results][:1] == [0] and results[-1][0] == rows - 1
    assert isinstance(results[0][1], RawSample) and isinstance(results[-1][1], RawSample)
    for _, sample in results:
        assert isinstance(sample, RawSample | BadRow)
        if isinstance(sample, RawSample):
            try:
                sizes, ids = measure(sample, unit.group, ImageChecks(), tokenizer)
            except BadRow as error:
                assert str(error)
            else:
                assert len(sizes) == len(sample.images) and len(ids) == len(sample.texts)
        else:
            assert str(sample) and "\n" not in str(sample)


def fuzz_lines(line: bytes, tokenizer: Tokenizer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "0.png").write_bytes(png(0))
        good = json.dumps(GOOD).encode()
        Path(folder, "chat.jsonl").write_bytes(b"\n".join([good, line, good]) + b"\n")
        (unit,) = scan_jsonl(f"{folder}/chat.jsonl", "vlm_sft", folder, None, 100, RULES)
        check(unit, tokenizer, 3)


@SHORT
@given(line=lines())
def test_a_bad_line_costs_no_other_line(line: bytes, tokenizer: Tokenizer) -> None:
    fuzz_lines(line, tokenizer)


@pytest.mark.slow
@LONG
@given(line=lines())
def test_a_bad_line_costs_no_other_line_for_long(line: bytes, tokenizer: Tokenizer) -> None:
    fuzz_lines(line, tokenizer)


#: A good row of every form of interleaved rows (docs/data.md).
FORM_ROWS: dict[str, dict[str, Any]] = {
    "items": {"items": [{"text": ["q", "p"], "droppable": True}, {"image": "0.png", "role": "assistant", "condition": ["vae"]}]},
    "conversations": {"image": ["0.png"], "conversations": [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "<image>\nA"}]},
    "thinkmorph": {
        "question": "Which?", "problem_image_0": "0.png", "resoning_thought_0": "I mark.", "reasoning_image_0": "0.png", "answer": "left",
    },
    "trace": {"question": "Draw.", "trace": [{"text": "First.", "image": "0.png"}, {"text": "There."}], "answer": "Done."},
    "marked_trace": {"Question": "A <image_start>[a]<image_end>", "Text Reasoning Trace": "I see.", "Final Answer": "cat", "a": "0.png"},
    "references": {"images": ["0.png"], "instruction": "Both.", "target": "0.png"},
    "think_then_draw": {"prompt": "A city.", "thought": "Towers.", "target": "0.png", "images": ["0.png"]},
}  # fmt: skip


@st.composite
def forms(draw: st.DrawFn) -> tuple[str, Any]:
    """A form, and a good row of it with a value replaced."""
    form = draw(st.sampled_from(sorted(FORM_ROWS)))
    row = replaced(FORM_ROWS[form], draw(st.sampled_from(places(FORM_ROWS[form]))), draw(ODD))
    return form, row if draw(st.booleans()) or not isinstance(row, dict) else {**row, "items": draw(ODD)}


def fuzz_form(form: str, row: Any, tokenizer: Tokenizer) -> None:
    """The row between two good ones, as a line and as a sample of a tar file."""
    good, odd = (json.dumps(content).encode() for content in (FORM_ROWS[form], row))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "0.png").write_bytes(png(0))
        Path(folder, "rows.jsonl").write_bytes(b"\n".join([good, odd, good]) + b"\n")
        (unit,) = scan_jsonl(f"{folder}/rows.jsonl", INTERLEAVED, folder, None, 100, RULES, RowFormat("jsonl", form))
        check(unit, tokenizer, 3)
        tar_of(Path(folder, "0.tar"), [[("json", line), ("0.png", png(0))] for line in (good, odd, good)])
        check(SourceUnit(INTERLEAVED, f"{folder}/0.tar", 0, 0, 3, rules=RULES, row_format=RowFormat("tar", form)), tokenizer, 3)


def tar_of(path: Path, samples: list[list[tuple[str, bytes]]]) -> None:
    """Write the members (ending, content) of every sample."""
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for ending, data in members:
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_reason_is_one_line_whatever_the_name_of_a_picture(tokenizer: Tokenizer) -> None:
    assert str(BadRow("image a\nb.png is missing\r")) == "image a\\nb.png is missing\\r"
    fuzz_form("conversations", {**FORM_ROWS["conversations"], "image": "\n"}, tokenizer)


def test_the_good_rows_of_the_forms_are_all_there() -> None:
    assert set(FORM_ROWS) == set(FORMS)


@SHORT
@given(case=forms())
def test_an_odd_interleaved_row_costs_no_other_row(case: tuple[str, Any], tokenizer: Tokenizer) -> None:
    fuzz_form(*case, tokenizer)


@pytest.mark.slow
@LONG
@given(case=forms())
def test_an_odd_interleaved_row_costs_no_other_row_for_long(case: tuple[str, Any], tokenizer: Tokenizer) -> None:
    fuzz_form(*case, tokenizer)


def test_a_member_that_stands_twice_in_a_tar_file_costs_one_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    good = [("png", png(0)), ("txt", b"a cat")]
    tar_of(tmp_path / "0.tar", [good, [*good, ("txt", b"a dog")], good])
    unit = SourceUnit("t2i_pretrain", str(tmp_path / "0.tar"), 0, 0, 3, row_format=RowFormat("tar"))
    check(unit, tokenizer, 3)
    assert "1.txt" in str(dict(read_unit(unit))[1])


CELLS = st.one_of(
    st.none(), st.binary(max_size=40), st.text(max_size=20), st.integers(-9, 9), st.just([]), st.just([None]), st.just({"bytes": None}),
    st.just({"bytes": png(0), "path": None}), st.just([png(0), None]), st.just([["a", None]]), st.just('{"a": "\\ud83d"}'),
    st.just("[" * 3000), st.just(json.dumps({"a": "x" * 11_000})), st.just('{"a": ' + "9" * 5000 + "}"),
)  # fmt: skip


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A small picture with some bytes changed, removed or added."""
    data = bytearray(png(draw(st.integers(0, 3)), draw(st.sampled_from(["RGB", "RGBA", "L", "P", "1"]))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 5))] = draw(st.binary(max_size=5))
    return bytes(data)


def fuzz_cells(group: str, cells: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    """A file of a row with odd cells; its columns have whatever type Arrow gives them."""
    names = ("image", "captions") if group == "t2i_pretrain" else ("image_list", "instruction_list")
    try:
        table = pa.table({name: pa.array([cell]) for name, cell in zip(names, cells, strict=True)})
    except (pa.ArrowException, UnicodeEncodeError):
        return  # no parquet file can hold it
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/0.parquet"
        try:
            pq.write_table(table, path)
        except pa.ArrowException:
            return
        results = list(read_unit(SourceUnit(group, path, 0, 0, 1, rules=RULES)))
        assert len(results) == 1 and results[0][0] == 0
        if isinstance(results[0][1], RawSample):
            try:
                measure(results[0][1], group, ImageChecks(depth="decode"), tokenizer)
            except BadRow as error:
                assert str(error)


GROUPS = st.sampled_from(["t2i_pretrain", "unified_edit"])


@SHORT
@given(group=GROUPS, cells=st.tuples(st.one_of(CELLS, pictures()), st.one_of(CELLS, st.just('{"a": "red"}'))))
def test_odd_cells_are_rows_with_a_reason(group: str, cells: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    fuzz_cells(group, cells, tokenizer)


@pytest.mark.slow
@LONG
@given(group=GROUPS, cells=st.tuples(st.one_of(CELLS, pictures()), st.one_of(CELLS, st.just('{"a": "red"}'))))
def test_odd_cells_are_rows_with_a_reason_for_long(group: str, cells: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    fuzz_cells(group, cells, tokenizer)


def test_a_string_that_is_not_utf_8_costs_one_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Arrow stores such strings when it is told not to look, as other writers do."""
    captions = [b'{"a": "red"}', b"\xff\xfe", b'{"a": "red"}']
    column = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.cumsum([0, *map(len, captions)], dtype=np.int32)), pa.py_buffer(b"".join(captions))]
    )
    pq.write_table(pa.table({"image": [png(0)] * 3, "captions": column}), tmp_path / "0.parquet")
    check(SourceUnit("t2i_pretrain", str(tmp_path / "0.parquet"), 0, 0, 3), tokenizer, 3)
    results = list(read_unit(SourceUnit("t2i_pretrain", str(tmp_path / "0.parquet"), 0, 0, 3)))
    assert "UnicodeDecodeError" in str(results[1][1])


@pytest.mark.slow
def test_rows_of_more_than_2_gib_together_are_read(tmp_path: Path) -> None:
    """64 rows of 8 images of 4.3 MB in one row group, few bytes on disk: Arrow cannot hold them as one nested array."""
    images, steps = [bytes(4_300_000)] * 8, [["add a lamp"]] * 7
    schema = pa.schema([("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))])
    batch = pa.record_batch([pa.array([images], schema.field(0).type), pa.array([steps], schema.field(1).type)], schema=schema)
    with pq.ParquetWriter(tmp_path / "0.parquet", schema, dictionary_pagesize_limit=1 << 28) as writer:
        writer.write_table(pa.Table.from_batches([batch] * 64), row_group_size=64)
    unit = SourceUnit("unified_edit", str(tmp_path / "0.parquet"), 0, 0, 64)
    count = 0
    for row, sample in read_unit(unit):
        assert row == count and isinstance(sample, RawSample) and [len(image) for image in sample.images] == [4_300_000] * 8
        count += 1
    assert count == 64
