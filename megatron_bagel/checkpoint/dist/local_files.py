# SPDX-License-Identifier: Apache-2.0
"""One rank's files of local checkpoints, each with a note: its contents and its checksum. No function here waits for another rank.

<folder>/iter_0000005_0_local.pt          rank 0's share of step 5, which nvidia-resiliency-ext writes under another name and renames
<folder>/iter_0000005_0_local.json        the note, written once the file is complete
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.checkpoint.dist.checksums import digests
from megatron_bagel.common.files import write_whole
from megatron_bagel.common.json_files import read_json

_NAME = re.compile(r"iter_(\d+)_\d+_local(\.dirty)?\.(pt|json|json\.new)")


@dataclass(frozen=True)
class LocalCheckpointSettings:
    """``directory`` is on a disk of each node, ``every`` are the steps between local checkpoints."""

    directory: str
    every: int


@dataclass(frozen=True)
class RankFiles:
    """The files of ``rank`` in ``folder``."""

    folder: Path
    rank: int

    def file(self, step: int) -> Path:
        """Return the path of the rank's share of a step."""
        return self.folder / f"iter_{step:07d}_{self.rank}_local.pt"

    def write_note(self, step: int, head: Mapping[str, Any]) -> None:
        """Write the note of a step once its file is complete. Raises OSError."""
        note = self.file(step).with_suffix(".json")
        write_whole(note, json.dumps({"head": head, "sum": _sum(self.file(step))}))

    def read_head(self, step: int) -> dict[str, Any]:
        """Return the head that was saved with a step. Raises ValueError if its file has changed since or is incomplete."""
        path, note_path = self.file(step), self.file(step).with_suffix(".json")
        if not note_path.is_file():
            raise ValueError(f"{path}: its save did not finish (there is no {note_path.name})")
        try:
            note = read_json(note_path, "local checkpoint")
            head, recorded_sum = note["head"], note["sum"]
            actual_sum = _sum(path)
        except OSError as error:
            raise ValueError(f"{path}: its save did not finish ({error})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: its note is damaged ({error})") from error
        if actual_sum != recorded_sum:
            raise ValueError(f"{path} does not have the checksum it was written with")
        return head

    def remove(self, unwanted: Callable[[int], bool]) -> None:
        """Remove the files of unwanted steps and the leftovers of killed saves. Raises OSError."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and (match[2] or match[3] == "json.new" or unwanted(int(match[1]))):
                # The manager also removes old files, in a separate thread.
                path.unlink(missing_ok=True)


def _sum(path: Path) -> dict[str, Any]:
    return digests([path])[path.name]
