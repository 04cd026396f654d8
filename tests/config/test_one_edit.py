# SPDX-License-Identifier: Apache-2.0
"""A flag is added by one edit: a line in one dataclass reaches the parser, its aliases, help, docs, range check and YAML."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import megatron_bagel

LINE = '    novel_setting: int = flag(3, "What this novel setting does.", minimum=2, aliases=("novelty",), on_resume=FREE)\n'
#: Runs with the edited copy of the package.
PROGRAM = r"""
import contextlib, io, sys
from pathlib import Path

from megatron_bagel.config.flag_table import DOCUMENT, flag_table
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.resolved_yaml import resolved_yaml
from megatron_bagel.config.validate import check_numbers

folder = Path(sys.argv[1])
assert DOCUMENT.is_relative_to(folder), DOCUMENT
for words in (["--novel_setting", "5"], ["--novel-setting=5"], ["--novelty", "5"]):
    config = parse_config(words)
    assert config.value_of("novel_setting") == 5 and config.given == {"novel_setting"}
config.save(folder / "run.yaml")
assert parse_config(["--config", str(folder / "run.yaml")]) == config
(folder / "edited.yaml").write_text("novel-setting: 6\n")
assert parse_config(["--config", str(folder / "edited.yaml")]).value_of("novel_setting") == 6
assert "  novel_setting: 5\n" in resolved_yaml(config, 1, False)
check_numbers(config)
try:
    check_numbers(Config.from_values({"novel_setting": 1}))
except ValueError as error:
    assert str(error) == "--novel_setting is 1; it must be at least 2", error
else:
    raise AssertionError("the range is not checked")
help_text = io.StringIO()
with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
    parse_config(["--help"])
help_words = " ".join(help_text.getvalue().split())
assert "What this novel setting does. Must be at least 2. (default: 3)" in help_words
assert "--novelty" in help_words
assert "| `--novel_setting` | `3` | at least 2 | What this novel setting does. | new |\n" in flag_table()
assert "| `--novelty` | `--novel_setting` |" in flag_table()
print("all know it")
"""


def test_one_line_is_all_that_a_flag_needs(tmp_path: Path) -> None:
    package = tmp_path / "megatron_bagel"
    shutil.copytree(Path(megatron_bagel.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "config" / "observing_arguments.py").open("a", encoding="utf-8") as arguments:
        arguments.write(LINE)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "all know it\n"), ended.stderr
