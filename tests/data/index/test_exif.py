# SPDX-License-Identifier: Apache-2.0
"""The EXIF orientation is a setting of the index: it decides sizes and pixels, and indexes of earlier versions keep theirs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.cli.data import build as command
from megatron_bagel.data.index import plan as planning
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import read_manifest
from megatron_bagel.data.index.plan import ImageChecks, PlanRules, earlier_build_keys, plan_index
from megatron_bagel.data.index.publish import build_folder, merge_jobs
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.index.verify import shard_problems
from megatron_bagel.data.planner.group_source import open_sources
from megatron_bagel.data.planner.sample_plan import PlanSettings
from megatron_bagel.data.tokenizer import load_tokenizer
from tests.data.index_files import files_of, groups_of, png, write_lines, write_t2i
from tests.strategies import SPEC

RED = '{"a": "red"}'
# Keys of earlier versions were made of these fields only.
EARLIER_UNIT = {"group", "path", "source", "first_row", "rows", "start", "stop", "image_dir", "frames"}


def phone(orientation: int | None = 6, kind: str = "JPEG") -> bytes:
    """A picture stored 64 x 32 with a red strip at the left, which orientation 6 shows as 32 x 64 with the strip on top."""
    image = Image.new("RGB", (64, 32), (30, 30, 200))
    image.paste((220, 20, 20), (0, 0, 16, 32))
    exif, buffer = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def build(goldens: Path, root: Path, name: str, **checks: str) -> IndexedSamples:
    build_index(groups_of(root, "t2i_pretrain"), goldens / "hf", root / name, BuildOptions(progress=False, checks=ImageChecks(**checks)))
    return IndexedSamples.open(root / name)


@pytest.mark.parametrize("depth", ["structure", "decode", "header"])
@pytest.mark.parametrize(("exif", "size", "corner"), [("turn", (32, 64), (220, 20, 20)), ("ignore", (64, 32), (30, 30, 200))])
def test_sizes_and_pixels_agree_with_the_setting(
    depth: str, exif: str, size: tuple[int, int], corner: tuple[int, int, int], goldens: Path, tmp_path: Path
) -> None:
    rows = [(phone(kind=kind), RED) for kind in ("JPEG", "PNG", "WEBP")]
    write_t2i(tmp_path / "t2i", rows)
    index = build(goldens, tmp_path, "index", exif=exif, depth=depth)
    reader = index.datasets["t2i_pretrain/t2i"]
    assert index.manifest.exif == exif == read_manifest(tmp_path / "index").exif
    for row in range(len(rows)):
        record, picture = reader.record(row), reader.picture(row, 0)
        assert (int(record.widths[0]), int(record.heights[0])) == size == picture.size
        assert np.abs(np.subtract(picture.getpixel((size[0] - 2, 1)), corner)).max() < 30  # right end of the upper edge
        assert reader.image_bytes(row, 0) == rows[row][0]
    dataset = index.manifest.datasets[0]
    assert list(shard_problems(tmp_path / "index", index.manifest, dataset, dataset.shards[0])) == []
    (source,) = open_sources(groups_of(tmp_path, "t2i_pretrain"), index, PlanSettings(0, SPEC))
    (image,) = [item for item in source.sample(0, 0).items if item.kind == "vae"]
    assert (image.width < image.height) == (exif == "turn")


def test_pictures_without_orientation_do_not_change(goldens: Path, tmp_path: Path) -> None:
    write_t2i(tmp_path / "t2i", [(phone(None), RED), (phone(1), RED), (png(3), RED)])
    turned, ignored = (build(goldens, tmp_path, exif, exif=exif).datasets["t2i_pretrain/t2i"] for exif in ("turn", "ignore"))
    for row in range(3):
        assert turned.picture(row, 0).tobytes() == ignored.picture(row, 0).tobytes()
    data = {
        exif: {name: sums for name, sums in files_of(tmp_path / exif).items() if name != "manifest.json"} for exif in ("turn", "ignore")
    }
    assert data["turn"] == data["ignore"]


def as_earlier(index: Path, goldens: Path, root: Path) -> None:
    """Make of an index with ``exif`` "ignore" the one that earlier versions made: without the field, and with their key."""
    content = json.loads((index / "manifest.json").read_text())
    assert content.pop("exif") == "ignore"
    (content["build_key"],) = earlier_build_keys(groups_of(root, "t2i_pretrain"), load_tokenizer(goldens / "hf"), PlanRules())
    (index / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


def test_an_index_of_an_earlier_version_stays_as_it_was(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It opens, reads its pictures as they are stored, and the same command leaves it alone and says so."""
    write_t2i(tmp_path / "t2i", [(phone(), RED)])
    build(goldens, tmp_path, "index", exif="ignore")
    as_earlier(tmp_path / "index", goldens, tmp_path)
    before = files_of(tmp_path / "index")
    (tmp_path / "t2i/._0000.parquet").write_bytes(b"\0\x05\x16\x07")  # which counted as a source then
    index = build(goldens, tmp_path, "index")
    assert files_of(tmp_path / "index") == before and index.manifest.exif == "ignore"
    assert index.datasets["t2i_pretrain/t2i"].picture(0, 0).size == (64, 32)
    (tmp_path / "data.yaml").write_text(json.dumps({"t2i_pretrain": {"dataset_names": ["t2i"], "weight": 1, "image_transform_args": {
        "image_stride": 16, "max_image_size": 48, "min_image_size": 32}}}))  # fmt: skip
    arguments = ["--dataset_config_file", str(tmp_path / "data.yaml"), "--data_root", str(tmp_path), "--tokenizer", str(goldens / "hf")]
    assert command.main([*arguments, "--output", str(tmp_path / "index")]) == 0
    assert "built by an earlier version, with --exif ignore; --overwrite builds it with --exif turn" in capsys.readouterr().out
    assert command.main([*arguments, "--output", str(tmp_path / "index"), "--overwrite"]) == 0
    assert read_manifest(tmp_path / "index").exif == "turn"


def test_the_key_of_earlier_versions_has_their_fields_only(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the rules of rows nor the orientation is in it, and every field that was, is."""
    write_t2i(tmp_path / "t2i", [(phone(), RED)])
    write_lines(tmp_path / "text/plain.jsonl", [{"text": "one"}])
    (tmp_path / "t2i/._0000.parquet").write_bytes(b"\0\x05\x16\x07")
    groups, tokenizer, contents = groups_of(tmp_path, "t2i_pretrain", "text"), load_tokenizer(goldens / "hf"), []
    keys_of = planning._keys
    monkeypatch.setattr(planning, "_keys", lambda *values: contents.append(values[2]) or keys_of(*values))
    keys = earlier_build_keys(groups, tokenizer, PlanRules())
    assert len(keys) == 2 and sorted(len(content[0]["sources"]) for content in contents) == [1, 2]
    earlier_contents = list(contents)
    assert keys == earlier_build_keys(groups, tokenizer, PlanRules(checks=ImageChecks(exif="ignore")))
    assert plan_index(groups, tokenizer, PlanRules()).build_key not in keys
    for dataset in (dataset for content in earlier_contents for dataset in content):
        assert set(dataset) == {"group", "name", "sources", "shards", "bad_files"}
        for shard in dataset["shards"]:
            assert set(shard) == {"group", "dataset", "name", "units", "checks"} and set(shard["checks"]) == {"depth", "max_pixels"}
            assert all(set(unit) == EARLIER_UNIT for unit in shard["units"])


def test_jobs_of_an_earlier_version_merge_with_the_old_value(goldens: Path, tmp_path: Path) -> None:
    write_t2i(tmp_path / "t2i", [(phone(), RED)])
    options = BuildOptions(progress=False, checks=ImageChecks(exif="ignore"), num_jobs=2)
    for job in range(2):
        job_options = BuildOptions(progress=False, checks=options.checks, num_jobs=2, job_index=job)
        build_index(groups_of(tmp_path, "t2i_pretrain"), goldens / "hf", tmp_path / "index", job_options)
    parts = [build_folder(tmp_path / "index", job, 2) for job in range(2)]
    for part in parts:
        plan = json.loads((part / "plan.json").read_text())
        assert plan.pop("exif") == "ignore"
        (part / "plan.json").write_text(json.dumps(plan))
    assert merge_jobs(tmp_path / "index", parts).exif == "ignore"
