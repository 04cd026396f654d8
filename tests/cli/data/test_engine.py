# SPDX-License-Identifier: Apache-2.0
"""``--engine`` of builds and latents: jobs by hand, the tasks of a Slurm array, a Ray cluster, and flags that do not fit each other."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_bagel.cli.data import build, latents
from megatron_bagel.cli.data.engine import Engine, add_engine_flags, chosen_engine
from megatron_bagel.platform.launch.ray_cluster import RayCluster

NAMES = ("ID", "MIN", "MAX", "COUNT")


def engine(flags: str, *slurm: int) -> Engine:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    parser.add_argument("--workers", type=int, default=0)
    variables = {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in zip(NAMES, slurm, strict=False)}
    return chosen_engine(parser.parse_args(flags.split()), variables)


def test_each_engine_has_its_jobs() -> None:
    assert engine("") == Engine(1, 0, None) and engine("", 3, 0, 7, 8) == Engine(1, 0, None)  # Slurm counts only when asked
    assert engine("--num-jobs 4 --job_index 2") == Engine(4, 2)
    assert engine("--engine slurm-array", 3, 0, 7, 8) == Engine(8, 3)
    assert engine("--engine slurm-array --num-jobs 8", 3) == Engine(8, 3) == engine("--engine slurm-array --num-jobs 8", 3, 3, 6, 2)
    assert engine("--engine ray --ray_address ray://head:10001 --workers 2") == Engine(cluster=RayCluster("ray://head:10001", 2))


@pytest.mark.parametrize(
    ("flags", "slurm", "message"),
    [
        ("--ray_address ray://a:1", (), "--ray_address ray://a:1 needs --engine ray"),
        ("--engine ray --num-jobs 2", (), "leave out --num-jobs and --job-index"),
        ("--engine ray --job-index 0", (), "leave out --num-jobs and --job-index"),
        ("--engine slurm-array --job-index 0", (0, 0, 1, 2), "leave out --job-index"),
        ("--engine slurm-array", (), "SLURM_ARRAY_TASK_ID is not set"),
        ("--engine slurm-array", (1,), "SLURM_ARRAY_TASK_MIN is not set"),
        ("--engine slurm-array", (3, 3, 6, 2), "the Slurm array has 2 tasks from 3 to 6; .* give --num-jobs"),
        ("--engine slurm-array", (1, 1, 2, 2), "number them from 0 to N - 1"),
    ],
)
def test_flags_that_do_not_fit_each_other(flags: str, slurm: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine(flags, *slurm)


def test_commands_refuse_flags_of_another_engine(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "data.yaml").write_text("text: {dataset_names: [a], weight: 1}")
    data = ["--dataset_config_file", str(tmp_path / "data.yaml"), "--output", str(tmp_path / "output")]
    assert build.main([*data, "--tokenizer", "x", "--ray_address", "ray://a:1"]) == 2
    assert "--ray_address ray://a:1 needs --engine ray" in capsys.readouterr().err
    assert latents.main(["index", "--vae", "x", *data, "--workers", "2"]) == 2
    assert "--workers needs --engine ray" in capsys.readouterr().err
