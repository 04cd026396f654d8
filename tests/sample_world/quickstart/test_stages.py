# SPDX-License-Identifier: Apache-2.0
"""A lesson draws from its own groups of the data and from no others; both lessons train the same model."""

from __future__ import annotations

from pathlib import Path

from megatron_bagel.cli.data import sample
from megatron_bagel.common.yaml_files import read_yaml
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.sample_world.assets import PICTURES_CONFIG, QUESTIONS_CONFIG
from megatron_bagel.sample_world.folders import write_yaml
from megatron_bagel.sample_world.quickstart.stages import lesson


def test_a_lesson_draws_from_its_groups(tmp_path: Path) -> None:
    sample.main([str(tmp_path / "data"), "--t2i", "1", "--edit", "1", "--vlm", "1"])
    dataset = read_yaml(tmp_path / "data/dataset.yaml", "test")
    write_yaml(lesson(dataset, {"t2i_pretrain": {0: 0.05, 400: 2.0}, "unified_edit": 1.0}), tmp_path / "pictures.yaml", "pictures")
    groups = load_groups(tmp_path / "pictures.yaml")
    assert [(group.name, group.points, group.is_mandatory) for group in groups] == [
        ("t2i_pretrain", ((0, 0.05), (400, 2.0)), False),
        ("unified_edit", ((0, 1.0),), False),
    ]
    assert [entry.name for group in groups for entry in group.datasets] == ["t2i", "seedxedit_multi"]
    assert dataset["t2i_pretrain"]["is_mandatory"], "the data's own config stays as it is"


def test_both_lessons_train_the_same_model() -> None:
    questions, pictures = (read_yaml(path, "test") for path in (QUESTIONS_CONFIG, PICTURES_CONFIG))
    for name in ("layer_module", "interpolate_pos", "max_latent_size", "vit_max_num_patch_per_side"):
        assert questions[name] == pictures[name], name
