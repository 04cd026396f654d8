"""The inspector shows counts, a sample's words and its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_tools.inspect_index import main
from tests.data.golden_index import build_golden_index


def test_shows_an_index_and_a_sample(goldens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "index"
    build_golden_index(goldens, index)
    assert main([str(index)]) == 0
    told = capsys.readouterr().out
    assert "t2i_pretrain/t2i: 8 samples" in told and "image width: 8 values" in told and "skipped 1: no answer" in told
    pictures = tmp_path / "pictures"
    assert main([str(index), "--dataset", "vlm_sft/llava_ov", "--sample", "2", "--images", str(pictures)]) == 0
    told = capsys.readouterr().out
    assert "(learned), 4 tokens: 'the background is white'" in told and "image 0: 90 x 60" in told
    assert Image.open(pictures / "vlm_sft_llava_ov_2_1.png").size == (30, 50)
    for arguments, message in (["--sample", "1"], "needs --dataset"), (["--dataset", "x"], "not in the index"):
        assert main([str(index), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([str(index), "--dataset", "vlm_sft/llava_ov", "--sample", "99"]) == 2
