# SPDX-License-Identifier: Apache-2.0
"""The samples of docs/data.md, pasted: rows, YAML and the Python that writes parquet and tar files make the items that they should."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.planner.planned_item import KeyedDraws
from megatron_bagel.data.planner.sample_plan import choose_items
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.data.sources.forms import FORMS
from tests.data.interleaved_rows import picture

PAGE = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text(encoding="utf-8")
T2I, DRAWN, SEEN, ANSWER = "text noised", "text* noised clean vit", "clean vit", "text*"
#: Sample of the page -> the items of each of its rows; a star marks a text with loss.
ITEMS = {
    "Interleaved samples": [f"text {SEEN} text {DRAWN} {ANSWER}"],
    "thinkmorph": [f"{SEEN} text {DRAWN} {ANSWER}"] * 2,
    "trace": [f"text {DRAWN} {DRAWN} {ANSWER} {ANSWER}"],
    "marked_trace": [f"text {SEEN} {DRAWN} {ANSWER} {ANSWER}"],
    "references": [f"{SEEN} {SEEN} text noised"],
    "think_then_draw": ["text text* noised"],
    "conversations": [f"text {SEEN} text noised {SEEN} text* text noised", "text vit text text*"],
    "t2i_jsonl": [T2I, T2I],
    "edit_jsonl": [f"{SEEN} text noised", None],
    "t2i_datasets": [T2I],
    "interleaved_datasets": [T2I],
    "webdataset": [T2I, T2I],
    "webdataset_interleaved": [f"{SEEN} text noised"],
}


def block(section: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return found[1] if found else ""


def section_of(name: str) -> str:
    return re.search(rf"^#+ {name}\n(.*?)(?=^#+ \w)", PAGE, re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]


def test_every_form_has_a_sample() -> None:
    assert set(FORMS) - {"items"} <= set(ITEMS)
    headings = set(re.findall(r"^#### (\S+)$", PAGE, re.MULTILINE))
    assert headings == set(ITEMS) - {"Interleaved samples"}


@pytest.mark.parametrize("name", ITEMS)
def test_a_pasted_sample_is_read(goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name.startswith("webdataset"):
        pytest.importorskip("webdataset")
    section = section_of(name)
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for file in set(re.findall(r"\w+\.png", section)) | {"cat.png", "hat.png"}:
        Path("images", file).write_bytes(picture(40, 40))
    rows = block(section, "json")
    if rows:
        lines = [json.dumps(json.loads(rows))] if name == "Interleaved samples" else rows.splitlines()
        Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    exec(block(section, "python"), {})
    Path("data.yaml").write_text(yaml.safe_dump(yaml.safe_load(block(section, "yaml"))), encoding="utf-8")
    (group,) = load_groups("data.yaml")
    build_index([group], goldens / "hf", tmp_path / "index", BuildOptions(progress=False))
    reader = IndexedSamples.open(tmp_path / "index").reader(group, group.datasets[0])
    assert [json.loads(line) for line in (tmp_path / "index/skipped.jsonl").read_text().splitlines()] == []
    assert len(reader) == len(ITEMS[name])
    for row, expected in enumerate(ITEMS[name]):
        items = choose_items(reader.record(row), KeyedDraws(0, reader.name, row, 0))
        words = [
            ("text*" if i.loss else "text") if i.kind == "text" else "noised" if i.loss else "clean" if i.kind == "vae" else "vit"
            for i in items
        ]
        assert expected is None or " ".join(words) == expected
