# SPDX-License-Identifier: Apache-2.0
"""Builds modules without memory for weights that will be loaded, so no rank holds more than its share and one tensor.

Random weights would cost memory and billions of random numbers, only to be overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_META = torch.device("meta")


@contextmanager
def on_meta() -> Iterator[None]:
    """Give parameters of modules made within the block shapes but no data. Tables computed with numpy have data.

    Megatron-Core passes ``torch.cuda.current_device()`` explicitly, so that function returns the meta device too.
    """
    cuda: Any = torch.cuda
    current_device = cuda.current_device
    cuda.current_device = lambda: _META
    try:
        with _META:
            yield
    finally:
        cuda.current_device = current_device


def materialize(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put every parameter of ``module`` on ``device`` in ``dtype``. Parameters without data become zeros and keep their attributes.

    They become zeros because rows that pad the vocabulary are in no file. A parameter that two modules share stays one parameter.
    """
    replacements: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in replacements:
                zeros = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device), requires_grad=parameter.requires_grad)
                zeros.__dict__.update(parameter.__dict__)
                replacements[id(parameter)] = zeros
            part.register_parameter(name, replacements[id(parameter)])
    module.to(device, dtype)
