# SPDX-License-Identifier: Apache-2.0
"""Tensors arrive as they were sent, with and without Linux's memory files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing import get_context

import pytest
import torch

from megatron_bagel.data.loading.memory_transfer import Parcel


@dataclass
class Record:
    number: int
    one: torch.Tensor
    other: torch.Tensor
    empty: torch.Tensor


def record() -> Record:
    return Record(7, torch.arange(33, dtype=torch.float32).view(3, 11).T, torch.arange(5, dtype=torch.bfloat16), torch.zeros(0, 4))


def _forbidden(*arguments: object) -> int:
    raise PermissionError("a sandbox forbids memory files")


@pytest.mark.parametrize("has_memory_files", [True, False])
def test_a_record_arrives_as_it_was_sent(monkeypatch: pytest.MonkeyPatch, has_memory_files: bool) -> None:
    if not has_memory_files:
        monkeypatch.setattr(os, "memfd_create", _forbidden, raising=False)
    context = get_context("fork")
    queue, received = context.Queue(), context.Event()

    def sender() -> None:
        queue.put(Parcel.of(record()))
        received.wait(60)

    process = context.Process(target=sender)
    process.start()
    arrived, expected = queue.get(timeout=240).open(), record()
    received.set()
    process.join()
    assert arrived.number == expected.number
    for name in ("one", "other", "empty"):
        tensor = getattr(arrived, name)
        assert torch.equal(tensor, getattr(expected, name)) and tensor.dtype == getattr(expected, name).dtype
    arrived.one += 1  # the memory is the receiver's own now


def test_no_tensor_element_needs_no_memory() -> None:
    parcel = Parcel.of(Record(1, torch.zeros(0), torch.zeros(2, 0), torch.zeros(0, 4)))
    assert parcel.descriptor is None and parcel.open().other.shape == (2, 0)


def test_descriptors_and_memory_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        Parcel.of(record()).open()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after - before <= 1  # the listener that hands descriptors over stays
