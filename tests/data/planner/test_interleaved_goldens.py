# SPDX-License-Identifier: Apache-2.0
"""Recorded batches of the original as rows of the group ``interleaved``: equal fields, and with them equal losses and gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings
from megatron_bagel.data.planner.sample_plan import ConditionDropout
from megatron_bagel.data.sources.dataset_config import T2I, VLM
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.layout.pack import Pack, build_pack
from tests.data.golden_index import CONFIG, golden_row
from tests.data.interleaved_rows import index_rows, interleaved_group, picture
from tests.layout.golden_fields import GOLDEN_SPEC, assert_equal_to_golden
from tools.golden_batch import batch_case
from tools.golden_cases import TrainCases
from tools.golden_common import Comparison
from tools.golden_model import GoldenModel

FIELDS = (
    "split_lens", "split_modes", "text_ids", "text_positions", "position_ids", "vae_positions", "latent_shapes", "latent_position_ids",
    "vit_positions", "vit_position_ids", "vit_shapes", "ce_positions", "labels", "mse_positions",
)  # fmt: skip
SETTINGS = PlanSettings(0, GOLDEN_SPEC, ConditionDropout(0.0, 0.0, 0.0))


def samples(index: IndexedSamples, group: Any, rows: list[int]) -> Pack:
    source = GroupSource(group, [index.reader(group, group.datasets[0])], SETTINGS)
    return build_pack([source.sample(row, 0) for row in rows], GOLDEN_SPEC)


def hand_made(goldens: Path, root: Path) -> Pack:
    """The two samples of ``packed_interleave.json``: a text loss after a clean picture, ends that predict, and two clips."""
    recorded = [(64, 70, 75), (259, 316, 405, 11), (71, 72), (80, 81), (90, 91, 92), (93,)]
    words = {ids: "1" * len(ids) for ids in recorded}  # as many tokens; the recorded ids take their place below
    (root / "images").mkdir(parents=True)
    for name, size in {"first.png": (72, 48), "second.png": (48, 48), "frame.png": (32, 32)}.items():
        (root / "images" / name).write_bytes(picture(*size))
    first = [
        {"text": words[64, 70, 75]},
        {"image": "first.png", "next_token": "<|im_start|>"},
        {"text": words[259, 316, 405, 11], "loss": True, "next_token": "<|vision_start|>"},
        {"image": "second.png", "loss": True, "condition": [], "next_token": "<|im_start|>"},
        {"text": words[71, 72], "loss": True},
    ]
    second = [
        {"text": words[80, 81]},
        {"image": ["frame.png"] * 3, "frame_delta": 2, "loss": True, "condition": []},
        {"text": words[90, 91, 92], "loss": True},
        {"image": ["frame.png"] * 2, "frame_delta": 3},
        {"text": words[93,], "loss": True},
    ]
    index = index_rows(root, goldens, [{"items": first}, {"items": second}])
    group = interleaved_group(root)
    source = GroupSource(group, [index.reader(group, group.datasets[0])], SETTINGS)
    ids = iter(recorded)
    plans = []
    for sample in (source.sample(row, 0) for row in range(2)):
        items = [replace(item, ids=np.array(next(ids))) if item.kind == "text" else item for item in sample.items]
        plans.append(replace(sample, items=tuple(items)))
    return build_pack(plans, GOLDEN_SPEC)


def conversations(goldens: Path, root: Path) -> Pack:
    """The guide's conversations, read as they are by the form ``conversations``."""
    golden = json.loads((goldens / "batches/vlm_only.json").read_text())
    raw = goldens / "raw_data/vlm"
    keys = {"jsonl_path": [str(raw / "llava_ov_si.jsonl")], "data_dir": [str(raw / "images")], "format": "conversations"}
    vit = CONFIG["vlm_sft"]["image_transform_args"]
    group = interleaved_group(root, image_transform_args=None, vit_image_transform_args=vit, share_max_pixels=True, **keys)
    build_index([group], goldens / "hf", root / "index", BuildOptions(progress=False))
    index = IndexedSamples.open(root / "index")
    reader = index.reader(group, group.datasets[0])
    units = json.loads((goldens / "data/dataset_yields.json").read_text())[VLM]["shuffled_units"]
    lines = [golden_row(VLM, place["data_indexes"], units)[1] for place in golden["batch_data_indexes"]]
    return samples(index, group, [next(row for row in range(len(reader)) if reader.source(row)[1] == line) for line in lines])


def captions(goldens: Path, root: Path) -> Pack:
    """Captions and pictures of the guide's parquet files as two items; the caption is the recorded one of the alternatives."""
    golden = json.loads((goldens / "batches/t2i_only.json").read_text())
    units = json.loads((goldens / "data/dataset_yields.json").read_text())[T2I]["shuffled_units"]
    from safetensors.numpy import load_file

    tokens = load_file(goldens / "batches/t2i_only.safetensors")
    tokenizer, rows, start = load_tokenizer(goldens / "hf"), [], 0
    (root / "images").mkdir(parents=True)
    words = dict(zip(tokens["packed_text_indexes"].tolist(), tokens["packed_text_ids"].tolist(), strict=True))
    for number, (place, length) in enumerate(zip(golden["batch_data_indexes"], golden["sample_lens"], strict=False)):
        file, row = golden_row(T2I, place["data_indexes"], units)
        raw = pq.read_table(next((goldens / "raw_data/t2i").rglob(Path(file).name))).slice(row, 1).to_pylist()[0]
        (root / "images" / f"{number}.png").write_bytes(raw["image"])
        recorded = [words[i] for i in range(start, start + length) if i in words]
        alternatives = list(json.loads(raw["captions"]).values()) or [" "]
        caption = next(text for text in alternatives if tokenizer.encode(text) == recorded[1:-3])
        rows.append({"items": [{"text": caption, "droppable": True}, {"image": f"{number}.png", "loss": True}]})
        start += length
    return samples(index_rows(root, goldens, rows), interleaved_group(root), list(range(len(rows))))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize(("name", "read"), [("interleave", hand_made), ("vlm_only", conversations), ("t2i_only", captions)])
def test_batch_of_interleaved_rows_equals_the_original(goldens: Path, tmp_path: Path, name: str, read: Any) -> None:
    pack = read(goldens, tmp_path)
    cases = TrainCases(goldens, GoldenModel(goldens))
    recorded = cases.batch(name)
    for field in FIELDS:
        assert getattr(pack, field).tolist() == getattr(recorded.pack, field).tolist(), field
    np.testing.assert_allclose(pack.ce_weights, recorded.pack.ce_weights, rtol=1e-6)
    if name == "interleave":
        assert_equal_to_golden(pack, json.loads((goldens / "data/packed_interleave.json").read_text()))
    ours = replace(recorded, loaded=replace(recorded.loaded, pack=pack))
    cases.batch = lambda _: ours
    check = Comparison(name)
    batch_case(cases, check, name, cases.expected[name])
    assert check.result().ok, check.result().line()
