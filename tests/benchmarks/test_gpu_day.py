# SPDX-License-Identifier: Apache-2.0
"""A GPU's day at tiny size: records as it goes, limits, resuming, and the page made from the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_day.__main__ import main
from benchmarks.gpu_day.page import main as make_page
from benchmarks.gpu_day.parts import PARTS, TINY, Part
from benchmarks.gpu_day.runner import Day
from benchmarks.kernels import idle_share
from benchmarks.record import read_record


def run_tiny(results: Path, *words: str) -> int:
    return main(["--tiny", "--results", str(results), *words])


@pytest.mark.slow
def test_a_part_leaves_a_record_and_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tiny(tmp_path, "--only", "step", "autoencoder") == 0
    records = {path.stem.rpartition("-")[2]: read_record(path) for path in tmp_path.glob("gpu_day-*.json")}
    assert set(records) == {"step", "autoencoder"} and all(record.figures["state"] == "done" for record in records.values())
    step = records["step"].figures
    assert step["variants"]["plain"]["step_s"] > 0 and step["variants"]["plain"]["profile"]["longest"]
    assert "refused" in step["variants"]["transformer_engine"] and "plain, at the end" in step["variants"]
    losses = {name: one["first_loss"] for name, one in step["variants"].items() if "refused" not in one}
    assert {"sdpa", "chunked_ce", "constant_encoder", "recompute", "vae_channels_last", "stored_latents"} <= set(losses)
    for name, loss in losses.items():
        # Only the autoencoder under bf16 may change more than rounding.
        assert loss == pytest.approx(losses["plain"], rel=2e-2 if name in ("vae_bf16", "vae_channels_last", "vae_compiled") else 1e-5), name
    capsys.readouterr()
    assert run_tiny(tmp_path, "--only", "step", "autoencoder") == 0
    assert capsys.readouterr().out.count("done before") == 4

    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- gpu_day -->\nold\n<!-- /gpu_day -->\n\nthe end\n")
    assert make_page(["--results", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith("<!-- /gpu_day -->\n\nthe end\n") and "old" not in text
    assert "| constant_encoder |" in text and "| channels_last, batched |" in text and "refused:" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="page.md has no lines <!-- gpu_day -->"):
        make_page(["--results", str(tmp_path), "--into", str(page)])


def test_a_part_is_stopped_at_its_limit_and_tried_again(tmp_path: Path) -> None:
    day = Day(tmp_path, 60)
    slow = Part("slow", 1, ("-c", "import time; print('began', flush=True); time.sleep(60)"), records=False)
    assert day.run(slow) == "stopped"
    figures = read_record(day.path(slow)).figures
    assert figures["state"] == "stopped" and figures["exit_status"] is None and "began" in figures["printed"]
    assert day.run(Part("slow", 30, ("-c", "print('quick')"), records=False)) == "done"
    assert day.run(Part("wrong", 30, ("-c", "raise SystemExit(3)"), records=False)) == "failed"
    assert Day(tmp_path, 0).run(Part("late", 30, ("-c", "pass"), records=False)) == "no time"


def test_every_part_is_listed_with_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(part.name in printed for part in PARTS)
    # Whatever needs no GPU has a tiny size.
    assert {part.name for part in PARTS} - {part.name for part in TINY} == {
        "goldens-flex", "tests-training", "tests-attention", "tests-kernels", "tests-te", "tests-generation", "tests-offload",
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main(["--only", "steps"])


def test_idle_time_is_what_no_kernel_covers() -> None:
    assert idle_share([(0, 4), (2, 5), (8, 10)]) == pytest.approx(0.3)
    assert idle_share([(0, 10), (2, 3)]) == 0 and idle_share([]) == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_tiny_part_runs(tmp_path: Path) -> None:
    assert run_tiny(tmp_path) == 0
