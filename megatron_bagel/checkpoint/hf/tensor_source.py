# SPDX-License-Identifier: Apache-2.0
"""What weights are read from, whatever holds them: a safetensors file, or a view of pretrained folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader


class TensorSource(Protocol):
    """Named tensors under the released names, read one at a time."""

    @property
    def path(self) -> object:
        """Where the tensors come from, for messages."""

    def keys(self) -> list[str]:
        """All tensor names."""

    def __contains__(self, name: str) -> bool: ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype, without reading the tensor."""

    def origin(self, name: str) -> tuple[SafetensorsReader, str]:
        """The reader of the files that hold the tensor, and its name there."""

    def get(self, name: str) -> torch.Tensor:
        """The tensor, read now."""

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read the tensor now into ``out``, which has its type and as many values."""

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """A part along ``dim`` (0 or 1), read now."""
