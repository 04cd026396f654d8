# SPDX-License-Identifier: Apache-2.0
"""Training on interleaved samples: questions, thoughts with loss and drawn pictures in one sample, beside the other groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.sources.dataset_config import load_groups
from tests.data.index_files import write_lines
from tests.data.interleaved_rows import picture
from tests.runs import make_world, numbers, run, run_config

pytestmark = pytest.mark.distributed
VAE = {"image_stride": 16, "max_image_size": 32, "min_image_size": 16}
VIT = {"image_stride": 14, "max_image_size": 42, "min_image_size": 28}
COLOURS = ("red", "blue", "green", "black")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample world with 24 interleaved rows beside it, and the index of both."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "data/images").mkdir()
    rows = []
    for number in range(24):
        first, second = COLOURS[number % 4], COLOURS[number // 4 % 4]
        for name, colour in (("a", first), ("b", second)):
            (folder / f"data/images/{number}{name}.png").write_bytes(picture(24 + number, 30, colour))
        rows.append({"images": [f"{number}a.png"], "prompt": f"make it {second}", "thought": f"not {first}", "target": f"{number}b.png"})
    write_lines(folder / "data/rows.jsonl", rows)
    content = yaml.safe_load((folder / "data/dataset.yaml").read_text())
    content["interleaved"] = {
        "dataset_names": ["rows"], "format": "think_then_draw", "jsonl_path": ["rows.jsonl"], "data_dir": ["images"],
        "weight": {0: 4, 2: 1},
        "image_transform_args": VAE, "vit_image_transform_args": VIT,
    }  # fmt: skip
    (folder / "data/mixed.yaml").write_text(yaml.safe_dump(content))
    build_index(load_groups(folder / "data/mixed.yaml"), folder / "data/tokenizer", folder / "mixed", BuildOptions(progress=False))
    return folder


def trained(world: Path, results: Path, **flags: Any) -> list[tuple[Any, ...]]:
    config = run_config(
        world, results, dataset_config_file=str(world / "data/mixed.yaml"), index_dir=str(world / "mixed"), total_steps=4, **flags
    )
    history = run(config)
    assert all(record["ce_tokens"] > 0 and record["mse_tokens"] > 0 for record in history)
    return numbers(history)


def test_a_run_trains_text_and_pictures_of_one_sample(world: Path, tmp_path: Path) -> None:
    """Three workers and none give the same numbers, bit for bit."""
    history = trained(world, tmp_path / "none")
    assert len(history) == 4 and trained(world, tmp_path / "three", num_workers=3) == history
