# SPDX-License-Identifier: Apache-2.0
"""Scripts and modules that the documentation names hold nothing: they hand over to a command, under the name they are called by."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for folder in ("data_tools", "tools/checkpoint_convert") for path in (ROOT / folder).glob("*.py")
)
DOORS = [*SCRIPTS, "data_tools/inspect/__main__.py", *(f"megatron_bagel/{name}.py" for name in ("train", "generate", "evaluate", "plan"))]


def test_the_documented_scripts_are_there() -> None:
    names = {Path(script).stem for script in SCRIPTS}
    assert names == {
        "build_index", "merge_index", "verify_index", "inspect_index", "make_sample_data", "cache_latents", "train_tokenizer",
        "hf_to_megatron", "megatron_to_hf", "init_from_pretrained", "inspect_checkpoint",
    }  # fmt: skip


@pytest.mark.parametrize("door", [*DOORS, "megatron_bagel/__main__.py"])
def test_a_door_imports_a_command_and_calls_it(door: str) -> None:
    docstring, first, second, guarded = ast.parse((ROOT / door).read_text()).body
    assert isinstance(docstring, ast.Expr) and "python " in ast.unparse(docstring)
    assert ast.unparse(first) == "import sys"
    assert isinstance(second, ast.ImportFrom) and (second.module or "").startswith("megatron_bagel.cli.") and second.names[0].name == "main"
    assert isinstance(guarded, ast.If) and len(guarded.body) == 1 and ast.unparse(guarded.body[0]).startswith("sys.exit(main(")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_under_its_own_name(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith(f"usage: {Path(script).name} ") and "%(prog)s" not in text


def test_a_script_runs_from_any_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", str(ROOT / "data_tools/merge_index.py"), "--output", "index"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("merge_index: there is nothing to merge")
