# SPDX-License-Identifier: Apache-2.0
"""Every block of commands of README and getting started has its output beside it, and the comparison notices another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.commands import ROOT
from tests.docs.expected_output import PAGES, blocks, main, missing

BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_block_has_its_output_beside_it(block) -> None:
    assert [line for line in block.expected if line.strip() != "…"], f"{block.name}: put what it prints into a ```text block below it"


def test_the_blocks_are_those_of_the_pages() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(list(blocks(page))) == text.count("```bash\n") and len(list(blocks(page))) > 3


def test_numbers_and_left_out_parts_may_differ() -> None:
    expected = ["…/first/data: 300 t2i, 150 edit", "…", "step  0.5 at 12:30:05", "saved first/checkpoints/0000100"]
    printed = "noise\n/tmp/x/first/data: 40 t2i, 20 edit\nmore\nstep 1.25   at 09:00:00  \nsaved first/checkpoints/0000002\n"
    assert not missing(expected, printed)
    assert not missing(["100%|####"], " 10%|#   \r100%|####\n")


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        (["saved index"], "saved the index\n"),
        (["two", "one"], "one\ntwo\n"),
        (["one", "one"], "one\n"),
        (["wrote 3 files"], "wrote files\n"),
        (["a line"], "more than a line\n"),
    ],
)
def test_another_output_is_noticed(expected: list[str], printed: str) -> None:
    assert missing(expected, printed)


def test_the_command_compares_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = next(block for block in BLOCKS if "bash tests/run.sh" in block.commands)
    page = str(block.page.relative_to(ROOT))
    (tmp_path / "same.txt").write_text("\n".join(block.expected))
    (tmp_path / "other.txt").write_text("nothing\n")
    assert main([page, "bash tests/run.sh", str(tmp_path / "same.txt")]) == 0
    assert main([page, "bash tests/run.sh", str(tmp_path / "other.txt")]) == 1
    assert "did not print" in capsys.readouterr().err
    assert main([page, "bash no_such.sh", str(tmp_path / "same.txt")]) == 2
