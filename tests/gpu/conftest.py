# SPDX-License-Identifier: Apache-2.0
"""What needs a CUDA GPU: left out where there is none. `python -m pytest tests/gpu` runs it, all on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_bagel import platform

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not platform.has_gpu():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Convolutions in fp32 rather than TF32, to be compared with a CPU's."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
