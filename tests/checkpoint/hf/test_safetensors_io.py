# SPDX-License-Identifier: Apache-2.0
"""A streamed safetensors file is one the library reads, and appears only when it is complete."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, SafetensorsWriter


def _tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "empty": torch.zeros(0, 4)}


def test_library_reads_what_was_streamed(tmp_path: Path) -> None:
    tensors = _tensors()
    specs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", specs) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], t) and back[name].dtype == t.dtype for name, t in tensors.items())
    reader = SafetensorsReader(tmp_path / "x.safetensors")
    assert reader.spec("b") == ((7,), torch.bfloat16)
    assert torch.equal(reader.get("a"), tensors["a"])


def test_incomplete_file_never_appears(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="2 tensors never came"),
        SafetensorsWriter(tmp_path / "x.safetensors", {n: ((1,), torch.float32) for n in "abc"}) as writer,
    ):
        writer.write("a", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


def test_wrong_shape_and_second_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced was"), SafetensorsWriter(tmp_path / "x", {"a": ((2,), torch.float32)}) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="already written"), SafetensorsWriter(tmp_path / "x", {"a": ((1,), torch.float32)}) as writer:
        writer.write("a", torch.zeros(1))
        writer.write("a", torch.zeros(1))


def test_index_over_several_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "m-2.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    reader = SafetensorsReader(tmp_path / "m.safetensors.index.json")
    assert set(reader.keys()) == {"a", "b"} and torch.equal(reader.get("b"), torch.zeros(2))
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"m-2\.safetensors"):
        SafetensorsReader(tmp_path / "m.safetensors.index.json")


@pytest.mark.parametrize("content", [b"", b"not a safetensors file, but longer than eight bytes"])
def test_foreign_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a complete"):
        SafetensorsReader(tmp_path / "x.safetensors")


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(_tensors(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        SafetensorsReader(path)


def test_a_slice_is_read_and_nothing_beside_it(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 8, 3).bfloat16(), "b": torch.randn(5), "c": torch.randn(4, 6)}
    save_file(tensors, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors")
    for name, dim, start, stop in (("a", 0, 2, 5), ("a", 1, 3, 8), ("b", 0, 1, 4), ("b", 0, 5, 5), ("c", 1, 0, 2), ("c", 0, 0, 4)):
        assert torch.equal(reader.get_slice(name, dim, start, stop), tensors[name].narrow(dim, start, stop - start)), (name, dim)
    # Values beside the slice are not looked at, and those in it are.
    tensors["c"][:, 5] = float("nan")
    save_file(tensors, tmp_path / "y.safetensors")
    reader = SafetensorsReader(tmp_path / "y.safetensors")
    assert torch.equal(reader.get_slice("c", 1, 0, 5), tensors["c"][:, :5])
    with pytest.raises(ValueError, match="tensor c holds NaN"):
        reader.get_slice("c", 1, 4, 6)


def test_a_file_larger_than_the_memory_of_the_machine_opens(tmp_path: Path) -> None:
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    header = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    file = tmp_path / "x.safetensors"
    with file.open("wb") as written:
        written.write(struct.pack("<Q", len(header)) + header)
        written.truncate(8 + len(header) + size)
    assert torch.equal(SafetensorsReader(file).get_slice("a", 0, 3, 5), torch.zeros(2, dtype=torch.bfloat16))
