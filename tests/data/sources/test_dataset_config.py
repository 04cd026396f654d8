# SPDX-License-Identifier: Apache-2.0
"""The guide's YAML is read as written; whatever it cannot mean is refused with the key and the nearest known name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bagel.data.sources.dataset_config import EDIT, T2I, VLM, load_groups, parse_groups

GUIDE = {
    "t2i_pretrain": {
        "dataset_names": ["t2i"],
        "image_transform_args": {"image_stride": 16, "max_image_size": 1024, "min_image_size": 512},
        "is_mandatory": True,
        "num_used_data": [10],
        "weight": 1,
    },
    "unified_edit": {
        "dataset_names": ["seedxedit_multi"],
        "image_transform_args": {"image_stride": 16, "max_image_size": 1024, "min_image_size": 512},
        "vit_image_transform_args": {"image_stride": 14, "max_image_size": 518, "min_image_size": 224},
        "is_mandatory": False,
        "num_used_data": [10],
        "weight": 1,
    },
    "vlm_sft": {
        "dataset_names": ["llava_ov"],
        "image_transform_args": {"image_stride": 14, "max_image_size": 980, "min_image_size": 378, "max_pixels": 2_007_040},
        "frame_sampler_args": {"max_num_frames": 12, "min_num_frames": 8},
        "is_mandatory": True,
        "shuffle_lines": True,
        "shuffle_seed": 0,
        "num_used_data": [1000],
        "weight": 1,
    },
}


def parse(change: Any = None, root: Path | None = None) -> list:
    content = copy.deepcopy(GUIDE)
    if change is not None:
        change(content)
    return parse_groups(content, "x.yaml", Path("/base"), root)


def test_the_guides_config_is_read() -> None:
    t2i, edit, vlm = parse()
    assert (t2i.name, edit.name, vlm.name) == (T2I, EDIT, VLM)
    assert t2i.is_mandatory and t2i.weight == 1 and t2i.datasets[0].num_used_data == 10
    assert t2i.image_transform.max_pixels == 1_806_336 and vlm.image_transform.max_pixels == 2_007_040
    assert edit.vit_image_transform.image_stride == 14 and vlm.shuffle_lines


def test_places_from_yaml_and_from_the_data_root(tmp_path: Path) -> None:
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm/llava_ov_si.jsonl").touch()
    t2i, edit, vlm = parse(root=tmp_path)
    assert t2i.datasets[0].location.data_dir == str(tmp_path / "t2i")
    assert edit.datasets[0].location.data_dir == str(tmp_path / "editing/seedxedit_multi")
    assert vlm.datasets[0].location.jsonl_path == str(tmp_path / "vlm/llava_ov_si.jsonl")
    assert vlm.datasets[0].location.data_dir == str(tmp_path / "vlm/images")

    def give(content: dict) -> None:
        content["dataset_info"] = {"t2i_pretrain": {"t2i": {"data_dir": "/there", "num_files": 3, "num_total_samples": 9}}}
        content["vlm_sft"]["jsonl_path"] = ["a.jsonl"]

    t2i, _, vlm = parse(give)
    assert t2i.datasets[0].location.data_dir == "/there"
    assert vlm.datasets[0].location.jsonl_path == "/base/a.jsonl"


def set_key(group: str, key: str, value: Any) -> Any:
    return lambda content: content[group].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__setitem__("t2i_pretrian", c.pop("t2i_pretrain")), "did you mean 't2i_pretrain'"),
        (set_key("t2i_pretrain", "wieght", 1), "did you mean 'weight'"),
        (set_key("t2i_pretrain", "dataset_names", []), "dataset_names"),
        (set_key("t2i_pretrain", "dataset_names", ["a", "a"]), "twice"),
        (set_key("t2i_pretrain", "num_used_data", [1, 2]), "one entry per dataset name"),
        (set_key("t2i_pretrain", "num_used_data", [0]), "at least 1"),
        (set_key("t2i_pretrain", "weight", "much"), "weight must be a number"),
        (set_key("t2i_pretrain", "is_mandatory", "yes"), "true or false"),
        (set_key("t2i_pretrain", "resume_data_status", 0), "resume_data_status must be true or false"),
        (set_key("t2i_pretrain", "image_transform_args", None), "image_transform_args is missing"),
        (set_key("t2i_pretrain", "image_transform_args", {"image_stride": 16}), "max_image_size, min_image_size missing"),
        (
            set_key("t2i_pretrain", "image_transform_args", {"image_stride": 16, "max_image_size": 8, "min_image_size": 9}),
            "image_transform_args: min_image_size 9 is larger",
        ),
        (lambda c: c["unified_edit"].pop("vit_image_transform_args"), "vit_image_transform_args is missing"),
        (lambda c: c.__setitem__("dataset_info", {"t2i_pretrain": {"t2j": {}}}), "did you mean 't2i'"),
        (lambda c: [c[g].update(weight=0, is_mandatory=False) for g in list(c)], "no sample would ever be drawn"),
        (lambda c: c.clear(), "expected groups"),
    ],
)
def test_what_it_cannot_mean_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(change)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no dataset config"):
        load_groups(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_groups(tmp_path / "bad.yaml")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(GUIDE))
    assert len(load_groups(tmp_path / "good.yaml")) == 3


def test_the_guides_example_is_here_and_is_read() -> None:
    path = Path(__file__).resolve().parents[3] / "data/configs/example.yaml"
    assert [(group.name, len(group.datasets)) for group in load_groups(path)] == [("t2i_pretrain", 1), ("unified_edit", 1), ("vlm_sft", 1)]
