# SPDX-License-Identifier: Apache-2.0
"""The shares that ``data stats`` predicts are those of the packs that the run plans, by its weights and their schedule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_bagel.cli.data.stats import main
from megatron_bagel.config.parser import Config
from tests.data.golden_index import CONFIG, build_golden_index


def table(told: str) -> dict[str, list[str]]:
    """Dataset -> its columns: samples, images, tokens, CE tokens, MSE tokens."""
    return {line.split()[0]: line.split()[1:] for line in told.splitlines() if re.match(r"(\w+/\w+|all) ", line)}


def test_shares_of_both_losses(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_golden_index(goldens, tmp_path / "index")
    content = {
        **CONFIG,
        "vlm_sft": {**CONFIG["vlm_sft"], "weight": {0: 1, 10: 0}},
        "t2i_pretrain": {**CONFIG["t2i_pretrain"], "is_mandatory": False},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    values = {
        "dataset_config_file": str(tmp_path / "data.yaml"), "finetune_from_hf": True, "model_path": str(goldens / "hf"),
        "max_num_tokens": 400, "expected_num_tokens": 300, "max_num_tokens_per_sample": 200, "max_latent_size": 16,
        "vit_max_num_patch_per_side": 16, "global_batch_size": 2,
    }  # fmt: skip
    Config.from_values(values).save(tmp_path / "config.yaml")
    command = [str(tmp_path / "index"), "--config", str(tmp_path / "config.yaml"), "--packs", "16"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "t2i_pretrain/t2i: 8 samples, 8 pictures" in told
    shares = table(told)
    assert shares["vlm_sft/llava_ov"][3] == "100.0%" and shares["t2i_pretrain/t2i"][3] == "0.0%"  # only conversations have CE
    assert shares["vlm_sft/llava_ov"][4] == "0.0%" and float(shares["unified_edit/seedxedit_multi"][4].rstrip("%")) > 20
    assert main([*command, "--step", "40"]) == 0
    assert table(capsys.readouterr().out)["vlm_sft/llava_ov"][0] == "0.0%"  # the schedule has ended the conversations
    assert main([str(tmp_path / "index")]) == 0 and "shares" not in capsys.readouterr().out
    assert main([*command, "--step", "-1"]) == 2
