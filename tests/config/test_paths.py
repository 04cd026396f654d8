# SPDX-License-Identifier: Apache-2.0
"""Paths of settings: ``~`` and ``$VAR`` in a file, and records that mean the same from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_bagel.checkpoint.convert import companions_of
from megatron_bagel.config.parser import Config, parse_config, parse_with
from megatron_bagel.config.paths import PATHS, TYPED
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.config.sections import SETTINGS
from megatron_bagel.data.sources.dataset_config import load_groups


def test_every_setting_named_like_a_path_is_one() -> None:
    endings = ("_path", "_dir", "_file", "_root", "_cache")
    assert set(PATHS) <= set(SETTINGS)
    assert {name for name in SETTINGS if name.endswith(endings)} <= set(PATHS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    return tmp_path


def test_home_and_variables_of_a_file_and_of_flags(home: Path) -> None:
    (home / "run.yaml").write_text("results_dir: ~/first\ntraining: {checkpoint_dir: $RUNS/checkpoints}\ndata_root: s3://bucket/~x\n")
    config = parse_config(["--config", str(home / "run.yaml"), "--llm_path=~/llm", "--index_dir", "${RUNS}/index"])
    assert config.training.results_dir == f"{home}/home/first"
    assert config.training.checkpoint_dir == f"{home}/runs/checkpoints"
    assert config.model.llm_path == f"{home}/home/llm"
    assert config.data.index_dir == f"{home}/runs/index"
    assert config.data.data_root == "s3://bucket/~x"
    assert config.training.wandb_project == "bagel"


@pytest.mark.parametrize(
    ("path", "reason"),
    [("$NO_SUCH_PLACE/x", "no variable NO_SUCH_PLACE"), ("~nobody-of-this-name/x", "no home folder ~nobody-of-this-name")],
)
def test_what_cannot_be_expanded_is_refused_with_its_flag(home: Path, path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^--results_dir .*{reason}"):
        parse_config([f"--results_dir={path}"])


def test_home_and_variables_in_the_dataset_file(home: Path) -> None:
    transform = {"image_stride": 16, "max_image_size": 64, "min_image_size": 64}
    group = {"dataset_names": ["t2i", "more"], "weight": 1, "data_dir": ["~/t2i", "$RUNS/t2i"], "image_transform_args": transform}
    (home / "data.yaml").write_text(yaml.safe_dump({"t2i_pretrain": group}))
    (loaded,) = load_groups(home / "data.yaml")
    assert [entry.location.data_dir for entry in loaded.datasets] == [f"{home}/home/t2i", f"{home}/runs/t2i"]
    group["data_dir"][1] = "$NO_SUCH_PLACE/t2i"
    (home / "data.yaml").write_text(yaml.safe_dump({"t2i_pretrain": group}))
    with pytest.raises(ValueError, match="data_dir of more .*no variable NO_SUCH_PLACE"):
        load_groups(home / "data.yaml")


def test_a_record_means_the_same_from_any_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--llm_path", "parts/llm", "--vae_path", "parts/ae.safetensors", "--tokenizer_path", "/tok", "--results_dir", "out"]
    monkeypatch.chdir(home)
    config = parse_config(flags)
    record = config.to_record()
    assert record["model"]["llm_path"] == f"{home}/parts/llm" and record["model"]["tokenizer_path"] == "/tok"
    assert record[TYPED]["llm_path"] == "parts/llm" and "tokenizer_path" not in record[TYPED]
    assert config.model.llm_path == "parts/llm"
    monkeypatch.chdir("/")
    assert companions_of(record).autoencoder == home / "parts/ae.safetensors"
    (home / "config.yaml").write_text(yaml.safe_dump(record))
    again = parse_config(["--config", str(home / "config.yaml")])
    assert again.training.results_dir == f"{home}/out" and again.to_record()["model"] == record["model"]
    assert Config.from_dict(record).value_of("vae_path") == f"{home}/parts/ae.safetensors"


def test_home_and_variables_of_a_plan_and_of_the_file_itself(home: Path) -> None:
    (home / "home").mkdir()
    (home / "home/run.yaml").write_text("results_dir: ~/first\n")
    config, options = parse_with(PlanArguments, ["--config=~/run.yaml", "--png=$RUNS/x.png", "--model=~/hf"])
    assert config.training.results_dir == f"{home}/home/first"
    assert (options.png, options.model) == (f"{home}/runs/x.png", f"{home}/home/hf")
    with pytest.raises(ValueError, match=r"^--config \$NO_SUCH_PLACE/run.yaml: .*no variable NO_SUCH_PLACE"):
        parse_config(["--config=$NO_SUCH_PLACE/run.yaml"])
