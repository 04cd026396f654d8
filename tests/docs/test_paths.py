# SPDX-License-Identifier: Apache-2.0
"""Files that the pages name exist, and the page on architecture lists the floors that the import test holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, ROOT
from tests.test_imports import FLOORS, PACKAGE

PAGES_WITH_TESTS = [*PAGES, *ROOT.glob("tests/*.md")]
#: Files of BAGEL's repository that the pages name.
ORIGINALS = {
    "data/dataset_info.py", "dataset_info.py", "data/*_dataset.py", "data/dataset_base.py", "train/pretrain_unified_navit.py",
    "train/fsdp_utils.py", "train/train_utils.py", "modeling/autoencoder.py", "inferencer.py", "app.py",
    # Those of its forks, and one that docs/debugging.md asks the reader to save.
    "scripts/train_thinkmorph.sh", "scripts/train_text_reasoning.sh", "scripts/trans2hf.py", "inference_mdp_self_reflection.py",
    "snapshot.py",
}  # fmt: skip
#: Folders of the repository whose files a page may name without their folder.
FOLDERS = ("megatron_bagel", "tests", "tools", "data_tools", "examples", "benchmarks", "docs")
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def named_files(text: str) -> list[str]:
    """Return the Python files and shell scripts named in backticks outside fenced blocks."""
    prose = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([\w./*-]+\.(?:py|sh|sbatch))`", prose)


def missing(names: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return the names that are no file of the repository.

    A path counts from the root or from the package, a name without folders from any folder of the repository. ``*`` stands for anything.
    """
    bases = (root, root / "megatron_bagel")
    absent = []
    for name in names:
        anywhere = (match for folder in FOLDERS for match in (root / folder).rglob(name)) if "/" not in name else iter(())
        if not any(any(base.glob(name)) for base in bases) and not any(anywhere):
            absent.append(name)
    return absent


@pytest.mark.parametrize("page", PAGES_WITH_TESTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    assert not missing(name for name in named_files(page.read_text(encoding="utf-8")) if name not in ORIGINALS)


def test_a_missing_file_is_noticed() -> None:
    text = "`training/step.py`, `tests/test_train.py`, `step.py`, `config/*arguments.py`\n```text\n`fenced.py`\n```\n`stride.py`, `page.sh`"
    assert missing(named_files(text)) == ["tests/test_train.py", "stride.py"]


def test_the_floors_of_the_page_are_those_of_the_import_test() -> None:
    blocks = re.findall(r"^```text\n(.*?)^```", ARCHITECTURE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (floors,) = [block for block in blocks if block.rstrip().endswith("common")]
    shown = [set(re.split(r",\s*", line.strip())) for line in floors.strip().splitlines()]
    assert shown == [set(parts) for parts in reversed(FLOORS[""])]


def test_the_page_lists_every_room() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    rooms = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"."}
    assert not [room for room in sorted(rooms) if not re.search(rf"^ +{re.escape(room.split('/')[-1])}/ ", text, flags=re.MULTILINE)]
