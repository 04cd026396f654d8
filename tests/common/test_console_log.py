# SPDX-License-Identifier: Apache-2.0
"""A converter's console shows this package's messages, and of other packages only warnings."""

from __future__ import annotations

import logging

import pytest

from megatron_bagel.common.console_log import log_to_console


def _without_handlers(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """Return the root logger of a process in which nothing has set up a log."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    return root


def test_only_our_messages_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _without_handlers(monkeypatch)
    log_to_console()
    logging.getLogger("megatron.core.distributed").info("Detected Megatron Core")
    logging.getLogger("megatron_bagel_fork").info("a stranger")
    logging.getLogger("megatron.core").warning("a warning")
    logging.getLogger("megatron_bagel.checkpoint.convert").info("wrote %s", "folder")
    assert capsys.readouterr().err == "a warning\nwrote folder\n"


def test_a_log_that_is_set_up_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = _without_handlers(monkeypatch)
    logging.basicConfig(level=logging.ERROR, format="of the caller: %(message)s")
    log_to_console()
    logging.getLogger("megatron_bagel").error("wrong")
    assert root.level == logging.ERROR and capsys.readouterr().err == "of the caller: wrong\n"
