# SPDX-License-Identifier: Apache-2.0
"""Commands of README and getting started run with the wheel alone, in a folder without the repository, and print what the pages say:
``tests/wheel.sh`` names the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.docs.commands import Command, commands
from tests.docs.expected_output import PAGES
from tests.docs.sandbox import elsewhere, make_shared, page_folder, run_page

WHEEL = os.environ.get("MEGATRON_BAGEL_WHEEL")
#: What belongs to a checkout: its scripts make the environment, run the tests, and start the quickstart with it.
SCRIPTS = ("bash examples/", "bash tests/")


def with_the_wheel(page: Path) -> list[Command]:
    """The commands of a page that the wheel must be able to run, in their order."""
    return [
        command
        for command in commands()
        if command.page == page and not (command.gpu or command.abridged or elsewhere(command)) and not command.text.startswith(SCRIPTS)
    ]


def test_the_pages_have_such_commands_and_need_no_file_of_the_repository() -> None:
    found = [command for page in PAGES for command in with_the_wheel(page)]
    assert len(found) >= 10
    assert not [command.name for command in found if any(part in command.text for part in ("data_tools/", "tools/", "examples/"))]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.skipif(WHEEL is None, reason="needs an environment with the wheel: bash tests/wheel.sh")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_run_with_the_wheel_alone(page: Path, tmp_path: Path) -> None:
    folder = page_folder(make_shared(tmp_path), tmp_path / "reader", wheel=Path(str(WHEEL)))
    run_page(folder, with_the_wheel(page), page, wheel=True)
