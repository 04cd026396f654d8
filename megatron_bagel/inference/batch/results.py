# SPDX-License-Identifier: Apache-2.0
"""Answers as lines of ``results.jsonl`` with pictures beside it, and a run over many prompts that can be interrupted.

A picture is on disk before its line, and lines are written in the order of the prompts. Existing lines are therefore finished, and a
resumed run makes the others. ``settings.json`` records the settings of the answers, which must not change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from megatron_bagel.common.files import write_whole
from megatron_bagel.common.json_files import as_stored, read_json, whole_lines
from megatron_bagel.inference.batch.prompts import Prompt
from megatron_bagel.inference.batch.requests import Answer

RESULTS, SETTINGS = "results.jsonl", "settings.json"


class AnswerWriter:
    """Writes the answers of one run into a folder. With ``resume``, ``answered`` holds the records already in it by name."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None, resume: bool = False) -> None:
        """Open the folder. ``settings`` (plain JSON values) decide the answers; a resumed run must have the same, or ValueError."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings, path = as_stored(dict(settings or {})), self.folder / SETTINGS
        kept_records: list[dict[str, Any]] = []
        if resume and path.is_file():
            _check_same(read_json(path, "--resume"), settings, path)
            kept_records = _complete_records(self.folder / RESULTS)
        self.answered = {record["id"]: record for record in kept_records}
        write_whole(self.folder / RESULTS, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept_records))
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        self._results_file = (self.folder / RESULTS).open("a", encoding="utf-8")

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._results_file.close()
        except OSError:  # a full disk refuses the rest of the line whose error is on its way
            if error is None:
                raise

    def has(self, name: str, prompt: Prompt, seed: int) -> bool:
        """Return whether ``name`` is answered. Raises ValueError if its answer belongs to another prompt or seed."""
        record = self.answered.get(name)
        if record is None:
            return False
        expected = as_stored({**prompt.record(), "id": name, "seed": seed})
        if any(record.get(key) != value for key, value in expected.items()):
            raise ValueError(
                f"{self.folder / RESULTS}: {name} is the answer to another prompt or seed; give another --out, or drop --resume"
            )
        return True

    def write(self, name: str, prompt: Prompt, seed: int, answer: Answer) -> dict[str, Any]:
        """Save one answer under ``name`` and return the written record."""
        record = {**prompt.record(), "id": name, "seed": seed}
        if answer.items:
            record["items"] = [self._item(f"{name}-{number}", item) for number, item in enumerate(answer.items)]
        if answer.thought is not None:
            record["thought"] = answer.thought.text
        record |= self._item(name, answer)
        self._results_file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._results_file.flush()
        return record

    def _item(self, name: str, answer: Answer) -> dict[str, Any]:
        """Return the record of a text or a picture, and save the picture under ``name``."""
        record: dict[str, Any] = {}
        if answer.text is not None:
            record |= {"text": answer.text.text, "finished": answer.text.finished}
        if answer.image is not None:
            record["image"] = f"{name}.png"
            Image.fromarray(answer.image).save(self.folder / record["image"])
        return record


def _check_same(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    if "exif" in current:
        saved = {"exif": "ignore", **saved}  # what answers were made with before this was recorded
    differing_keys = sorted(key for key in saved.keys() | current.keys() if saved.get(key) != current.get(key))
    if differing_keys:
        differences = ", ".join(f"{key} was {saved.get(key)!r}, now {current.get(key)!r}" for key in differing_keys)
        raise ValueError(f"--resume: {path} records other settings of the existing answers: {differences}; give another --out")


def _complete_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of an interrupted run. Raises ValueError for a broken line before the last."""
    return [record for _, record in whole_lines(path, "remove the file to start again")] if path.is_file() else []
