# SPDX-License-Identifier: Apache-2.0
"""One rule for text and JSON: encodings, marks, line ends, depth, digits, and files that are something else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_bagel.common.files import read_text
from megatron_bagel.common.json_files import json_lines, whole_lines
from megatron_bagel.common.json_text import check_encodable, decode, parse_json, split_lines, wrong_container

ROW = {"text": "one"}


def test_marks_and_line_ends_are_no_content(tmp_path: Path) -> None:
    """A mark at the start, CR LF, a blank line, a line without an end, and line separators inside a string."""
    lines = [json.dumps({"text": "a"}), "", '{"text": "b\u2028c\u0085d\x0be"}'.replace("\x0b", "\\u000b"), json.dumps({"text": "f"})]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    rows = list(json_lines(path, "--input"))
    assert [row["text"] for _, row in rows] == ["a", "b\u2028c\u0085d\x0be", "f"]
    assert [label for label, _ in rows] == [f"{path}, line {number}" for number in (1, 3, 4)]
    assert split_lines("a\u2028b\r\nc\n") == ["a\u2028b", "c"] and split_lines("a\n\nb") == ["a", "", "b"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe{\0}\0", "encoded as UTF-16, UTF-8 is expected; convert it with iconv"),
        (b"\xff\xfe\0\0{\0\0\0", "encoded as UTF-32"),
        (b'{"a": "\xe9"}', "not UTF-8"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "nested deeper than 100 levels"),
        (b'{"a": ' * 101 + b"1" + b"}" * 101, "nested deeper than 100 levels"),
        (b'{"id": ' + b"7" * 5000 + b"}", "number that cannot be read"),
    ],
)
def test_text_that_cannot_be_read_is_a_sentence(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(data)


def test_brackets_inside_strings_are_no_depth() -> None:
    text = json.dumps({"a": "[{" * 400 + '"\\'})
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * 100 + "]" * 100) and parse_json("[" * 400 + "]" * 400, max_depth=400)
    wide = json.dumps([{"a": [number]} for number in range(1000)])
    assert parse_json(wide) == json.loads(wide)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b"{}\n", mtime=0), "compressed with gzip.*gunzip"),
        (b"\x28\xb5\x2f\xfd....", "compressed with zstd"),
        (b"PK\x03\x04....", "zip archive"),
        (b"PAR1....", "parquet file"),
        (json.dumps([ROW] * 3).encode(), "one JSON list.*jq"),
        (json.dumps([ROW] * 3, indent=2).encode(), "one JSON list"),
        (b"[" + b",\n".join([json.dumps(ROW).encode()] * 3) + b"]", "one JSON list"),
        (json.dumps(ROW, indent=2).encode(), "several lines"),
        ("\ufeff".encode("utf-16"), "UTF-16"),
        (b'{"text": "a"}\r{"text": "b"}', "CR alone"),
    ],
)
def test_other_containers_are_recognised(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=rf"rows.jsonl .*{words}"):
        list(json_lines(tmp_path / "rows.jsonl", "--input"))


@pytest.mark.parametrize("data", [b"", b'{"a": 1}', b"[1]\n{}\n", b"[" * 300, b"{broken\n{}\n", b"{\n{}\n", b'{"a": 1}\r\n{}'])
def test_files_whose_first_line_is_only_bad_are_no_other_container(data: bytes) -> None:
    assert wrong_container(data) is None


def test_half_characters_are_named() -> None:
    check_encodable("whole \U0001f600")
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D"):
        check_encodable("cut \ud83d")


def test_a_torn_last_line_may_end_inside_a_character(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes('{"a": 1}\n{"b": "é'.encode()[:-1])
    assert list(whole_lines(tmp_path / "log.jsonl", "")) == [(1, {"a": 1})]


def test_text_files_are_named_when_they_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbftext: 1")
    assert read_text(tmp_path / "a.yaml", "--input") == "text: 1" == decode(b"text: 1")
    (tmp_path / "b.yaml").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match="b.yaml: not UTF-8"):
        read_text(tmp_path / "b.yaml", "--input")
