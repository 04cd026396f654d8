# SPDX-License-Identifier: Apache-2.0
"""Servers load the files that the index names; the index never makes averages look like the model's own weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from tests.checkpoint.hf.exported import export

TABLE = "latent_pos_embed.pos_embed"


@pytest.mark.parametrize("shard_bytes", [None, 300_000], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", ["ema", "model"])
def test_the_index_names_every_tensor_of_both_files(goldens: Path, tmp_path: Path, kind: str, shard_bytes: int | None) -> None:
    out = export(goldens, tmp_path / "out", (kind,), shard_bytes=shard_bytes)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files)
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert len(files) > 3 if shard_bytes else set(files) == {f"{kind}.safetensors", "ae.safetensors"}
    # A server sizes its latent table by this tensor.
    assert files[index["weight_map"][TABLE]][TABLE].shape[0] == HFFolder(out).arch.max_latent_size ** 2


@pytest.mark.parametrize("shard_bytes", [None, 300_000], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", ["ema", "model"])
def test_the_folder_reads_back_as_the_kind_that_was_written(goldens: Path, tmp_path: Path, kind: str, shard_bytes: int | None) -> None:
    folder = HFFolder(export(goldens, tmp_path / "out", (kind,), shard_bytes=shard_bytes))
    assert folder.available_weights() == [kind] == list(folder.default_weights())
    reader, recorded = folder.weights(kind), load_file(goldens / "hf" / "ema.safetensors")
    assert set(reader.keys()) == set(recorded), "the autoencoder's tensors are no part of the model"
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in recorded.items())
    other = "model" if kind == "ema" else "ema"
    with pytest.raises(ValueError, match=rf"has no {other}\.safetensors"):
        folder.weights(other)


def test_both_kinds_have_no_common_index(goldens: Path, tmp_path: Path) -> None:
    out = export(goldens, tmp_path / "out", ("ema", "model"))
    assert not list(out.glob("*.index.json")) and HFFolder(out).available_weights() == ["ema", "model"]


def test_folders_of_before_read_as_they_did(goldens: Path, tmp_path: Path) -> None:
    """A single file without an index, and parts whose index names the model's weights alone."""
    assert HFFolder(goldens / "hf").available_weights() == ["ema"]
    out = export(goldens, tmp_path / "out", ("model",), shard_bytes=300_000)
    index = out / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file != "ae.safetensors"}
    index.write_text(json.dumps(content))
    (out / "config.json").write_text((goldens / "hf" / "config.json").read_text())
    assert HFFolder(out).available_weights() == ["model"]
    assert set(SafetensorsReader(index).keys()) == set(load_file(goldens / "hf" / "ema.safetensors"))
