# SPDX-License-Identifier: Apache-2.0
"""A GPU's day at tiny size: records as it goes, limits, resuming, and the page made from the records."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks.gpu_day.__main__ import main
from benchmarks.gpu_day.page import main as make_page
from benchmarks.gpu_day.page import page
from benchmarks.gpu_day.parts import PARTS, TINY, Part
from benchmarks.gpu_day.runner import Day
from benchmarks.kernels import device_events, idle_share
from benchmarks.record import ROOT, read_record, write_record
from benchmarks.step_variants import earlier_figures, labels
from tests.waiting import eventually


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
    assert all(one["profile"]["calls"] > 0 for one in step["variants"].values() if "refused" not in one)
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
    assert Day(tmp_path, 60).run(Part("long", 300, ("-c", "pass"), records=False)) == "no time"
    assert Day(tmp_path, 60).run(Part("other", 1, ("-c", "pass"), records=False, needs="no_such_package")) == "left out"


def test_a_part_may_leave_a_process_behind(tmp_path: Path) -> None:
    """It holds what the part prints to open, and is ended with it."""
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']).pid); sys.exit(4)"
    day = Day(tmp_path, 250)
    part = Part("leaves", 240, ("-c", code), records=False)
    assert day.run(part) == "failed"
    left = int(read_record(day.path(part)).figures["printed"])
    eventually(lambda: not _runs(left))


def _runs(process: int) -> bool:
    """Whether it computes still; a process that nobody has waited for does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_day_that_is_ended_ends_its_part_and_leaves_its_record(tmp_path: Path) -> None:
    began = tmp_path / "began"
    part = f"import os, pathlib, time; pathlib.Path({str(began)!r}).write_text(str(os.getpid())); time.sleep(300)"
    day = (
        "import benchmarks.gpu_day.__main__ as day; from benchmarks.gpu_day.parts import Part\n"
        f"day.PARTS = (Part('slow', 100, ('-c', {part!r}), records=False),)\n"
        f"day.main(['--results', {str(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", day], cwd=ROOT)
    eventually(lambda: began.exists() and began.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    eventually(lambda: not _runs(int(began.read_text())))
    (record,) = tmp_path.glob("gpu_day-*-slow.json")
    assert read_record(record).figures["state"] == "stopped"


def test_what_a_stopped_part_wrote_is_kept_and_continued(tmp_path: Path) -> None:
    """A command that resumes is told so only where something was left of an earlier start."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from pathlib import Path; from benchmarks.record import write_record\n"
        "write_record(Path(sys.argv[sys.argv.index('--output') + 1]), {'seconds': {'mine': 1}, 'words': sys.argv[1:]})\n"
        "sys.exit('--resume' not in sys.argv)"
    )
    part = Part("grows", 30, (str(program), "--x"), resumes=True)
    day = Day(tmp_path, 100)
    assert [day.run(part), day.run(part), day.run(part)] == ["failed", "done", "done before"]
    record = read_record(day.path(part))
    assert record.figures["seconds"] == {"mine": 1} and record.figures["part_seconds"] > 0 and "--resume" in record.figures["words"]
    assert "--resume" not in record.command and "--output" not in record.command
    assert Day(tmp_path, 100, again=True).run(part) == "failed"


def test_the_page_of_a_day_that_was_cut_short(tmp_path: Path) -> None:
    """Figures of unusual forms, parts that stopped midway, and reasons that would break a table."""
    day = Day(tmp_path, 100)
    figures = {
        "optimizer": {"seconds": {"plain": 1.0}, "part_seconds": 3.2, "state": "done"},
        "step": {"variants": {"magi": {"refused": "ImportError: one\ntwo | three"}}, "part_seconds": 9.0, "state": "stopped"},
        "generation": {"context_tokens": 9, "text_cached": {"tokens_per_s": 7.0}, "part_seconds": 9.0, "state": "stopped"},
    }
    for name, content in figures.items():
        write_record(day.path(Part(name, 1, ())), content, f"python -m {name}")
    text = page(tmp_path)
    assert "| done | 3 |" in text and "one two \\| three" in text and "| with the cache | 7.0 |  |" in text


def test_variants_of_a_step_go_on_where_they_stopped(tmp_path: Path) -> None:
    """What is measured is left out, and what the program ended in comes last."""
    wanted = ["plain", "sdpa", "magi"]
    assert labels(wanted, {}) == ["plain", "sdpa", "magi", "plain, at the end"]
    assert labels(wanted, {"variants": {"plain": {}}, "measuring": "sdpa"}) == ["magi", "plain, at the end", "sdpa"]
    assert labels(["sdpa"], {"variants": {"sdpa": {}}}) == []
    write_record(tmp_path / "record.json", {"config": "bench-tiny", "device": "cpu", "variants": {"plain": {}}})
    assert earlier_figures(tmp_path / "record.json", {"config": "bench-tiny", "tokens": 3})["variants"] == {"plain": {}}
    assert earlier_figures(tmp_path / "none.json", {"config": "bench-tiny"}) == {}
    with pytest.raises(ValueError, match="record.json was measured with another device"):
        earlier_figures(tmp_path / "record.json", {"config": "bench-tiny", "device": "NVIDIA H200"})


def test_every_part_is_listed_with_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(part.name in printed for part in PARTS)
    # Whatever needs no GPU has a tiny size.
    assert {part.name for part in PARTS} - {part.name for part in TINY} == {
        "goldens-flex", *(part.name for part in PARTS if part.name.startswith("tests-")),
    }  # fmt: skip
    # Every file of tests/gpu has its part.
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/gpu/test_*.py")}
    assert files == {part.command[-1] for part in PARTS if part.name.startswith("tests-")}
    with pytest.raises(SystemExit):
        main(["--only", "steps"])


def test_idle_time_is_what_no_kernel_covers() -> None:
    """Annotations lie on the device too, around kernels and the gaps between them."""
    kernel, note = (SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=note) for note in (False, True))
    assert device_events([kernel, note, SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False)]) == [kernel]
    assert idle_share([(0, 4), (2, 5), (8, 10)]) == pytest.approx(0.3)
    assert idle_share([(0, 10), (2, 3)]) == 0 and idle_share([]) == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_tiny_part_runs(tmp_path: Path) -> None:
    assert run_tiny(tmp_path) == 0
