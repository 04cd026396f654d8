# SPDX-License-Identifier: Apache-2.0
"""Answers of earlier versions, whose settings do not record the EXIF orientation, continue with its old value only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bagel.inference.batch.results import SETTINGS, AnswerWriter


def test_settings_without_exif_mean_ignore(tmp_path: Path) -> None:
    with AnswerWriter(tmp_path, {"task": "t2i"}):
        pass
    with pytest.raises(ValueError, match="exif was 'ignore', now 'turn'"):
        AnswerWriter(tmp_path, {"task": "t2i", "exif": "turn"}, resume=True)
    with AnswerWriter(tmp_path, {"task": "t2i", "exif": "ignore"}, resume=True):
        pass
    assert json.loads((tmp_path / SETTINGS).read_text())["exif"] == "ignore"
