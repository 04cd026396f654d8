# SPDX-License-Identifier: Apache-2.0
"""The command that shows the page, where it cannot; what it shows is in test_page_server.py."""

from __future__ import annotations

import sys

import pytest

from megatron_bagel.cli import generate


def test_without_gradio_it_says_what_to_install(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("page_server", "page"):
        monkeypatch.delitem(sys.modules, f"megatron_bagel.inference.{name}", raising=False)
    assert generate.main(["--model", "gone", "--serve", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "pip install megatron_bagel[serve]" in said and "gone" not in said, "before the model is looked for"
