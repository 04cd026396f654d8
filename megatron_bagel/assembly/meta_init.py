"""Modules built without memory for their weights, which come from disk anyway: no rank holds more than its share and one tensor.

Building with random weights first would also draw billions of numbers only to overwrite them.
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
    """Within the block parameters of new modules have shapes and no data; tables computed with numpy are real.

    Megatron-Core passes `torch.cuda.current_device()` explicitly, so that has to answer "meta", too.
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
    """Put every parameter of `module` on `device` in `dtype`; those without data become zeros, with the attributes they had.

    Zeros, because rows that pad the vocabulary are in no file. A parameter used in two places stays one.
    """
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                real = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device), requires_grad=parameter.requires_grad)
                real.__dict__.update(parameter.__dict__)
                made[id(parameter)] = real
            part.register_parameter(name, made[id(parameter)])
    module.to(device, dtype)
