# SPDX-License-Identifier: Apache-2.0
"""What identifies the data of a run, and an index that was built from other files than the dataset config names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.cli.data import sample as make_sample_data
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import read_manifest
from megatron_bagel.data.loading.fingerprint import dataset_digest, other_sources
from megatron_bagel.data.sources.dataset_config import GroupConfig, load_groups


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_sample_data.main([str(folder / "data"), "--t2i", "6", "--edit", "3", "--vlm", "6", "--text", "4"])
    for name, workers in (("index", 0), ("again", 2)):
        build_index(load_groups(folder / "data/dataset.yaml"), folder / "data/tokenizer", folder / name, BuildOptions(workers=workers))
    return folder


def groups_at(folder: Path, world: Path, prefix: str = "") -> list[GroupConfig]:
    """The groups of a config that names the same files in another folder."""
    folder.mkdir(parents=True)
    (folder / "dataset.yaml").write_text((world / "data/dataset.yaml").read_text().replace(f"{world / 'data'}/", f"{folder}/{prefix}"))
    return load_groups(folder / "dataset.yaml")


def test_a_digest_is_that_of_the_content(world: Path) -> None:
    first, again = (read_manifest(world / name).datasets for name in ("index", "again"))
    assert [dataset_digest(info) for info in first] == [dataset_digest(info) for info in again]
    assert len({dataset_digest(info) for info in first}) == len(first) == 4


def test_an_index_of_the_same_files_and_of_moved_ones_is_fine(world: Path, tmp_path: Path) -> None:
    manifest = read_manifest(world / "index")
    assert other_sources(manifest, load_groups(world / "data/dataset.yaml")) == []
    assert other_sources(manifest, groups_at(tmp_path / "there/data", world)) == [], "the last two parts are the same"


def test_an_index_of_other_files_is_said(world: Path, tmp_path: Path) -> None:
    sentences = other_sources(read_manifest(world / "index"), groups_at(tmp_path / "others", world, "other_"))
    assert len(sentences) == 4
    assert all("the index was built from" in text and str(world) in text and str(tmp_path / "others") in text for text in sentences)
