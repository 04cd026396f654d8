# SPDX-License-Identifier: Apache-2.0
"""Attributes on weights by which Megatron-Core knows how to treat them."""

from __future__ import annotations

from typing import Any

import torch


def mark(weight: torch.Tensor, **marks: Any) -> None:
    """Set attributes that Megatron-Core reads from a weight, such as ``sequence_parallel``."""
    for name, value in marks.items():
        setattr(weight, name, value)
