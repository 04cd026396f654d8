"""Answers as lines of ``results.jsonl`` with pictures beside it, and a run over many prompts that can be interrupted.

A picture is on disk before its line is, and lines are written in the order of the prompts. So the lines that are there are done, and a
run that goes on makes the others; what they were made with is kept in ``settings.json`` and must not have changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_bagel.common.files import write_whole
from megatron_bagel.common.json_files import whole_lines
from megatron_bagel.inference.batch.prompts import Prompt
from megatron_bagel.inference.batch.requests import Answer

RESULTS, SETTINGS = "results.jsonl", "settings.json"


class AnswerWriter:
    """Writes the answers of one run into a folder; ``done`` are the names already answered there, with ``resume``."""

    def __init__(self, folder: str | Path, settings: Mapping[str, Any] | None = None, resume: bool = False) -> None:
        """``settings`` decide the answers (plain JSON values). Raises ValueError when a run that is resumed was made with others."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        settings, path = json.loads(json.dumps(dict(settings or {}))), self.folder / SETTINGS
        kept: list[dict[str, Any]] = []
        if resume and path.is_file():
            _check_same(json.loads(path.read_text(encoding="utf-8")), settings, path)
            kept = _answered(self.folder / RESULTS)
        self.done = {record["id"]: record for record in kept}
        write_whole(self.folder / RESULTS, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        self._lines = (self.folder / RESULTS).open("a", encoding="utf-8")

    def __enter__(self) -> AnswerWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()

    def has(self, name: str, prompt: Prompt, seed: int) -> bool:
        """Whether ``name`` is answered. Raises ValueError when its answer is one to another prompt or seed."""
        record = self.done.get(name)
        if record is None:
            return False
        asked = json.loads(json.dumps({**prompt.record(), "id": name, "seed": seed}))
        if any(record.get(key) != value for key, value in asked.items()):
            raise ValueError(
                f"{self.folder / RESULTS}: {name} is the answer to another prompt or seed; give another --out, or leave --resume out"
            )
        return True

    def write(self, name: str, prompt: Prompt, seed: int, answer: Answer) -> dict[str, Any]:
        """Save one answer under ``name``; the line that was written."""
        record = {**prompt.record(), "id": name, "seed": seed}
        if answer.thought is not None:
            record["thought"] = answer.thought.text
        if answer.text is not None:
            record |= {"text": answer.text.text, "finished": answer.text.finished}
        if answer.image is not None:
            record["image"] = f"{name}.png"
            Image.fromarray(answer.image).save(self.folder / record["image"])
        self._lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._lines.flush()
        return record


def _check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if differing:
        told = ", ".join(f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} now" for key in differing)
        raise ValueError(f"--resume: {path} says the answers there were made with other settings: {told}; give another --out")


def _answered(path: Path) -> list[dict[str, Any]]:
    """Return the records of an interrupted run. Raises ValueError for a broken line before the last."""
    return [record for _, record in whole_lines(path, "remove the file to start again")] if path.is_file() else []
