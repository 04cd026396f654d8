# SPDX-License-Identifier: Apache-2.0
"""The command builds an index from the guide's layout, says what it left out, and answers bad input with one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_bagel.cli.data.build import main
from megatron_bagel.data.index.reader import IndexedSamples
from tests.data.golden_index import CONFIG

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def arguments(goldens: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    return [
        "--dataset-config-file", str(config), "--data_root", str(goldens / "raw_data"), "--tokenizer", str(goldens / "hf"),
        "--output", str(tmp_path / "index"),
    ]  # fmt: skip


def test_builds_and_says_what_it_left_out(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "t2i_pretrain/t2i: 8 samples" in told and "vlm_sft/llava_ov: 4 samples" in told
    assert "skipped 1: no answer" in told and "skipped.jsonl" in told
    assert sum(len(reader) for reader in IndexedSamples.open(tmp_path / "index").datasets.values()) == 18


@pytest.mark.timeout(900)
def test_runs_as_a_script_with_workers(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data_tools/build_index.py"), *arguments, "--workers", "2", "--rows-per-shard", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index/vlm_sft/llava_ov/00002.bin").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t2i_pretrian": CONFIG["t2i_pretrain"]}, "did you mean 't2i_pretrain'"),
        ({"vlm_sft": {**CONFIG["vlm_sft"], "dataset_names": ["absent"]}}, "no file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], change: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(change))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "index").exists()


def test_the_summary_names_shards_and_tokens(arguments: list[str], tmp_path: Path) -> None:
    main(arguments)
    manifest = json.loads((tmp_path / "index/manifest.json").read_text())
    shard = manifest["datasets"][0]["shards"][0]
    assert (shard["samples"], shard["texts"], shard["images"], shard["tokens"]) == (8, 10, 8, 79)
    assert manifest["vocabulary_size"] == 424
