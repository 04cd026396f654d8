# SPDX-License-Identifier: Apache-2.0
"""Refuses weights that are NaN or infinite when they are loaded; they would draw black pictures, or end a run that blames its rate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from megatron_bagel.common.finite import is_finite

#: "sampled" looks at up to ``_SAMPLES`` values of a tensor, evenly spread; "full" at all of them; "none" is for tools that compare weights.
WeightCheck = Literal["sampled", "full", "none"]
_SAMPLES = 1 << 14


def refuse_not_finite(tensor: torch.Tensor, name: str, path: Path, check: WeightCheck = "sampled") -> None:
    """Raise ValueError if a tensor that was read from ``path`` holds NaN or infinity, naming the file and the tensor."""
    if check == "none" or not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.detach().flatten(0 if tensor.is_contiguous() or tensor.ndim == 1 else 1)
    if check == "sampled":
        values = values[..., :: -(-values.numel() // _SAMPLES)]
    if not is_finite(values):
        count = values.numel() - int(torch.isfinite(values).sum())
        raise ValueError(
            f"{path}: tensor {name} holds NaN or infinite values ({count} of the {values.numel()} that were checked); the model it was "
            "saved from was broken, or the file is damaged: use an earlier step, or copy it again"
        )
