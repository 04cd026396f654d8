# SPDX-License-Identifier: Apache-2.0
"""An index serves sources of the same bytes, whatever their times are, and no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import Manifest, read_manifest
from tests.data.index_files import groups_of, noise_png, write_lines, write_t2i

RED = '{"a": "red"}'


@pytest.fixture
def root(goldens: Path, tmp_path: Path) -> Path:
    write_t2i(tmp_path / "t2i", [(noise_png(0), RED)], "0.parquet")
    write_t2i(tmp_path / "t2i", [(noise_png(1), RED)], "1.parquet")
    write_lines(tmp_path / "text/plain.jsonl", [{"text": f"number {row}"} for row in range(9)])
    assert build(tmp_path, goldens)
    return tmp_path


def build(root: Path, goldens: Path) -> Manifest | None:
    options = BuildOptions(rows_per_shard=4, progress=False)
    return build_index(groups_of(root, "t2i_pretrain", "text"), goldens / "hf", root / "index", options, "do this instead")


def touch(root: Path) -> None:
    for path in (*(root / "t2i").iterdir(), root / "text/plain.jsonl"):
        os.utime(path, ns=(1, 1))


def test_every_source_is_recorded(root: Path) -> None:
    for dataset in read_manifest(root / "index").datasets:
        assert all(source.bytes == Path(source.path).stat().st_size and source.crc32 is not None for source in dataset.sources)


def test_touched_sources_serve(root: Path, goldens: Path) -> None:
    before = (root / "index/manifest.json").stat().st_mtime_ns
    touch(root)
    assert build(root, goldens) == read_manifest(root / "index")
    assert (root / "index/manifest.json").stat().st_mtime_ns == before


def test_sources_of_other_bytes_do_not_serve(root: Path, goldens: Path) -> None:
    path = root / "text/plain.jsonl"
    path.write_text(path.read_text().replace("number 8", "number 9"))
    with pytest.raises(ValueError, match="holds the index of other sources or another tokenizer; do this instead"):
        build(root, goldens)
