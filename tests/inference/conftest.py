# SPDX-License-Identifier: Apache-2.0
"""One tiny model folder for all generation tests, and an engine of it in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.inference.core.engine import Engine
from tests.inference.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(tiny_folder: Path, single_rank: None) -> Iterator[Engine]:
    from megatron_bagel.inference.core.load_engine import LoadOptions, load_engine

    yield load_engine(tiny_folder, LoadOptions(vae_transform=(32, 16), vit_transform=(42, 14)))


@pytest.fixture
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (24, 40, 3), dtype=np.uint8)), Image.new("RGB", (20, 20), "red")]
