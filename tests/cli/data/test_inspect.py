# SPDX-License-Identifier: Apache-2.0
"""The inspector shows counts and histograms, a sample's words and pictures, and a run's packs, as text, PNG and one HTML file."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_bagel.cli.data.inspect import main
from megatron_bagel.config.parser import Config
from megatron_bagel.data.inspect.describe import Histogram
from megatron_bagel.data.inspect.figures import token_strips
from megatron_bagel.layout.pack import build_pack
from tests import strategies
from tests.data.golden_index import CONFIG, build_golden_index
from tests.data.interleaved_rows import index_rows, picture

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def index(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "index"
    build_golden_index(goldens, folder)
    return folder


def test_shows_an_index_and_a_sample(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(index)]) == 0
    told = capsys.readouterr().out
    assert "t2i_pretrain/t2i: 8 samples" in told and "image width: 8 values" in told and "skipped 1: no answer" in told
    assert "schema 1" in told and "text_tokens (list<" in told and re.search(r"32 to 63 +#+ +\d", told)
    pictures = tmp_path / "pictures"
    assert main([str(index), "--dataset", "vlm_sft/llava_ov", "--sample", "2", "--images", str(pictures)]) == 0
    told = capsys.readouterr().out
    assert "(learned), 4 tokens: 'the background is white'" in told and "image 0: 90 x 60" in told
    assert Image.open(pictures / "vlm_sft_llava_ov_2_1.png").size == (30, 50)


def test_a_pack_of_a_run_in_words_and_in_one_html_file(
    index: Path, goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(CONFIG))
    values = {
        "dataset_config_file": str(tmp_path / "data.yaml"), "finetune_from_hf": True, "model_path": str(goldens / "hf"),
        "max_num_tokens": 400, "expected_num_tokens": 300, "max_num_tokens_per_sample": 200, "max_latent_size": 16,
        "vit_max_num_patch_per_side": 16, "global_batch_size": 2,
    }  # fmt: skip
    Config.from_values(values).save(tmp_path / "config.yaml")
    page, picture = tmp_path / "look.html", tmp_path / "pack.png"
    pack = ["--config", str(tmp_path / "config.yaml"), "--pack", "1", "--html", str(page), "--png", str(picture)]
    assert main([str(index), "--dataset", "t2i_pretrain/t2i", "--sample", "1", *pack]) == 0
    told = capsys.readouterr().out
    assert re.search(r"pack 1: \d+ of 400 tokens", told) and "t2i_pretrain/t2i row" in told and "generation expert" in told
    assert Image.open(picture).format == "PNG"
    text = page.read_text()
    drawn = re.findall(r"data:image/png;base64,([^']+)'", text)
    assert len(drawn) == 2 and all(Image.open(io.BytesIO(base64.b64decode(data))).size[0] > 400 for data in drawn)
    assert "pack 1:" in text and "src='http" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "1"], "needs --dataset"),
        (["--dataset", "x"], "not in the index"),
        (["--dataset", "vlm_sft/llava_ov", "--sample", "99"], "has samples 0 to 3"),
        (["--pack", "0"], "needs --config"),
        (["--pack", "-1", "--config", "x"], "count from 0"),
    ],
)
def test_bad_questions_are_one_line(index: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(index), *arguments]) == 2
    assert message in capsys.readouterr().err


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), max_size=4))
def test_histograms_count_every_value_once(parts: list[list[int]]) -> None:
    histogram = Histogram.of(np.array(part, dtype=np.int32) for part in parts)
    values = [value for part in parts for value in part]
    assert (histogram.values, histogram.total, histogram.largest) == (len(values), sum(values), max(values, default=0))
    assert all(count == sum(low <= value <= high for value in values) for low, high, count in histogram.bins())


@given(strategies.samples())
def test_a_packs_picture_has_a_value_for_every_token(samples: list) -> None:
    pack = build_pack(samples, strategies.SPEC)
    for title, values, _, colours in token_strips(pack):
        assert len(values) == pack.sequence_length and set(values.tolist()) <= set(range(len(colours))), title


@pytest.mark.slow
def test_the_short_name_hides_no_module_of_python(index: Path) -> None:
    told = subprocess.run([sys.executable, "-m", "data_tools.inspect", str(index)], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "t2i_pretrain/t2i: 8 samples" in told.stdout
    beside = "import sys; sys.path.insert(0, 'data_tools'); import inspect; inspect.signature(print)"
    assert subprocess.run([sys.executable, "-c", beside], cwd=ROOT).returncode == 0


def test_an_interleaved_sample_item_by_item(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Roles, losses, conditions, dropout, alternatives, clips and ends of every item, and the pictures of the sample."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(picture(40, 30))
    items = [
        {"text": ["one", "two"], "role": "user", "droppable": 0.25},
        {"image": "a.png", "droppable": {"vit": True}},
        {"image": "a.png", "role": "assistant", "next_token": "<|im_start|>"},
        {"image": ["a.png", "a.png"], "frame_delta": 2},
        {"text": "done", "role": "assistant"},
    ]
    index_rows(tmp_path, goldens, [{"items": items}])
    page = tmp_path / "look.html"
    assert main([str(tmp_path / "index"), "--dataset", "interleaved/rows", "--sample", "0", "--html", str(page)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+ tokens", "n tokens", line.strip()) for line in told[1:]] == [
        "item 0 (user, droppable with 0.25), n tokens: 'one'",
        "or n tokens: 'two'",
        "item 1 (condition vae and vit, vit droppable), image 0: 40 x 30",
        "item 2 (assistant, drawn, condition vae and vit, then <|im_start|>), image 1: 40 x 30",
        "item 3 (condition vae), image 2: 40 x 30",
        "then image 3: 40 x 30",
        "item 4 (assistant, learned), n tokens: 'done'",
    ]
    assert "item 4 (assistant, learned)" in page.read_text()


@pytest.mark.parametrize("flag", ["--images", "--png", "--html"])
def test_targets_that_cannot_be_written_are_refused_before_the_index_is_read(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-index", flag, "/sys/megatron_bagel"]) == 2
    error = capsys.readouterr().err
    assert f"{flag} /sys/megatron_bagel" in error and "cannot be written" in error and "no-such-index" not in error
