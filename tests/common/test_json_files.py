# SPDX-License-Identifier: Apache-2.0
"""Every error of a JSON or YAML file names the file and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bagel.common.json_files import as_stored, json_lines, read_json, whole_lines
from megatron_bagel.common.yaml_files import read_yaml

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7031645\n"
DEEP = b"[" * 200_000


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (POINTER, "is a Git LFS pointer, not the file: run git lfs pull"),
        (b'{"a": ', "is not valid"),
        (DEEP, "nested"),
        (b"\xff\xfe{}", ".*UTF-8"),
        (None, "there is no file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, read: Callable[[Path, str], object], content: bytes | None, reason: str) -> None:
    path = tmp_path / "settings"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--flag: .*{reason}|--flag: {reason}") as caught:
        read(path, "--flag")
    assert str(path) in str(caught.value)


def test_other_values_than_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read_json(tmp_path / "list.json", "--flag")


def test_an_impossible_date_in_yaml_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("day: 2001-13-45")
    with pytest.raises(ValueError, match=r"a\.yaml is not valid YAML"):
        read_yaml(tmp_path / "a.yaml", "--flag")


def test_lines_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": ')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is not valid JSON"):
        list(json_lines(path, "--flag"))
    path.write_text('{"a": 1}\n{"a": ')
    assert list(whole_lines(path, "remove it")) == [(1, {"a": 1})]
    path.write_text("{\n{}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is not valid JSON .*; remove it"):
        list(whole_lines(path, "remove it"))


def test_a_round_trip_through_json() -> None:
    assert as_stored({1: (2, 3)}) == {"1": [2, 3]}
