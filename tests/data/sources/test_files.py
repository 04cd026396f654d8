# SPDX-License-Identifier: Apache-2.0
"""Sources on remote file systems give the index that local ones give: through fsspec's memory and pyarrow's own file system."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.sources import files
from tests.data.index_files import groups_of, noise_png, png, reasons, talk, write_lines, write_t2i

NAMES = ("t2i_pretrain", "vlm_sft", "text")
QUIET = BuildOptions(progress=False, rows_per_shard=3)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "sources"
    for n in range(2):
        write_t2i(root / "t2i", [(noise_png(10 * n + i), '{"a": "red"}') for i in range(5)], f"{n}.parquet")
    write_lines(root / "text/plain.jsonl", [{"text": f"number {i}"} for i in range(7)])
    (root / "vlm/images/deep").mkdir(parents=True)
    (root / "vlm/images/deep/0.png").write_bytes(png(0))
    lines = [talk("<image>what?", image="deep/0.png"), talk("<image>", image="gone.png"), talk("no image")]
    write_lines(root / "vlm/chat_two.jsonl", lines)
    return root


def to_memory(root: Path) -> str:
    system = fsspec.filesystem("memory")
    for path in root.rglob("*"):
        if path.is_file():
            system.pipe(f"/bucket/{path.relative_to(root)}", path.read_bytes())
    return "memory://bucket"


def samples(index: Path) -> list[tuple]:
    """Everything of an index but where it came from."""
    found = []
    for name, reader in IndexedSamples.open(index).datasets.items():
        for row in range(len(reader)):
            record = reader.record(row)
            texts = [reader.text_ids(row, text).tolist() for text in range(len(record.text_tokens))]
            images = [reader.image_bytes(row, image) for image in range(len(record.widths))]
            place, line = reader.source(row)
            found.append((name, texts, images, record.structure.tolist(), place.rsplit("/", 1)[-1], line))
    return found


@pytest.mark.parametrize("system", ["memory", "file"])
def test_remote_sources_give_the_same_samples(system: str, sources: Path, goldens: Path, tmp_path: Path) -> None:
    url = to_memory(sources) if system == "memory" else f"file://{sources}"
    build_index(groups_of(sources, *NAMES), goldens / "hf", tmp_path / "local", QUIET)
    build_index(groups_of(url, *NAMES), goldens / "hf", tmp_path / "remote", QUIET)
    assert samples(tmp_path / "remote") == samples(tmp_path / "local") and len(samples(tmp_path / "local")) == 19
    assert list(reasons(tmp_path / "remote")) == [1] and f"{url}/vlm/images/gone.png cannot be read" in reasons(tmp_path / "remote")[1]
    stamp = (tmp_path / "remote/manifest.json").stat().st_mtime_ns
    build_index(groups_of(url, *NAMES), goldens / "hf", tmp_path / "remote", QUIET)
    assert (tmp_path / "remote/manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.distributed
def test_workers_read_remote_sources_too(sources: Path, goldens: Path, tmp_path: Path) -> None:
    options = BuildOptions(progress=False, rows_per_shard=3, workers=2)
    build_index(groups_of(f"file://{sources}", "text"), goldens / "hf", tmp_path / "index", options)
    assert len(samples(tmp_path / "index")) == 7


def test_unknown_schemes_and_missing_folders_are_named(sources: Path, goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nonsense://"):
        build_index(groups_of("nonsense://bucket", "text"), goldens / "hf", tmp_path / "index", QUIET)
    with pytest.raises(ValueError, match="no folder memory://nowhere/t2i"):
        build_index(groups_of("memory://nowhere", "t2i_pretrain"), goldens / "hf", tmp_path / "index", QUIET)
    with pytest.raises(ValueError, match="no file memory://nowhere/text/plain.jsonl"):
        build_index(groups_of("memory://nowhere", "text"), goldens / "hf", tmp_path / "index", QUIET)


def test_places_are_joined_as_urls_and_as_paths() -> None:
    assert files.join("s3://bucket/a/", "b/c.png") == "s3://bucket/a/b/c.png"
    assert files.join("s3://bucket", "gs://other/x") == "gs://other/x" and files.join("/a", "/b") == "/b"
    assert files.join("/a/b", "c") == "/a/b/c" and files.last_parts("s3://bucket/a/b.parquet") == ("a", "b.parquet")


def test_a_remote_read_that_fails_for_a_moment_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_FIRST_PAUSE", 0.0)
    calls = []

    def unsteady() -> bytes:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("connection reset")
        return b"data"

    assert files._with_retries(unsteady) == b"data" and len(calls) == 3
    with pytest.raises(FileNotFoundError):
        files._with_retries(lambda: Path("/there/is/no/file").read_bytes())
