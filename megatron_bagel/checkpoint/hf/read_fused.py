# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of one parameter straight into their places in it, without a copy of each."""

from __future__ import annotations

import torch

from megatron_bagel.checkpoint.hf.reused_memory import ReusedMemory
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.checkpoint.hf.weight_map import Entry


def read_fused(source: TensorSource, entry: Entry, memory: ReusedMemory) -> torch.Tensor:
    """Return the full parameter of ``entry``, in ``memory`` or, if its tensors have different types, elsewhere."""
    dtypes = {source.spec(name)[1] for name in entry.hf}
    if len(dtypes) > 1:
        return entry.fuse([source.get(name) for name in entry.hf])
    full = memory.tensor(entry.shape, *dtypes)
    for name, part in zip(entry.hf, entry.parts(full), strict=True):
        source.read_into(name, part)
    return full
