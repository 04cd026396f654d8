# SPDX-License-Identifier: Apache-2.0
"""Sources and index in an object store, by real clients of a real server: equal to local ones, fetched on first use, bounded on disk."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from megatron_bagel.cli.data_settings import data_settings
from megatron_bagel.config.parser import Config
from megatron_bagel.config.required_paths import check_paths
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.index_cache import IndexCache, IndexUnreachableError
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples
from tests.data.index_files import files_of, groups_of, noise_png, talk, write_lines, write_t2i
from tests.object_store import running_store, upload

SHARDS, ROWS = 5, 4
OPTIONS = BuildOptions(progress=False, rows_per_shard=ROWS)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with running_store() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def local(goldens: Path, tmp_path_factory: pytest.TempPathFactory, store: str) -> Path:
    """Sources of two groups with their index, here and in the store."""
    root = tmp_path_factory.mktemp("local")
    for shard in range(SHARDS):
        rows = [(noise_png(shard * ROWS + row), json.dumps({"a": f"picture {shard} {row}"})) for row in range(ROWS)]
        write_t2i(root / "data/t2i", rows, f"{shard:04d}.parquet")
    (root / "data/vlm/images").mkdir(parents=True)
    (root / "data/vlm/images/a.png").write_bytes(noise_png(99))
    write_lines(root / "data/vlm/chat.jsonl", [talk("<image> what?", image="a.png"), talk("and?")])
    build_index(groups_of(root / "data", "t2i_pretrain", "vlm_sft"), goldens / "hf", root / "index", OPTIONS)
    upload(root, store)
    return root


@pytest.fixture(scope="module")
def content(local: Path) -> list[tuple[bytes, list[int]]]:
    return contents(IndexedSamples.open(local / "index").datasets["t2i_pretrain/t2i"], range(SHARDS * ROWS))


def contents(reader: DatasetReader, rows: range | list[int]) -> list[tuple[bytes, list[int]]]:
    return [(reader.image_bytes(row, 0), reader.text_ids(row, 0).tolist()) for row in rows]


def opened(cache: IndexCache) -> DatasetReader:
    return IndexedSamples.open(cache.folder, cache=cache).datasets["t2i_pretrain/t2i"]


def smallest(local: Path, shards: int) -> int:
    """The limit that leaves space for so many shards of pictures."""
    sizes = {path: path.stat().st_size for path in (local / "index").rglob("*") if path.name != "skipped.jsonl" and path.is_file()}
    bins = [size for path, size in sizes.items() if path.suffix == ".bin"]
    return sum(sizes.values()) - sum(bins) + shards * max(bins)


def bytes_used(folder: Path) -> int:
    """The bytes of all files, while nobody makes space. A file that is renamed meanwhile has one inode and counts once."""
    used = {}
    with FileLock(folder / "space.lock"):
        for path in folder.rglob("*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            used[stat.st_ino] = 0 if path.is_dir() else stat.st_size
    return sum(used.values())


def test_an_index_of_remote_sources_has_the_same_shards(goldens: Path, tmp_path: Path, local: Path, store: str) -> None:
    build_index(groups_of(f"{store}/data", "t2i_pretrain", "vlm_sft"), goldens / "hf", tmp_path / "index", OPTIONS)
    ours, theirs = files_of(tmp_path / "index"), files_of(local / "index")
    assert len(ours) == 4 * (SHARDS + 1) + 2 and ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"manifest.json"}  # it names the sources


def test_shards_are_fetched_on_first_use_and_stay(tmp_path: Path, local: Path, store: str, content: list) -> None:
    cache = IndexCache(f"{store}/index/", tmp_path)
    reader = opened(cache)
    assert [path.name for path in cache.folder.iterdir() if path.suffix != ".lock"] == ["manifest.json"]
    reader.record(0)
    assert {path.suffix for path in cache.folder.rglob("00000.*")} - {".lock"} == {".arrow", ".idx", ".crc"}
    assert contents(reader, range(SHARDS * ROWS)) == content
    assert len(list(cache.folder.rglob("*.bin"))) == SHARDS
    assert np.array_equal(reader.columns(np.arange(9))[0].width.values, opened(cache).columns(np.arange(9))[0].width.values)


def test_the_shard_not_used_for_longest_makes_space(tmp_path: Path, local: Path, store: str, content: list) -> None:
    cache = IndexCache(f"{store}/index", tmp_path, smallest(local, 2))
    reader = opened(cache)
    for row in (0, ROWS, 1, 2 * ROWS):  # shards 0, 1, 0 again, 2
        assert contents(reader, [row]) == [content[row]]
        assert bytes_used(cache.folder) <= smallest(local, 2)
        time.sleep(0.01)
    assert sorted(path.stem for path in cache.folder.rglob("*.bin")) == ["00000", "00002"]
    assert contents(reader, range(SHARDS * ROWS)) == content
    lower = IndexCache(cache.url, tmp_path, smallest(local, 1))
    reader = opened(lower)
    assert bytes_used(cache.folder) <= smallest(local, 1), "a limit that is lower than before holds at once"
    assert contents(reader, [0]) == content[:1]


def _read_at_random(cache: IndexCache, seed: int, reads: int, answers: multiprocessing.Queue) -> None:
    reader, rng = opened(cache), random.Random(seed)
    rows = [rng.randrange(SHARDS * ROWS) for _ in range(reads)]
    answers.put((rows, contents(reader, rows)))


def test_processes_share_the_space_and_a_killed_one_leaves_none_taken(tmp_path: Path, local: Path, store: str, content: list) -> None:
    """Three processes with space for one shard, beside one that is killed, and a file that another had not finished."""
    limit = smallest(local, 1)
    cache = IndexCache(f"{store}/index", tmp_path, limit)
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue = context.Queue()
    opened(cache)  # this process has used its client, too
    (cache.folder / "t2i_pretrain/t2i").mkdir(parents=True)
    (cache.folder / "t2i_pretrain/t2i/00003.bin.partial").write_bytes(bytes(1000))
    readers = [context.Process(target=_read_at_random, args=(cache, seed, 8, answers)) for seed in range(3)]
    killed = context.Process(target=_read_at_random, args=(cache, 9, 10**6, answers))
    for process in [killed, *readers]:
        process.start()
    largest = 0
    while answers.qsize() < 3 and any(process.is_alive() for process in readers):
        largest = max(largest, bytes_used(cache.folder))
        if killed.is_alive() and list(cache.folder.rglob("*.bin")):
            killed.kill()
        time.sleep(0.005)
    for _ in readers:
        rows, found = answers.get(timeout=240)
        assert found == [content[row] for row in rows]
    for process in [killed, *readers]:
        process.join()
    assert 0 < largest <= limit + 1000  # the torn file was there before the limit was


def test_what_is_wrong_names_file_and_flag(tmp_path: Path, local: Path, store: str) -> None:
    with pytest.raises(ValueError, match=f"--index_dir: there is no {store}/elsewhere/manifest.json"):
        IndexCache(f"{store}/elsewhere", tmp_path).fetch_manifest()
    with pytest.raises(ValueError, match=f"--index_cache_bytes 10 is too small.* give at least {smallest(local, 1)}"):
        IndexCache(f"{store}/index", tmp_path, 10).fetch_manifest()
    with pytest.raises(ValueError, match="--index_dir: nonsense://x/manifest.json cannot be read .*nonsense"):
        IndexCache("nonsense://x", tmp_path).fetch_manifest()
    shutil.copytree(local / "index", tmp_path / "torn")
    (tmp_path / "torn/t2i_pretrain/t2i/00001.bin").unlink()
    upload(tmp_path / "torn", f"{store}/torn")
    reader = opened(IndexCache(f"{store}/torn", tmp_path))
    with pytest.raises(IndexUnreachableError, match=f"--index_dir: {store}/torn/t2i_pretrain/t2i/00001.bin cannot be fetched"):
        reader.image_bytes(ROWS, 0)
    assert not list(tmp_path.rglob("*.partial"))
    manifest = json.loads((local / "index/manifest.json").read_text())
    (tmp_path / "torn/manifest.json").write_text(json.dumps({**manifest, "build_key": "another"}))
    upload(tmp_path / "torn", f"{store}/torn")
    with pytest.raises(ValueError, match="--index_cache_dir: .* holds files of another index that was at s3://bucket/torn before"):
        opened(IndexCache(f"{store}/torn", tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"index_dir": "s3://bucket/index"}, "--index_dir s3://bucket/index is a URL: give a folder"),
        ({"index_dir": "FOLDER", "index_cache_dir": "x"}, "--index_cache_dir is for an index in an object store"),
        ({"index_cache_bytes": 5}, "--index_cache_bytes is for an index in an object store"),
    ],
)
def test_flags_that_need_each_other(tmp_path: Path, flags: dict, message: str) -> None:
    (tmp_path / "data.yaml").write_text("")
    config = Config.from_values({"dataset_config_file": str(tmp_path / "data.yaml"), **flags})
    with pytest.raises(ValueError, match=message):
        check_paths(config)


def test_a_run_opens_the_cache(tmp_path: Path) -> None:
    flags = {"index_dir": "s3://bucket/index", "index_cache_dir": str(tmp_path), "index_cache_bytes": 5}
    settings = data_settings(Config.from_values(flags))
    assert settings.index_cache == IndexCache("s3://bucket/index", tmp_path, 5) and settings.index == settings.index_cache.folder
