# SPDX-License-Identifier: Apache-2.0
"""A bar for a training that runs in another process: it reads the run's metrics and sees new sheets of pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

from megatron_bagel.common.json_text import parse_json
from megatron_bagel.common.yaml_files import read_yaml

#: Seconds between two states of the bar where the output is a file.
_FILE_INTERVAL = 30.0


class TrainingBar:
    """Shows steps, time left and losses of a run by its results folder, and one line for every new sheet of pictures."""

    def __init__(self, results: Path, label: str) -> None:
        self._results, self._label = results, label
        self._offset = 0
        self._sheets: set[Path] = set(results.glob("samples/*.png"))
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self) -> None:
        """Read what the run has written since the last call."""
        if self._bar is None:
            total = self._total_steps()
            if total is None:
                return
            interval = 0.5 if sys.stderr.isatty() else _FILE_INTERVAL
            self._bar = tqdm(total=total, desc=self._label, unit="step", mininterval=interval, dynamic_ncols=sys.stderr.isatty())
        for record in self._new_records():
            losses = {name: f"{record[name]:.3f}" for name in ("mse", "ce") if record.get(name)}
            self._bar.set_postfix(losses, refresh=False)
            self._bar.update(record["step"] + 1 - self._bar.n)
        for sheet in sorted(set(self._results.glob("samples/*.png")) - self._sheets):
            self._sheets.add(sheet)
            self._bar.write(f"new pictures: {sheet}")

    def _total_steps(self) -> int | None:
        config = self._results / "config.yaml"
        if not config.is_file() or not (self._results / "metrics.jsonl").is_file():
            return None
        sections = read_yaml(config, "quickstart").values()
        return int(next(section["total_steps"] for section in sections if isinstance(section, dict) and "total_steps" in section))

    def _new_records(self) -> list[dict[str, Any]]:
        metrics = self._results / "metrics.jsonl"
        if not metrics.is_file():
            return []
        with metrics.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [parse_json(line, str(metrics)) for line in complete.splitlines()]
