# SPDX-License-Identifier: Apache-2.0
"""``megatron-bagel`` finds every command by its words, names itself as it was called, and imports nothing that it does not need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megatron_bagel import __version__
from megatron_bagel.cli.main import COMMANDS, GROUPS, main

ROOT = Path(__file__).resolve().parents[2]


def start(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m megatron_bagel`` in a process of its own, outside of this folder."""
    command, environment = [sys.executable, "-W", "ignore", "-m", "megatron_bagel", *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_a_command_is_found_and_shows_how_it_was_called(tmp_path: Path) -> None:
    done = start("data", "build", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m megatron_bagel data build ")
    assert "    python -m megatron_bagel data build --dataset_config_file data.yaml" in done.stdout and "%(prog)s" not in done.stdout
    done = start("data", "merge", "--output", str(tmp_path / "index"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("megatron_bagel data merge: there is nothing to merge")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_reads_its_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: megatron-bagel {name} ") and "%(prog)s" not in text


def test_the_lists_name_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^  (\S+(?: \S+)?)  +[A-Z]", capsys.readouterr().out, flags=re.MULTILINE)
    assert listed == list(COMMANDS)
    for group in GROUPS:
        assert main([group, "--help"]) == 0
        listed = re.findall(r"^  (\S+)  +[A-Z]", capsys.readouterr().out, flags=re.MULTILINE)
        assert listed == [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]


def test_the_lists_and_the_version_import_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_bagel.cli.main import main; "
        "codes = [main(words) for words in (['--help'], ['data', '--help'], ['--version'], ['trian'])]; "
        "print(codes, sorted({'numpy', 'torch', 'transformers', 'pyarrow', 'megatron'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 2] []"
    assert f"megatron-bagel {__version__}" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "megatron-bagel: there is no command 'trian'; did you mean train; see megatron-bagel --help"),
        (["build"], "megatron-bagel: there is no command 'build'; did you mean data build; see megatron-bagel --help"),
        (["dta", "build"], "there is no command 'dta'; did you mean data;"),
        (["data", "verfy", "index"], "there is no command 'data verfy'; did you mean data verify; see megatron-bagel data --help"),
        (["convert", "hf_to_megatron"], "there is no command 'convert hf_to_megatron'; did you mean convert hf-to-megatron;"),
        (["--config", "train"], "there is no command '--config'; see megatron-bagel --help"),
        ([], "usage: megatron-bagel COMMAND"),
        (["data"], "usage: megatron-bagel data COMMAND"),
    ],
)
def test_words_that_name_no_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_errors_name_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("megatron-bagel data verify: ")
    assert main(["convert", "inspect", "show", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("megatron-bagel convert inspect: ")
    assert main(["train", "--lrr", "1"]) == 2
    assert capsys.readouterr().err.startswith("megatron-bagel train: error: ")
    assert main(["plan", "--gpuss", "1"]) == 2
    assert capsys.readouterr().err.startswith("megatron-bagel plan: error: ")


def test_installing_gives_the_command(tmp_path: Path) -> None:
    """The metadata that ``pip install`` reads names this dispatcher."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    [file] = tmp_path.glob("*.egg-info/entry_points.txt")
    match = re.search(r"^megatron-bagel = ([\w.]+):(\w+)$", file.read_text(), flags=re.MULTILINE)
    assert match and getattr(import_module(match[1]), match[2]) is main
    modules = (next(tmp_path.glob("*.egg-info/SOURCES.txt"))).read_text().splitlines()
    assert {"megatron_bagel/__main__.py", "megatron_bagel/cli/data/build.py", "megatron_bagel/cli/convert/command_line.py"} <= set(modules)


@pytest.mark.distributed
def test_torchrun_starts_training_through_it(tmp_path: Path) -> None:
    """Two ranks read their words and refuse them alike: what they train is tested with ``python -m megatron_bagel.train``."""
    words = ["--standalone", "--nproc_per_node", "2", "-m", "megatron_bagel", "train", "--tensor_model_parallel_size", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode != 0
    assert done.stderr.count("megatron_bagel train: error: ") >= 1 and "ranks of this run" in done.stderr
