# SPDX-License-Identifier: Apache-2.0
"""A folder that cannot be written is found out before any work, and every command names its flag."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_bagel.cli import evaluate, quickstart
from megatron_bagel.cli.convert import adapter, hf_to_megatron, init_from_pretrained, megatron_to_hf, upcycle
from megatron_bagel.cli.data import build, inspect, latents, merge, sample, tokenizer
from megatron_bagel.common.writable import check_writable, check_writable_file, writing_to

#: A file system that takes no new file from anybody, the superuser included.
CLOSED = Path("/sys")
OUT = str(CLOSED / "megatron_bagel/out")


def test_a_writable_folder_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path, "--output")
    check_writable(tmp_path / "not/made/yet", "--output")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_while_it_looks_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Path]] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(list(tmp_path.iterdir())))
    check_writable(tmp_path, "--output")
    assert seen == [[]], "the written file has no name"


def test_a_closed_folder_and_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--results_dir {OUT} cannot be written \(.+, found in {CLOSED}\); choose another folder"):
        check_writable(OUT, "--results_dir")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output .*file/out cannot be written: .*file is not a folder"):
        check_writable(tmp_path / "file/out", "--output")


def test_a_file_is_checked_and_left_as_it_was(tmp_path: Path) -> None:
    check_writable_file(tmp_path / "new.png", "--png")
    (tmp_path / "old.png").write_text("old")
    check_writable_file(tmp_path / "old.png", "--png")
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"] and (tmp_path / "old.png").read_text() == "old"
    with pytest.raises(ValueError, match="--png .*gone/x.png cannot be written: there is no folder .*gone; make it"):
        check_writable_file(tmp_path / "gone/x.png", "--png")
    with pytest.raises(ValueError, match="--png .* cannot be written: it is a folder; name a file"):
        check_writable_file(tmp_path, "--png")
    with pytest.raises(ValueError, match=r"--png /sys/x.png: the folder /sys cannot be written \("):
        check_writable_file("/sys/x.png", "--png")


def test_a_disk_that_becomes_full_is_a_sentence_that_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^--output /x cannot be written \(No space left on device\); make room"),
        writing_to("/x", "--output"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it
    with pytest.raises(ValueError, match=r"^--output /x: /sys/y cannot be written \("), writing_to("/x", "--output"):
        Path("/sys/y").write_text("")
    with pytest.raises(FileNotFoundError), writing_to("/x", "--output"):
        (tmp_path / "gone").read_text()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (build.main, ["--dataset_config_file", "none.yaml", "--tokenizer", "none", "--output", OUT]),
        (merge.main, ["--output", OUT, "part"]),
        (latents.main, ["none", "--dataset_config_file", "none.yaml", "--vae", "none", "--output", OUT]),
        (sample.main, [OUT]),
        (tokenizer.main, [OUT, "--text", "none.txt"]),
        (hf_to_megatron.main, ["--model", "none", "--output", OUT]),
        (init_from_pretrained.main, ["--llm", "none", "--output", OUT]),
        (megatron_to_hf.main, ["--checkpoint", "none", "--output", OUT]),
        (adapter.main, ["export", "--checkpoint", "none", "--output", OUT]),
        (upcycle.main, ["--model", "none", "--num-experts", "2", "--moe-router-topk", "1", "--output", OUT]),
        (evaluate.main, ["geneval", "none.jsonl", "--model", "none", "--out", OUT]),
        (quickstart.main, [OUT]),
        (inspect.main, ["none", "--images", OUT]),
    ],
)
def test_every_command_refuses_before_it_reads(
    command: Callable[[Sequence[str]], int], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("none.yaml").write_text("t2i_pretrain: {dataset_names: [a], weight: 1, image_transform_args: {image_stride: 16}}")
    try:
        status: object = command(words)
    except SystemExit as leaving:
        status = leaving.code
    assert status in (1, 2)
    error = capsys.readouterr().err
    assert "cannot be written (" in error and "/sys/megatron_bagel" in error and "Traceback" not in error
