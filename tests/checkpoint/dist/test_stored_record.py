# SPDX-License-Identifier: Apache-2.0
"""A tensor that torch stored is read into memory that exists, or left to torch."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from megatron_bagel.checkpoint.dist.stored_record import read_stored

BEFORE = 5003  # bytes of other records


def stored(path: Path, value: object) -> int:
    """Write one record between others; returns its length."""
    record = io.BytesIO()
    torch.save(value, record)
    path.write_bytes(b"x" * BEFORE + record.getvalue() + b"y" * 77)
    return len(record.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (3, 70_001), (2, 3, 4)])
def test_a_plain_tensor_is_read_in_place(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    length = stored(tmp_path / "file", tensor)
    for forgets in (False, True):
        out = torch.full(shape, 7.0, dtype=dtype)
        assert read_stored(tmp_path / "file", BEFORE, length, out, forgets)
        assert torch.equal(out, tensor)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 6).t(),
        torch.randn(30)[2:26].view(6, 4),
        torch.randn(6, 5),
        torch.randn(6, 4).double(),
        torch.nn.Parameter(torch.randn(6, 4)),
        [torch.randn(6, 4)],
        torch.randn(6, 4).to_sparse(),
    ],
    ids=["transposed", "part of a storage", "other shape", "other type", "parameter", "list", "sparse"],
)
def test_what_is_another_value_is_left_to_torch(tmp_path: Path, value: object) -> None:
    length = stored(tmp_path / "file", value)
    assert not read_stored(tmp_path / "file", BEFORE, length, torch.empty(6, 4))


def test_a_damaged_record_is_left_to_torch(tmp_path: Path) -> None:
    length = stored(tmp_path / "file", torch.randn(6, 4))
    out = torch.empty(6, 4)
    assert not read_stored(tmp_path / "file", BEFORE, length - 30, out)
    content = bytearray((tmp_path / "file").read_bytes())
    for place in range(BEFORE, BEFORE + length, 13):
        (tmp_path / "file").write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        read_stored(tmp_path / "file", BEFORE, length, out)  # right or wrong, but without an error of its own
    (tmp_path / "file").write_bytes(content[: BEFORE + length // 2])
    assert not read_stored(tmp_path / "file", BEFORE, length, out)
    assert not read_stored(tmp_path / "absent", BEFORE, length, out)


def test_nothing_that_the_record_names_is_called(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "called",)

    length = stored(tmp_path / "file", Evil())
    assert not read_stored(tmp_path / "file", BEFORE, length, torch.empty(6, 4))
    assert not (tmp_path / "called").exists()
