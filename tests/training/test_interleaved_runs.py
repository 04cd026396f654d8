# SPDX-License-Identifier: Apache-2.0
"""Training on interleaved samples: questions, thoughts with loss and drawn pictures in one sample, beside the other groups.

Runs of two ranks share a launch: each layout is one run after another on the same processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.core import parallel_state

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.training.observability.metrics_file import read_history
from tests.data.index_files import write_lines
from tests.data.interleaved_rows import picture
from tests.distributed import run_ranks
from tests.runs import execute, make_world, numbers, run, run_config
from tests.training.equal_runs import CP, PP, SP_TP2, Result, assert_equal, stored_tensors

pytestmark = pytest.mark.distributed
VAE = {"image_stride": 16, "max_image_size": 32, "min_image_size": 16}
VIT = {"image_stride": 14, "max_image_size": 42, "min_image_size": 28}
COLOURS = ("red", "blue", "green", "black")
STEPS = 4
SETTINGS = {"global_batch_size": 4, "total_steps": STEPS, "save_every": 2, "max_grad_norm": 0.5, "eps": 1e-6, "warmup_steps": 0}
#: Runs on two ranks: the flags of each start.
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "dp2-three-workers": [{"num_workers": 3}],
    "cp2": [{CP: 2}],
    "pp2": [{PP: 2}],
    "tp2-sp": [SP_TP2],
}


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


def mixed(world: Path, **flags: Any) -> dict[str, Any]:
    return {"dataset_config_file": str(world / "data/mixed.yaml"), "index_dir": str(world / "mixed"), **flags}


@pytest.mark.slow
def test_workers_change_no_number(world: Path, tmp_path: Path) -> None:
    """Three workers and none give the same numbers, bit for bit."""
    none, three = (
        run(run_config(world, tmp_path / name, **mixed(world, total_steps=STEPS, num_workers=workers)))
        for name, workers in (("none", 0), ("three", 3))
    )
    assert numbers(three) == numbers(none)


def launch(world: Path, results: Path, names: list[str]) -> None:
    """Run layouts one after another on this rank."""
    for name in names:
        for flags in LAYOUTS[name]:
            execute(run_config(world, results / name, 2, **mixed(world, **{**SETTINGS, **flags})))
            parallel_state.destroy_model_parallel()


def result(results: Path) -> Result:
    return numbers(read_history(results / "metrics.jsonl")), stored_tensors(results / f"checkpoints/{STEPS:07d}")


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["dp2-three-workers"], id="dp2"),
        pytest.param(list(LAYOUTS), marks=pytest.mark.slow, id="layouts"),
    ],
)
def test_layouts_equal_one_process(world: Path, tmp_path: Path, names: list[str]) -> None:
    history = run(run_config(world, tmp_path / "one", **mixed(world, **SETTINGS)))
    assert all(record["ce_tokens"] > 0 and record["mse_tokens"] > 0 for record in history)
    run_ranks(launch, 2, world, tmp_path, names, timeout=1500)
    expected = result(tmp_path / "one")
    for name in names:
        assert_equal(result(tmp_path / name), expected, STEPS)
