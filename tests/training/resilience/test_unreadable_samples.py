# SPDX-License-Identifier: Apache-2.0
"""Runs over an index with broken pictures: the same losses on any layout, every replacement counted and listed, too many end the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_bagel.checkpoint.dist.step_folders import latest_checkpoint
from tests.runs import make_world, numbers, run, run_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample world with every third picture of its text-to-image data, and every other plain text, destroyed behind the index's
    back."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    for path in (folder / "index/t2i_pretrain").rglob("*.bin"):
        content = bytearray(path.read_bytes())
        magic, place, number = b"\xff\xd8\xff" if b"\xff\xd8\xff" in content else b"\x89PNG", 0, 0
        while (place := content.find(magic, place)) >= 0:
            if number % 3 == 0:
                content[place : place + 16] = bytes(16)
            place, number = place + 16, number + 1
        assert number > 3
        path.write_bytes(content)
    (path,) = (folder / "index/text").rglob("*.bin")
    content = bytearray(path.read_bytes())
    sequences = IndexedDataset(str(path.with_suffix("")), multimodal=True)  # its views must not outlive it
    for start in sequences.index.sequence_pointers[::2].tolist():
        content[start : start + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def without_checksums(world: Path) -> Path:
    """The same index as an earlier version wrote it: no checksum that is compared while samples are read."""
    index = world / "earlier_index"
    shutil.copytree(world / "index", index)
    manifest = json.loads((index / "manifest.json").read_text())
    for dataset in manifest["datasets"]:
        for shard in dataset["shards"]:
            del shard["files"]["crc"], shard["arrow_crc32"]
            (index / dataset["group"] / dataset["name"] / f"{shard['name']}.crc").unlink()
    (index / "manifest.json").write_text(json.dumps(manifest))
    return index


def skipped(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "skipped.jsonl").read_text().splitlines()]


def test_broken_pictures_are_replaced_alike_on_any_layout(world: Path, tmp_path: Path) -> None:
    flags = {"max_skipped_share": 1.0, "total_steps": 3, "save_every": 100}
    alone = run(run_config(world, tmp_path / "alone", **flags))
    assert alone[-1]["skipped_samples"] == len(skipped(tmp_path / "alone")) > 0
    assert all("row" in line["reason"] and "cannot be read" in line["reason"] for line in skipped(tmp_path / "alone"))
    spread = run(run_config(world, tmp_path / "spread", ranks=2, tensor_model_parallel_size=2, num_workers=1, **flags), ranks=2)
    assert [record["skipped_samples"] for record in spread] == [record["skipped_samples"] for record in alone]
    assert {(line["step"], line["reason"]) for line in skipped(tmp_path / "spread")} == {
        (line["step"], line["reason"]) for line in skipped(tmp_path / "alone")
    }
    assert any("text/text sample" in line["reason"] and "checksum" in line["reason"] for line in skipped(tmp_path / "alone"))
    for one, other in zip(alone, spread, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_pictures_encoded_early_are_those_of_the_replacement(world: Path, tmp_path: Path) -> None:
    """Two ranks share the pictures, so a replacement may change who encodes which."""
    flags = {"max_skipped_share": 1.0, "total_steps": 3, "save_every": 100, "tensor_model_parallel_size": 2}
    plain, early = tmp_path / "plain", tmp_path / "early"
    expected = run(run_config(world, plain, ranks=2, **flags), ranks=2)
    assert numbers(run(run_config(world, early, ranks=2, overlap_vae_encode=True, **flags), ranks=2)) == numbers(expected)
    assert skipped(early) == skipped(plain) and {line["step"] for line in skipped(plain)} - {0}


@pytest.mark.slow
def test_a_run_killed_after_a_replacement_continues_bit_for_bit(world: Path, without_checksums: Path, tmp_path: Path) -> None:
    """The last checkpoint is gone, as after a kill before it: steps done again are the same, and nothing is listed twice.

    Without checksums, a token id outside the vocabulary is what shows a broken text.
    """
    config = run_config(world, tmp_path, index_dir=str(without_checksums), max_skipped_share=1.0, total_steps=4, save_every=2)
    whole, listed = run(config), skipped(tmp_path)
    assert any("text/text sample" in line["reason"] and "token ids from" in line["reason"] for line in listed)
    assert not any("checksum" in line["reason"] for line in listed)
    assert any(line["step"] > 1 for line in listed)
    shutil.rmtree(latest_checkpoint(tmp_path / "checkpoints"))
    assert latest_checkpoint(tmp_path / "checkpoints").name == "0000002"
    again = run(config)
    assert numbers(again) == numbers(whole) and skipped(tmp_path) == listed
    assert [record["skipped_samples"] for record in again] == [record["skipped_samples"] for record in whole]


def test_too_many_broken_pictures_end_the_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--max_skipped_share 0.01 allows.*skipped.jsonl"):
        run(run_config(world, tmp_path, max_skipped_share=0.01, total_steps=40, save_every=100))
