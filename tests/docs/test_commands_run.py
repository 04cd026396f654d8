# SPDX-License-Identifier: Apache-2.0
"""Commands of the documentation run as they are written, in the order of their page, on a small model on CPU; the rest is marked as
needing a GPU, abridged, or tested elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, Command, commands
from tests.docs.sandbox import ELSEWHERE, FITTINGS, elsewhere, make_shared, page_folder, run_page

COMMANDS = commands()
RUN = [command for command in COMMANDS if not (command.gpu or command.abridged or elsewhere(command))]
#: What justifies the mark: many ranks, a recipe for them, or a cluster's own programs.
NEEDS_A_GPU = re.compile(r"--nproc_per_node[= ]8|bash examples/(pretrain|finetune)_|^(\w+=\S+ )*(sbatch|kubectl|docker) ")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.gpu], ids=lambda command: command.name)
def test_the_mark_is_for_commands_that_need_it(command: Command) -> None:
    assert NEEDS_A_GPU.search(command.text) and "DRY_RUN" not in command.text


@pytest.mark.parametrize("command", RUN, ids=lambda command: command.name)
def test_what_needs_a_gpu_has_the_mark(command: Command) -> None:
    assert not NEEDS_A_GPU.search(command.text) or "DRY_RUN" in command.text, f"{command.name}: open its block with ```bash gpu"


def test_every_exception_is_for_some_command() -> None:
    """Nothing is left here of commands that the pages no longer have."""
    stale = [part for part in (*ELSEWHERE, *FITTINGS) if not any(part in command.text for command in COMMANDS)]
    assert not stale and len(RUN) > 30


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shared(tmp_path_factory.mktemp("docs"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in PAGES if any(command.page == page for command in RUN)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, shared: Path, tmp_path: Path) -> None:
    folder = page_folder(shared, tmp_path / "reader")
    run_page(folder, [command for command in RUN if command.page == page], page)
