# SPDX-License-Identifier: Apache-2.0
"""Damage of a file that training reads by offset is found when it is opened or read, and the message names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_bagel.cli.data.verify import main as verify
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import MANIFEST
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples
from megatron_bagel.data.index.sequences import SMALL_BYTES, open_indexed
from tests.data.index_files import groups_of, noise_png, write_t2i

RED = '{"a": "red", "b": "a red circle"}'
NAME = "t2i_pretrain/t2i"


@pytest.fixture(scope="module")
def whole(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of two texts and a picture: two small pictures, and one above the size that is checked by default."""
    root = tmp_path_factory.mktemp("damage")
    pictures = [noise_png(0), noise_png(1), noise_png(2, 120, 80)]
    assert len(pictures[0]) < SMALL_BYTES < len(pictures[2])
    write_t2i(root / "t2i", [(picture, RED) for picture in pictures])
    build_index(groups_of(root, "t2i_pretrain"), goldens / "hf", root / "index", BuildOptions(progress=False))
    return root / "index"


@pytest.fixture
def index(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "index"))


def opened(index: Path, check_all: bool = False) -> DatasetReader:
    return IndexedSamples.open(index, check_all=check_all).datasets[NAME]


def shard_file(index: Path, ending: str) -> Path:
    return index / NAME / f"00000.{ending}"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def as_of_before(index: Path) -> None:
    """Make the index what an earlier version would have written."""
    manifest = json.loads((index / MANIFEST).read_text())
    del manifest["inputs_key"]
    for dataset in manifest["datasets"]:
        for source in dataset["sources"]:
            del source["bytes"], source["crc32"]
        for shard in dataset["shards"]:
            del shard["files"]["crc"], shard["arrow_crc32"], shard["source_checksums"]
    (index / MANIFEST).write_text(json.dumps(manifest))
    shard_file(index, "crc").unlink()


def test_an_undamaged_index_reads_with_every_check(index: Path) -> None:
    reader = opened(index, check_all=True)
    assert [len(reader.image_bytes(row, 0)) > 0 and len(reader.text_ids(row, 1)) > 0 for row in range(3)] == [True] * 3


@pytest.mark.parametrize("offset", [0, 9, 17, 18, 34, 34 + 4 * 8, 34 + 4 * 9, 34 + 4 * 9 + 8 * 4 + 1])
def test_a_flipped_bit_of_the_offsets(index: Path, offset: int) -> None:
    """Positions: magic, version, type, count, first and last length, first offset, a middle offset."""
    flip(shard_file(index, "idx"), offset)
    with pytest.raises(ValueError, match=r"00000\.idx is damaged"):
        opened(index).image_bytes(0, 0)


def test_a_flipped_bit_anywhere_in_the_table_is_refused_or_harmless(index: Path) -> None:
    """Of the two tables at its end, samples and modes, nothing is read; what Megatron-Core asserts of them is checked before."""
    path = shard_file(index, "idx")
    whole = path.read_bytes()
    undamaged = [opened(index).image_bytes(row, 0) for row in range(3)]
    harmless = []
    for offset in range(len(whole)):
        for bit in (0, 7):
            flip(path, offset, bit)
            open_indexed.cache_clear()
            try:
                assert [opened(index).image_bytes(row, 0) for row in range(3)] == undamaged
                harmless.append(offset)
            except ValueError as error:
                assert "00000.idx is damaged" in str(error)
            path.write_bytes(whole)
    assert min(harmless) >= 34 + 9 * 12


def test_a_table_of_zeros(index: Path) -> None:
    path = shard_file(index, "idx")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"00000\.idx is damaged"):
        opened(index).text_ids(0, 0)


def test_a_flipped_bit_of_a_text_or_a_small_picture(index: Path) -> None:
    flip(shard_file(index, "bin"), 0)
    reader = opened(index)
    with pytest.raises(ValueError, match="checksum"):
        reader.text_ids(0, 0)
    assert len(reader.text_ids(1, 0))
    picture = shard_file(index, "bin").read_bytes().index(b"\x89PNG")
    flip(shard_file(index, "bin"), picture + 60)
    with pytest.raises(ValueError, match="checksum"):
        opened(index).image_bytes(0, 0)


def test_large_pictures_are_compared_on_request(index: Path) -> None:
    flip(shard_file(index, "bin"), shard_file(index, "bin").stat().st_size - 40)
    assert len(opened(index).image_bytes(2, 0)) > SMALL_BYTES
    with pytest.raises(ValueError, match="checksum"):
        opened(index, check_all=True).image_bytes(2, 0)


def test_a_flipped_bit_of_the_columns(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard_file(index, "arrow")
    for offset in range(0, path.stat().st_size, 61):
        whole = path.read_bytes()
        flip(path, offset)
        with pytest.raises(ValueError, match=r"00000\.arrow"):
            opened(index).record(0)
        path.write_bytes(whole)
    flip(path, 10)
    assert verify([str(index)]) == 1 and "00000.arrow" in capsys.readouterr().out


def test_an_index_of_before_opens_and_its_tables_are_still_checked(index: Path) -> None:
    as_of_before(index)
    reader = opened(index, check_all=True)
    assert len(reader.text_ids(0, 0)) and len(reader.image_bytes(2, 0))
    assert verify([str(index)]) == 0
    flip(shard_file(index, "idx"), 34)
    with pytest.raises(ValueError, match=r"00000\.idx is damaged"):
        opened(index).text_ids(0, 0)


def test_columns_of_before_never_end_in_anything_but_a_named_error(index: Path) -> None:
    """Without a recorded checksum a flipped bit may pass, but what does not pass names the file."""
    as_of_before(index)
    path, whole = shard_file(index, "arrow"), shard_file(index, "arrow").read_bytes()
    refused = 0
    for offset in range(0, len(whole), 7):
        flip(path, offset, bit=7)
        try:
            opened(index).record(0)
        except ValueError as error:
            refused += 1
            assert "00000.arrow" in str(error)
        path.write_bytes(whole)
    assert refused > 20


def test_manifests_are_named(index: Path) -> None:
    for content, reason in (("{", "is not valid JSON"), ("[" * 200_000, "nested deeper than"), ("{}", "is not a manifest")):
        (index / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=reason) as caught:
            IndexedSamples.open(index)
        assert str(index / MANIFEST) in str(caught.value)
