# SPDX-License-Identifier: Apache-2.0
"""record_runs refuses what it cannot record, its cases are runs that training accepts, and a recording can be repeated and continued."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bagel.config.parser import parse_config
from megatron_bagel.config.validate import validate
from tests.conftest import ROOT
from tests.waiting import eventually
from tools import compare_runs, record_checkout, record_runs
from tools.record_cases import CASES, KEPT_STEP, STEPS, Case, training_arguments
from tools.record_checkout import Checkout, CommandFailed

LLM_CONFIG = {
    "vocab_size": 448, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip
VIT_CONFIG = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 140, "patch_size": 14,
}  # fmt: skip


@pytest.fixture
def record(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit status and everything it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = record_runs.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out + output.err

    return run


@pytest.fixture
def failing_checkout(tmp_path: Path) -> Path:
    """A checkout whose first command ends with an error."""
    repo = tmp_path / "failing"
    for file in ("megatron_bagel/__init__.py", "megatron_bagel/train.py", "data_tools/make_sample_data.py"):
        (repo / file).parent.mkdir(parents=True, exist_ok=True)
        (repo / file).write_text("")
    (repo / "data_tools/make_sample_data.py").write_text("import sys\nsys.exit('no disk left')\n")
    return repo


@pytest.mark.parametrize("name", CASES)
def test_training_accepts_every_case(name: str, tmp_path: Path) -> None:
    """Flags and parallel sizes; that the files exist is all that training asks of them before it starts."""
    for file in ("data/dataset.yaml", "data/llm/config.json", "data/vit/config.json", "autoencoder/ae.safetensors"):
        (tmp_path / "world" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "world" / file).touch()
    for folder in ("index", "latents"):
        (tmp_path / "world" / folder).mkdir()
    for part, content in (("llm", LLM_CONFIG), ("vit", VIT_CONFIG)):
        (tmp_path / "world/data" / part / "config.json").write_text(json.dumps(content))
    case = CASES[name]
    for stop in case.stops:
        config = parse_config(training_arguments(case, tmp_path / "world", tmp_path / name, stop))
        validate(config, case.processes, has_gpu=False)
        assert config.training.total_steps == stop and config.training.save_every == KEPT_STEP
    assert case.stops[-1] == STEPS


def test_folders_that_cannot_be_used(tmp_path: Path, record: Callable) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording/recording.json").write_text(json.dumps({"world": "world"}))
    for arguments, expected in (
        ([tmp_path / "full"], "full is not a complete recording: it has no recording.json; name another folder"),
        ([tmp_path / "out", "--repo", tmp_path / "nowhere"], "nowhere is not a checkout of this project"),
        ([tmp_path / "out", "--continue-from", tmp_path / "full"], "full is not a complete recording"),
        ([tmp_path / "out", "--continue-from", tmp_path / "recording"], "one-process/checkpoints/0000010; record one-process there first"),
    ):
        status, text = record(*arguments)
        assert status == 2 and expected in text, text
    assert not (tmp_path / "out").exists()


def test_a_case_is_added_only_to_a_recording_of_its_commit_that_lacks_it(tmp_path: Path, record: Callable) -> None:
    commit = Checkout(ROOT, sys.executable).commit()
    for number, (recorded, expected) in enumerate((("0" * 40, "cannot be added to by"), (commit, "holds cp3 already"))):
        out = tmp_path / str(number)
        (out / "cp3").mkdir(parents=True)
        (out / "recording.json").write_text(json.dumps({"commit": recorded, "continued_from": None, "world": "world", "seconds": {}}))
        status, text = record(out, "--cases", "cp3")
        assert status == 2 and expected in text, text


def test_a_command_that_fails_is_told_with_the_end_of_its_output(tmp_path: Path, failing_checkout: Path, record: Callable) -> None:
    status, text = record(tmp_path / "out", "--repo", failing_checkout)
    assert status == 1 and "make_sample_data.py" in text and "ended with status 1" in text and text.rstrip().endswith("no disk left")
    assert not (tmp_path / "out/recording.json").exists()


def test_a_run_that_begins_anew_is_not_taken_for_a_resume(tmp_path: Path) -> None:
    """A checkout whose training writes every checkpoint, whatever is there."""
    repo, folder = tmp_path / "repo", tmp_path / "dp2-overlap"
    (repo / "megatron_bagel").mkdir(parents=True)
    (repo / "megatron_bagel/__init__.py").touch()
    (repo / "megatron_bagel/train.py").write_text(
        "import pathlib, shutil, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--checkpoint_dir') + 1]) / '0000010'\n"
        "shutil.rmtree(folder, ignore_errors=True)\n"
        "folder.mkdir(parents=True)\n"
    )
    record_runs.kept_checkpoint(folder).mkdir(parents=True)
    with pytest.raises(CommandFailed, match="did not continue from .*0000010 but wrote it again"):
        record_runs.record_case(Checkout(repo, sys.executable), Case(1), tmp_path / "world", folder)


def test_a_command_that_takes_too_long_is_ended_with_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_checkout, "COMMAND_TIMEOUT_S", 2)
    script, log = tmp_path / "parent.py", tmp_path / "log"
    script.write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with pytest.raises(CommandFailed, match="took longer than 2 s"):
        Checkout(tmp_path, sys.executable).run([script], log)
    child = int(log.read_text().splitlines()[-1])
    eventually(lambda: not is_running(child))


def is_running(process: int) -> bool:
    """Whether a process exists and has not ended."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_a_recording_is_repeated_and_continued_bit_for_bit(tmp_path: Path, record: Callable) -> None:
    """As a script outside the checkout; the case that is evaluated, and another added to it."""
    script = [sys.executable, record_runs.__file__, "before", "--cases", "bf16-evaluation"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path / "before", "--cases", "dp2-overlap", "resume")[0] == 0
    assert record(tmp_path / "again", "--cases", "bf16-evaluation", "dp2-overlap", "resume")[0] == 0
    continued = [tmp_path / "continued", "--continue-from", tmp_path / "before", "--cases", "bf16-evaluation", "dp2-overlap", "resume"]
    assert record(*continued)[0] == 0
    for other in ("again", "continued"):
        assert compare_runs.main([str(tmp_path / "before"), str(tmp_path / other), "--bitwise"]) == 0
    assert compare_runs.main([str(tmp_path / "before/dp2-overlap"), str(tmp_path / "before/resume"), "--bitwise"]) == 0
    log = (tmp_path / "continued/resume/log.txt").read_text()
    assert f"(step={KEPT_STEP:07d})" in log and f"(step={KEPT_STEP - 1:07d})" not in log
    # What the comparison holds equal is there, and is not the copy of the other recording.
    shutil.rmtree(tmp_path / "before/bf16-evaluation/samples")
    assert compare_runs.main([str(tmp_path / "before"), str(tmp_path / "continued"), "--bitwise"]) == 1
